// Dense 3x3 convolution with dilation, stride 1, as an implicit matrix product on the tensor cores (sm_80 and above):
// [pixels, taps x C_in] x [taps x C_in, C_out], float32 sums, fused epilogue relu(scale * (sum + bias) + shift).
//
// Layout: input channels last (any pixel strides), weight [3, 3, C_out, C_in], output any strides, written with 16-byte
// stores where it is channels last. In shared memory, rows of 64 bytes along C_in for each of the tile's pixels and
// output channels; the 16-byte pieces of a row are swizzled so that copies, ldmatrix and the epilogue meet no bank twice.
// Pixels are numbered in up to three column strips (DenseParams::cut), so that most blocks see only the columns where a
// side tap hits the map or only those where it misses it. A block computes kPixels x kChannels outputs; it leaves out the
// taps that miss the map for all its pixels (Chen et al. 2017, 1706.05587, section 3.2: large rates degenerate), a warp
// computes kWarpPixels x kWarpChannels of it, the threads copy a ring of kStages stages ahead with cp.async. Where the
// output has too few tiles for the device, C_in is split among blocks, and a second kernel adds their partial sums.
// Least bytes: input + weight + output once. Deterministic: fixed order of sums, no atomics.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"

namespace pyseg::atrous {

template <typename T>
struct DenseParams {
  const T* input;
  const T* weight;  // [9, out_channels, channels]
  const T* bias;    // [out_channels] or null, as scale and shift
  const T* scale;
  const T* shift;
  T* output;
  bool relu;
  bool vector_stores;  // output is channels last and every pixel of it 16-byte aligned
  int channels, out_channels;
  int height, width, out_height;
  int64_t pad_h, pad_w, dilation_h, dilation_w;
  int64_t in_n, in_h, in_w;            // input strides; that of c is 1
  int64_t out_n, out_c, out_h, out_w;  // output strides
  int64_t tap_offset[9];               // from a pixel's first tap to the others
  // Strip s holds the columns cut[s] <= x < cut[s + 1] of all images; its pixels, numbered image by image and row by row,
  // start at number first[s]. Any strip may be empty.
  int cut[4];
  uint32_t first[4];
  // Split sums: block (., s) multiplies channels_per_split channels only and leaves its sums in the s-th part of
  // `partial`, float32 [pixels, out_channels], or [out_channels, pixels] where the output is not channels last. Null:
  // not split.
  float* partial;
  int channels_per_split;
};

// What a block computes and how its warps share it. One iteration of the main loop multiplies 64 bytes of one tap's
// channels.
template <int kPixels_, int kChannels_, int kWarpPixels_, int kWarpChannels_, int kStages_>
struct DenseTile {
  static constexpr int kPixels = kPixels_, kChannels = kChannels_;
  static constexpr int kWarpPixels = kWarpPixels_, kWarpChannels = kWarpChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kRowBytes = 64;
  static constexpr int kStageBytes = (kPixels + kChannels) * kRowBytes;
  static constexpr int kWarpsAlongChannels = kChannels / kWarpChannels;
  static constexpr int kWarps = kPixels / kWarpPixels * kWarpsAlongChannels;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // 16 warps to hide latency, so at most 128 registers a thread. The narrowest copies need more for their addresses:
  // three blocks of 64x64, 12 warps.
  static constexpr int kBlocksPerProcessor = 16 / kWarps;
  // The epilogue passes 32 pixels of a warp's tile at a time through shared memory, as float32 at most, rows along pixels
  // padded to kPaddedPixels.
  static constexpr int kSlicePixels = 32;
  static constexpr int kPaddedPixels = kSlicePixels + 4;
  static constexpr int kSliceBytes = kWarpChannels * kPaddedPixels * 4;

  static_assert(kPixels % kWarpPixels == 0 && kChannels % kWarpChannels == 0, "whole warp tiles");
  static_assert(kWarpPixels % kSlicePixels == 0, "the epilogue takes 32 pixels at a time");
  static_assert(kWarpChannels == 16 || kWarpChannels == 32, "ldmatrix loads 16 channels, the epilogue knows 16 and 32");
  static_assert(kStages >= 3, "one stage is read, one has just been read, one is in flight at least");
  static_assert(kSharedBytes <= 48 * 1024, "no opt-in needed, and two blocks fit where an SM has 100 KiB");
  static_assert(kWarps * kSliceBytes + kPixels * 8 <= kSharedBytes, "the epilogue reuses the ring");
};

// Byte offset of byte `byte` of row `row` in shared memory of kRowBytes a row, the 16-byte pieces of a row permuted by its
// number. Eight lanes that read the pieces of consecutive rows, or (kGroup 1) one piece of eight rows, or (kGroup 2) a
// pair of pieces of four rows, meet each of the 32 banks once.
template <int kRowBytes, int kGroup = 1>
__device__ inline int swizzled(int row, int byte) {
  static_assert(128 % kRowBytes == 0 && kRowBytes % (16 * kGroup) == 0, "whole rows in the 128 bytes of all banks");
  constexpr int kRowsPerLine = 128 / kRowBytes, kGroups = kRowBytes / (16 * kGroup);
  return row * kRowBytes + (byte ^ (row / kRowsPerLine % kGroups * kGroup * 16));
}

struct Pixel {
  uint32_t n, y, x;
};

template <typename T>
__device__ inline Pixel pixel_of(uint32_t number, const DenseParams<T>& p) {
  const int s = number >= p.first[2] ? 2 : number >= p.first[1] ? 1 : 0;
  const uint32_t width = p.cut[s + 1] - p.cut[s];
  const uint32_t row = (number - p.first[s]) / width;
  return {row / p.out_height, row % p.out_height, p.cut[s] + (number - p.first[s]) % width};
}

// How kThreads threads copy kRows rows of 64 bytes to shared memory, kAccess bytes at a time. kReadAgain: through L1.
template <int kRows, int kThreads, int kAccess, bool kReadAgain>
struct RowCopy {
  static constexpr int kPiecesPerRow = 64 / kAccess;
  static constexpr int kRowStep = kThreads / kPiecesPerRow;
  static constexpr int kRowsPerThread = (kRows + kRowStep - 1) / kRowStep;
  static_assert(kThreads % kPiecesPerRow == 0, "all pieces of a row at once");

  // This thread's i-th row, and its place in every row.
  __device__ static int row(int i) { return threadIdx.x / kPiecesPerRow + i * kRowStep; }
  __device__ static int byte() { return threadIdx.x % kPiecesPerRow * kAccess; }

  // Starts the copies: source(i) is this thread's piece of its i-th row, taken for zeros where !valid(i). Pieces too
  // small for cp.async are copied at once.
  template <typename Source, typename Valid>
  __device__ static void start(unsigned char* shared, Source source, Valid valid) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      if (kRows % kRowStep != 0 && row(i) >= kRows) break;
      unsigned char* const to = shared + swizzled<64>(row(i), byte());
      if constexpr (kAccess == 2) {
        *reinterpret_cast<uint16_t*>(to) = valid(i) ? *reinterpret_cast<const uint16_t*>(source(i)) : uint16_t{0};
      } else if constexpr (kAccess == 16 && !kReadAgain) {
        ptx::cp_async_16(ptx::shared_address(to), source(i), valid(i));
      } else {
        ptx::cp_async<kAccess>(ptx::shared_address(to), source(i), valid(i));
      }
    }
  }
};

// NaN stays NaN.
__device__ inline float epilogue(float sum, float bias, float scale, float shift, bool relu) {
  const float v = (sum + bias) * scale + shift;
  return relu && v < 0 ? 0.0f : v;
}

// Two neighbouring channels in the output's type, as they lie in memory.
__device__ inline float2 pack(float a, float b, const float*) { return {a, b}; }
__device__ inline __half2 pack(float a, float b, const __half*) { return __floats2half2_rn(a, b); }
__device__ inline __nv_bfloat162 pack(float a, float b, const __nv_bfloat16*) { return __floats2bfloat162_rn(a, b); }
__device__ inline void assign(float& to, float v) { to = v; }
__device__ inline void assign(__half& to, float v) { to = __float2half_rn(v); }
__device__ inline void assign(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

// Writes the fragments of 32 pixels of a warp's tile, lanes along channels. output points to the warp's first channel,
// offsets[i] says where pixel i lies from there (-1: nowhere), `channels` how many of the tile exist.
template <typename Tile, typename T>
__device__ inline void store_channels_last(const float (*sum)[Tile::kWarpChannels / 8][4], unsigned char* slice,
                                           T* output, const int64_t* offsets, int channels, bool vector_stores) {
  constexpr int kRowBytes = Tile::kWarpChannels * sizeof(T), kPieces = kRowBytes / 16, kPerPiece = 16 / sizeof(T);
  constexpr int kGroup = sizeof(T) / 2;  // pieces that the eight channels of a fragment fill
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kWarpChannels / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto two = pack(sum[m][n][2 * half], sum[m][n][2 * half + 1], output);
        const int byte = (n * 8 + lane % 4 * 2) * sizeof(T);
        auto* to = slice + swizzled<kRowBytes, kGroup>(m * 16 + half * 8 + lane / 4, byte);
        *reinterpret_cast<std::remove_const_t<decltype(two)>*>(to) = two;
      }
    }
  }
  __syncwarp();
  if (vector_stores) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int pixel = i * (32 / kPieces) + lane / kPieces, channel = lane % kPieces * kPerPiece;
      const int64_t offset = offsets[pixel];
      if (offset < 0 || channel >= channels) continue;
      const unsigned char* from = slice + swizzled<kRowBytes, kGroup>(pixel, lane % kPieces * 16);
      if (channel + kPerPiece <= channels) {
        *reinterpret_cast<uint4*>(output + offset + channel) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int e = 0; e < channels - channel; ++e) {
          output[offset + channel + e] = reinterpret_cast<const T*>(from)[e];
        }
      }
    }
  } else {
    constexpr int kPixelsAtOnce = 32 / Tile::kWarpChannels;
    const int channel = lane % Tile::kWarpChannels;
    for (int i = 0; i < Tile::kSlicePixels / kPixelsAtOnce; ++i) {
      const int pixel = i * kPixelsAtOnce + lane / Tile::kWarpChannels;
      if (offsets[pixel] < 0 || channel >= channels) continue;
      output[offsets[pixel] + channel] =
          *reinterpret_cast<const T*>(slice + swizzled<kRowBytes, kGroup>(pixel, channel * sizeof(T)));
    }
  }
}

// The same for an output whose channels lie channel_stride apart: lanes along pixels.
template <typename Tile, typename T>
__device__ inline void store_rows(const float (*sum)[Tile::kWarpChannels / 8][4], unsigned char* slice, T* output,
                                  const int64_t* offsets, int channels, int64_t channel_stride) {
  float* const rows = reinterpret_cast<float*>(slice);  // [channel][kPaddedPixels]
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kWarpChannels / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int channel = n * 8 + lane % 4 * 2 + e % 2, pixel = m * 16 + e / 2 * 8 + lane / 4;
        rows[channel * Tile::kPaddedPixels + pixel] = sum[m][n][e];
      }
    }
  }
  __syncwarp();
  const int64_t offset = offsets[lane];
  if (offset < 0) return;
  for (int channel = 0; channel < channels; ++channel) {
    assign(output[offset + channel * channel_stride], rows[channel * Tile::kPaddedPixels + lane]);
  }
}

// kAccess: bytes per copy into shared memory, such that the channels and strides of input and weight are multiples of it.
template <typename T, typename Tile, int kAccess>
__global__ void __launch_bounds__(Tile::kThreads, kAccess == 2 ? 3 : Tile::kBlocksPerProcessor)
    atrous_conv2d_dense_kernel(const __grid_constant__ DenseParams<T> p) {
#if PYSEG_PTX_SM80
  constexpr int kChunk = Tile::kRowBytes / sizeof(T);  // channels per iteration
  constexpr int kStep = 32 / sizeof(T);                // channels per mma
  constexpr int kPixelFragments = Tile::kWarpPixels / 16, kChannelFragments = Tile::kWarpChannels / 8;
  using PixelCopy = RowCopy<Tile::kPixels, Tile::kThreads, kAccess, true>;  // by other taps
  using ChannelCopy = RowCopy<Tile::kChannels, Tile::kThreads, kAccess, false>;
  static_assert(PixelCopy::kPiecesPerRow == ChannelCopy::kPiecesPerRow, "one place in a row for both");
  __shared__ __align__(128) unsigned char ring[Tile::kSharedBytes];

  const uint32_t channel_tiles = (p.out_channels + Tile::kChannels - 1) / Tile::kChannels;
  const uint32_t first_pixel = blockIdx.x / channel_tiles * Tile::kPixels;
  const int first_channel = blockIdx.x % channel_tiles * Tile::kChannels;
  const uint32_t pixels = p.first[3];
  const int channel_begin = blockIdx.y * p.channels_per_split;
  const int channel_end = min(channel_begin + p.channels_per_split, p.channels);

  // 1. The rows that this thread copies: where the pixels' first taps lie, which taps hit the map.
  const unsigned char* pixel_source[PixelCopy::kRowsPerThread];
  uint32_t pixel_taps[PixelCopy::kRowsPerThread];
  uint32_t my_taps = 0;
#pragma unroll
  for (int i = 0; i < PixelCopy::kRowsPerThread; ++i) {
    const uint32_t number = first_pixel + PixelCopy::row(i);
    pixel_source[i] = reinterpret_cast<const unsigned char*>(p.input) + PixelCopy::byte();
    pixel_taps[i] = 0;
    if (number < pixels) {
      const Pixel at = pixel_of(number, p);
      const int64_t y = at.y - p.pad_h, x = at.x - p.pad_w;
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const int64_t tap_y = y + tap / 3 * p.dilation_h, tap_x = x + tap % 3 * p.dilation_w;
        const bool hit = tap_y >= 0 && tap_y < p.height && tap_x >= 0 && tap_x < p.width;
        pixel_taps[i] |= static_cast<uint32_t>(hit) << tap;
      }
      pixel_source[i] += (at.n * p.in_n + y * p.in_h + x * p.in_w) * static_cast<int64_t>(sizeof(T));
      my_taps |= pixel_taps[i];
    }
  }
  const int64_t weight_row_bytes = static_cast<int64_t>(p.channels) * sizeof(T);
  const int64_t weight_tap_bytes = p.out_channels * weight_row_bytes;
  const int weight_row = first_channel + ChannelCopy::row(0);
  const unsigned char* const weight_source =
      reinterpret_cast<const unsigned char*>(p.weight) + weight_row * weight_row_bytes + ChannelCopy::byte();
  uint32_t block_taps = 0;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) block_taps |= (__syncthreads_or(my_taps >> tap & 1) ? 1u : 0u) << tap;

  // 2. The main loop: for each 64 bytes of channels, for each tap that is left.
  const int iterations = __popc(block_taps) * ((channel_end - channel_begin + kChunk - 1) / kChunk);
  uint32_t taps_to_copy = block_taps;
  int channel_to_copy = channel_begin;
  auto copy_stage = [&](int slot) {
    const int tap = __ffs(taps_to_copy) - 1;
    const int64_t bytes = static_cast<int64_t>(channel_to_copy) * sizeof(T);
    const bool exists = bytes + PixelCopy::byte() < static_cast<int64_t>(channel_end) * static_cast<int64_t>(sizeof(T));
    unsigned char* const stage = ring + slot * Tile::kStageBytes;
    const int64_t tap_bytes = bytes + p.tap_offset[tap] * static_cast<int64_t>(sizeof(T));
    PixelCopy::start(
        stage, [&](int i) { return pixel_source[i] + tap_bytes; },
        [&](int i) { return exists && (pixel_taps[i] >> tap & 1); });
    const unsigned char* const tap_source = weight_source + bytes + tap * weight_tap_bytes;
    ChannelCopy::start(
        stage + Tile::kPixels * Tile::kRowBytes,
        [&](int i) { return tap_source + i * ChannelCopy::kRowStep * weight_row_bytes; },
        [&](int i) { return exists && weight_row + i * ChannelCopy::kRowStep < p.out_channels; });
    taps_to_copy &= taps_to_copy - 1;
    if (taps_to_copy == 0) {
      taps_to_copy = block_taps;
      channel_to_copy += kChunk;
    }
  };
  for (int i = 0; i < Tile::kStages - 1; ++i) {
    if (i < iterations) copy_stage(i);
    ptx::cp_async_commit();
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_pixel = warp / Tile::kWarpsAlongChannels * Tile::kWarpPixels;
  const int warp_channel = warp % Tile::kWarpsAlongChannels * Tile::kWarpChannels;
  // Where this lane's row of the fragments lies in a stage, for the first 32 bytes of it; the second 32 are at ^ 32.
  const int a_offset = swizzled<64>(warp_pixel + lane % 16, lane / 16 * 16);
  const int b_offset =
      Tile::kPixels * Tile::kRowBytes + swizzled<64>(warp_channel + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 16);
  float sum[kPixelFragments][kChannelFragments][4] = {};
  int copy_slot = Tile::kStages - 1, read_slot = 0;
  int taps_left = __popc(block_taps), channels_left = channel_end - channel_begin;
  for (int i = 0; i < iterations; ++i) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // stage i has arrived for all, and all have read stage i - 1, whose slot is filled next
    if (i + Tile::kStages - 1 < iterations) copy_stage(copy_slot);
    ptx::cp_async_commit();
    const uint32_t stage = ptx::shared_address(ring + read_slot * Tile::kStageBytes);
#pragma unroll
    for (int step = 0; step < kChunk / kStep; ++step) {
      if (step * kStep >= channels_left) break;
      uint32_t a[kPixelFragments][4], b[kChannelFragments / 2][4];
#pragma unroll
      for (int m = 0; m < kPixelFragments; ++m) {
        ptx::ldmatrix_x4(a[m], stage + (a_offset ^ (step * 32)) + m * 16 * Tile::kRowBytes);
      }
#pragma unroll
      for (int n = 0; n < kChannelFragments / 2; ++n) {
        ptx::ldmatrix_x4(b[n], stage + (b_offset ^ (step * 32)) + n * 16 * Tile::kRowBytes);
      }
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (auto& fragment : a) {
#pragma unroll
          for (uint32_t& v : fragment) v = ptx::to_tf32(v);
        }
#pragma unroll
        for (auto& fragment : b) {
#pragma unroll
          for (uint32_t& v : fragment) v = ptx::to_tf32(v);
        }
      }
#pragma unroll
      for (int m = 0; m < kPixelFragments; ++m) {
#pragma unroll
        for (int n = 0; n < kChannelFragments; ++n) {
          ptx::mma<T>(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
    copy_slot = copy_slot + 1 == Tile::kStages ? 0 : copy_slot + 1;
    read_slot = read_slot + 1 == Tile::kStages ? 0 : read_slot + 1;
    if (--taps_left == 0) {
      taps_left = __popc(block_taps);
      channels_left -= kChunk;
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // 3. Where the block's pixels lie in the output or among the partial sums; -1 past the end.
  const bool split = p.partial != nullptr, channels_last = p.out_c == 1;
  int64_t* const pixel_offset = reinterpret_cast<int64_t*>(ring + Tile::kWarps * Tile::kSliceBytes);
  for (int i = threadIdx.x; i < Tile::kPixels; i += Tile::kThreads) {
    const uint32_t number = first_pixel + i;
    int64_t offset = -1;
    if (number < pixels && split) {
      offset = static_cast<int64_t>(number) * (channels_last ? p.out_channels : 1);
    } else if (number < pixels) {
      const Pixel at = pixel_of(number, p);
      offset = at.n * p.out_n + at.y * p.out_h + at.x * p.out_w;
    }
    pixel_offset[i] = offset;
  }
  __syncthreads();

  // 4. The epilogue in float32, on the fragments; that of partial sums comes later.
  const int pair = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kChannelFragments; ++n) {
    float bias[2] = {0, 0}, scale[2] = {1, 1}, shift[2] = {0, 0};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int channel = first_channel + warp_channel + n * 8 + pair + e;
      if (channel < p.out_channels && !split) {
        if (p.bias) bias[e] = static_cast<float>(p.bias[channel]);
        if (p.scale) scale[e] = static_cast<float>(p.scale[channel]);
        if (p.shift) shift[e] = static_cast<float>(p.shift[channel]);
      }
    }
#pragma unroll
    for (int m = 0; m < kPixelFragments; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum[m][n][e] = epilogue(sum[m][n][e], bias[e % 2], scale[e % 2], shift[e % 2], p.relu && !split);
      }
    }
  }

  // 5. Through shared memory to the output, 32 pixels of the warp's tile at a time.
  unsigned char* const slice = ring + warp * Tile::kSliceBytes;
  const int channels_here = p.out_channels - first_channel - warp_channel;
  auto store = [&](auto* output, int64_t channel_stride, bool vector_stores) {
#pragma unroll
    for (int s = 0; s < Tile::kWarpPixels / Tile::kSlicePixels; ++s) {
      const int64_t* const offsets = pixel_offset + warp_pixel + s * Tile::kSlicePixels;
      if (s > 0) __syncwarp();  // all have read the slice before
      if (channels_last) {
        store_channels_last<Tile>(&sum[2 * s], slice, output, offsets, channels_here, vector_stores);
      } else {
        store_rows<Tile>(&sum[2 * s], slice, output, offsets, min(channels_here, Tile::kWarpChannels), channel_stride);
      }
    }
  };
  if (split) {
    const int64_t channel_stride = channels_last ? 1 : pixels;
    store(p.partial + (static_cast<int64_t>(blockIdx.y) * p.out_channels * pixels) +
              (first_channel + warp_channel) * channel_stride,
          channel_stride, p.out_channels % 4 == 0);
  } else {
    store(p.output + (first_channel + warp_channel) * p.out_c, p.out_c, p.vector_stores);
  }
#endif
}

constexpr int kFinishThreads = 256;

// Adds the partial sums of `splits` blocks in order, one output a thread.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    atrous_conv2d_dense_finish_kernel(const __grid_constant__ DenseParams<T> p, int splits) {
  const uint32_t pixels = p.first[3], outputs = pixels * p.out_channels;
  const uint32_t i = blockIdx.x * kFinishThreads + threadIdx.x;
  if (i >= outputs) return;
  const uint32_t number = p.out_c == 1 ? i / p.out_channels : i % pixels;
  const uint32_t channel = p.out_c == 1 ? i % p.out_channels : i / pixels;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += p.partial[static_cast<int64_t>(s) * outputs + i];
  const Pixel at = pixel_of(number, p);
  assign(p.output[at.n * p.out_n + channel * p.out_c + at.y * p.out_h + at.x * p.out_w],
         epilogue(sum, p.bias ? static_cast<float>(p.bias[channel]) : 0,
                  p.scale ? static_cast<float>(p.scale[channel]) : 1,
                  p.shift ? static_cast<float>(p.shift[channel]) : 0, p.relu));
}

}  // namespace pyseg::atrous
