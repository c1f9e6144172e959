// Weight gradient of the dense 3x3 atrous convolution, stride 1, on channels-last maps:
//   dW[co, ci, ky, kx] = sum over n, oy, ox of g[n, oy, ox, co] * x[n, oy - pad_h + ky * dh, ox - pad_w + kx * dw, ci]
//
// One matrix product per tap, C_out x C_in, whose inner dimension runs over the output pixels that find an input inside
// the map at this tap, and over no others: a tap that misses the map costs nothing. The pixels of a tap are cut into
// splits; a block computes a kTile x kTile piece of one split's product and writes it to a workspace, a second kernel
// adds the splits in a fixed order: deterministic, no atomics. The number of splits depends on shapes alone.
// Both operands come with the inner dimension slow (pixels) and channels contiguous, and go to shared memory so, 16 bytes
// a copy; the transposition happens on the way to registers (ldmatrix.trans; for tf32 plain 4-byte loads).
// At the least each operand is read once per tap and tile of the other; the workspace is written and read once.
// atrous_conv2d_wgrad_tensor_cores: mma.sync with half, bfloat16, or float32 rounded to tf32; channels in multiples of 16 bytes.
// atrous_conv2d_wgrad_plain: any element type, any number of channels, any device.
#pragma once

#include "../common/ptx.cuh"
#include "atrous_conv2d_cuda.h"
#include "atrous_conv2d_elements.cuh"

namespace pyseg::atrous {

constexpr int kWgradTaps = 9;

// The output pixels that one tap sums over, and their splits.
struct WgradTap {
  int top, left, height, width;  // window of the output whose inputs at this tap are inside the map
  int pixels;                    // batch * height * width
  int first_split, splits;       // among the splits of all taps
  int split_pixels;              // of each split but perhaps the last
};

template <typename T>
struct WgradArgs {
  const T* input;           // [N, H, W, C_in], strides below
  const T* grad_output;     // [N, OH, OW, C_out]
  Accumulator<T>* partial;  // [splits of all taps, C_out, C_in]
  int64_t input_n, input_h, input_w, grad_n, grad_h, grad_w;
  int in_channels, out_channels;
  int pad_h, pad_w, dilation_h, dilation_w;
  bool aligned;  // plain kernel: four channels of either map can travel together
  WgradTap taps[kWgradTaps];
};

__device__ __forceinline__ int wgrad_tap_of(const WgradTap (&taps)[kWgradTaps], int split) {
  int tap = 0;
  while (split >= taps[tap].first_split + taps[tap].splits) ++tap;
  return tap;
}

// A pixel of a tap's window that moves on by a fixed number of pixels without dividing: a number with the digits n, y, x.
struct WgradPixel {
  int n, y, x;  // counted from the window's corner

  __device__ __forceinline__ WgradPixel(const WgradTap& tap, int index) {
    const int line = index / tap.width;
    x = index - line * tap.width;
    n = line / tap.height;
    y = line - n * tap.height;
  }

  __device__ __forceinline__ void advance(const WgradTap& tap, const WgradPixel& by) {
    x += by.x;
    const int carry_x = x >= tap.width;
    x -= carry_x ? tap.width : 0;
    y += by.y + carry_x;
    const int carry_y = y >= tap.height;
    y -= carry_y ? tap.height : 0;
    n += by.n + carry_y;
  }
};

// Where a block's split starts and ends, and the maps as seen from its tap's window.
template <typename T>
struct WgradSplit {
  int first, end;        // pixels of the window
  const T* input;        // at the window's corner, shifted by the tap
  const T* grad_output;  // at the window's corner

  __device__ __forceinline__ WgradSplit(const WgradArgs<T>& args, const WgradTap& tap, int number, int split) {
    first = (split - tap.first_split) * tap.split_pixels;
    end = min(first + tap.split_pixels, tap.pixels);
    const int ky = number / 3, kx = number - ky * 3;
    input = args.input + (tap.top - args.pad_h + ky * args.dilation_h) * args.input_h +
            (tap.left - args.pad_w + kx * args.dilation_w) * args.input_w;
    grad_output = args.grad_output + tap.top * args.grad_h + tap.left * args.grad_w;
  }
};

// --- Tensor cores.

constexpr int kWgradStages = 3;       // shared-memory buffers: two in flight while one is used
constexpr int kWgradInnerBytes = 64;  // of pixels x element: 32 pixels of 16 bits, 16 of 32 bits
constexpr int kWgradPadding = 8;      // elements between rows of shared memory, see below

// A kTile x kTile piece by warps of kWarpM x 32.
template <typename T, int kTile_>
struct WgradTile {
  static constexpr int kTile = kTile_;
  static constexpr int kPixels = kWgradInnerBytes / sizeof(T);
  static constexpr int kWarpM = kTile / 2;
  static constexpr int kWarpN = 32;
  static constexpr int kWarpsN = kTile / kWarpN;
  static constexpr int kThreads = (kTile / kWarpM) * kWarpsN * 32;
  static constexpr int kPitch = kTile + kWgradPadding;
  static constexpr int kOperand = kPixels * kPitch;  // elements of one operand of one stage
  static constexpr int kSharedBytes = kWgradStages * 2 * kOperand * sizeof(T);
  static constexpr int kVector = kVectorBytes / sizeof(T);
  static constexpr int kVectorsInRow = kTile / kVector;
  static constexpr int kRowsAtOnce = kThreads / kVectorsInRow;
  static constexpr int kRowsOfThread = kPixels / kRowsAtOnce;
  static_assert(kPixels % kRowsAtOnce == 0, "every thread copies the same number of vectors");
  // 16 bits: ldmatrix reads 8 rows of 16 bytes; rows 16 bytes further along the banks each fill all 32 banks.
  // 32 bits: a warp reads 8 neighbours from 4 rows; rows 8 banks further each fill all 32 banks.
  static_assert(sizeof(T) == 2 ? kPitch * sizeof(T) % 128 == 16 : kPitch % 32 == 8, "conflict-free rows");
  static_assert(kPitch * sizeof(T) % kVectorBytes == 0, "cp.async and ldmatrix want aligned rows");
};

// Fragments of one step of the inner dimension: 32 bytes of pixels, that is 16 or 8 of them.
template <typename T>
struct WgradFragments {
  static constexpr int kInner = 32 / sizeof(T);

  // a[16, kInner] at channels [m, m + 16) of rows [0, kInner) of `rows`.
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* rows, int pitch, int m, int lane) {
    if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix_x4_trans(a, ptx::shared_address(rows + (lane / 16 * 8 + lane % 8) * pitch + m + lane / 8 % 2 * 8));
    } else {
      const T* from = rows + lane % 4 * pitch + m + lane / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = ptx::to_tf32(__float_as_uint(from[i / 2 * 4 * pitch + i % 2 * 8]));
    }
  }

  // Two b[kInner, 8] beside each other, at channels [n, n + 16): b[0], b[1] are the left one's, b[2], b[3] the right's.
  static __device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* rows, int pitch, int n, int lane) {
    if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix_x4_trans(b, ptx::shared_address(rows + lane % 16 * pitch + n + lane / 16 * 8));
    } else {
      const T* from = rows + lane % 4 * pitch + n + lane / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = ptx::to_tf32(__float_as_uint(from[i % 2 * 4 * pitch + i / 2 * 8]));
    }
  }
};

// Grid: (tiles of C_in, tiles of C_out, splits of all taps).
template <typename T, int kTile>
__global__ void __launch_bounds__(WgradTile<T, kTile>::kThreads, 2)
    atrous_conv2d_wgrad_tensor_cores(const __grid_constant__ WgradArgs<T> args) {
  using Tile = WgradTile<T, kTile>;
  extern __shared__ uint4 shared_raw[];
  T* const shared = reinterpret_cast<T*>(shared_raw);  // [kWgradStages, 2 operands, kPixels, kPitch]

  // 1. The split and its tap.
  const int number = wgrad_tap_of(args.taps, blockIdx.z);
  const WgradTap& tap = args.taps[number];
  const WgradSplit<T> split(args, tap, number, blockIdx.z);
  const int first_co = blockIdx.y * kTile, first_ci = blockIdx.x * kTile;

  // 2. What this thread copies: one vector of channels of kRowsOfThread pixels of both operands, per stage.
  const int vector = threadIdx.x % Tile::kVectorsInRow;
  const int row = threadIdx.x / Tile::kVectorsInRow;
  const int co = first_co + vector * Tile::kVector, ci = first_ci + vector * Tile::kVector;
  const bool has_co = co < args.out_channels, has_ci = ci < args.in_channels;
  const uint32_t copy_to = ptx::shared_address(shared + row * Tile::kPitch + vector * Tile::kVector);
  const WgradPixel stride(tap, Tile::kRowsAtOnce);
  WgradPixel pixel(tap, split.first + row);
  int index = split.first + row;
  const auto copy = [&](int stage) {
    const uint32_t to = copy_to + stage * 2 * Tile::kOperand * sizeof(T);
#pragma unroll
    for (int i = 0; i < Tile::kRowsOfThread; ++i) {
      const bool live = index < split.end;
      const T* g = split.grad_output + pixel.n * args.grad_n + pixel.y * args.grad_h + pixel.x * args.grad_w + co;
      const T* x = split.input + pixel.n * args.input_n + pixel.y * args.input_h + pixel.x * args.input_w + ci;
      const bool has_g = live && has_co, has_x = live && has_ci;
      const uint32_t at = to + i * Tile::kRowsAtOnce * Tile::kPitch * sizeof(T);
      ptx::cp_async_16(at, has_g ? g : args.grad_output, has_g);
      ptx::cp_async_16(at + Tile::kOperand * sizeof(T), has_x ? x : args.input, has_x);
      pixel.advance(tap, stride);
      index += Tile::kRowsAtOnce;
    }
    ptx::cp_async_commit();
  };

  // 3. The product, with kWgradStages - 1 stages of copies ahead of it.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / Tile::kWarpsN * Tile::kWarpM, warp_n = warp % Tile::kWarpsN * Tile::kWarpN;
  float sums[Tile::kWarpM / 16][Tile::kWarpN / 8][4] = {};
#pragma unroll
  for (int stage = 0; stage < kWgradStages - 1; ++stage) copy(stage);  // past the end: zeros
  int stage = 0, free_stage = kWgradStages - 1;
  for (int first = split.first; first < split.end; first += Tile::kPixels) {
    ptx::cp_async_wait<kWgradStages - 2>();
    __syncthreads();  // this stage has arrived for all, and nobody still reads the one that is copied to next
    copy(free_stage);
    const T* rows = shared + stage * 2 * Tile::kOperand;
#pragma unroll
    for (int k = 0; k < Tile::kPixels;
         k += WgradFragments<T>::kInner, rows += WgradFragments<T>::kInner * Tile::kPitch) {
      uint32_t b[Tile::kWarpN / 16][4];
#pragma unroll
      for (int j = 0; j < Tile::kWarpN / 16; ++j) {
        WgradFragments<T>::load_b(b[j], rows + Tile::kOperand, Tile::kPitch, warp_n + 16 * j, lane);
      }
#pragma unroll
      for (int i = 0; i < Tile::kWarpM / 16; ++i) {
        uint32_t a[4];
        WgradFragments<T>::load_a(a, rows, Tile::kPitch, warp_m + 16 * i, lane);
#pragma unroll
        for (int j = 0; j < Tile::kWarpN / 8; ++j) {
          ptx::mma<T>(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    stage = stage + 1 == kWgradStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == kWgradStages ? 0 : free_stage + 1;
  }
  ptx::cp_async_wait<0>();  // no copy outlives the block

  // 4. Partial sums out: four lanes fill a 32-byte sector. C_in is even.
  float* partial = args.partial + int64_t{blockIdx.z} * args.out_channels * args.in_channels;
#pragma unroll
  for (int i = 0; i < Tile::kWarpM / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kWarpN / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = first_co + warp_m + 16 * i + 8 * half + lane / 4;
        const int c = first_ci + warp_n + 8 * j + lane % 4 * 2;
        if (k < args.out_channels && c < args.in_channels) {
          *reinterpret_cast<float2*>(partial + int64_t{k} * args.in_channels + c) =
              make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }
}

// --- Plain.

constexpr int kWgradPlainTile = 64;
constexpr int kWgradPlainPixels = 16;
constexpr int kWgradPlainThreads = 256;
static_assert(kWgradPlainThreads * 4 == kWgradPlainTile * kWgradPlainPixels,
              "a thread copies four channels of a pixel");
static_assert(kWgradPlainThreads * 16 == kWgradPlainTile * kWgradPlainTile, "a thread sums 4 x 4 weights");

// Grid as above. A thread sums 4 x 4 weights from two buffers of shared memory; the next pixels' loads are under way
// during the sums.
template <typename T>
__global__ void __launch_bounds__(kWgradPlainThreads)
    atrous_conv2d_wgrad_plain(const __grid_constant__ WgradArgs<T> args) {
  using Acc = Accumulator<T>;
  __shared__ Quad<Acc> shared[2][2][kWgradPlainPixels][kWgradPlainTile / 4];  // [buffer, operand, pixel, channels]
  static_assert(sizeof(shared) <= 48 * 1024, "static shared memory ends there");

  // 1. The split and its tap.
  const int number = wgrad_tap_of(args.taps, blockIdx.z);
  const WgradTap& tap = args.taps[number];
  const WgradSplit<T> split(args, tap, number, blockIdx.z);
  const int first_co = blockIdx.y * kWgradPlainTile, first_ci = blockIdx.x * kWgradPlainTile;

  // 2. What this thread copies: four channels of one pixel of both operands.
  const int quad = threadIdx.x % 16, row = threadIdx.x / 16;
  const int co = first_co + quad * 4, ci = first_ci + quad * 4;
  const WgradPixel stride(tap, kWgradPlainPixels);
  WgradPixel pixel(tap, split.first + row);
  int index = split.first + row;
  Quad<Acc> next_g, next_x;
  const auto load = [&] {
    const bool live = index < split.end;
    const T* g = split.grad_output + pixel.n * args.grad_n + pixel.y * args.grad_h + pixel.x * args.grad_w + co;
    const T* x = split.input + pixel.n * args.input_n + pixel.y * args.input_h + pixel.x * args.input_w + ci;
    next_g = load_quad(g, live ? args.out_channels - co : 0, args.aligned);
    next_x = load_quad(x, live ? args.in_channels - ci : 0, args.aligned);
    pixel.advance(tap, stride);
    index += kWgradPlainPixels;
  };

  // 3. The sums.
  const int m = threadIdx.x / 16, n = threadIdx.x % 16;
  Acc sums[4][4] = {};
  int buffer = 0;
  load();
  for (int first = split.first; first < split.end; first += kWgradPlainPixels) {
    shared[buffer][0][row][quad] = next_g;
    shared[buffer][1][row][quad] = next_x;
    __syncthreads();  // two buffers: whoever still reads the other one has not passed this barrier's successor
    load();
#pragma unroll
    for (int k = 0; k < kWgradPlainPixels; ++k) {
      const Quad<Acc> a = shared[buffer][0][k][m], b = shared[buffer][1][k][n];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a.at[i] * b.at[j];
      }
    }
    buffer ^= 1;
  }

  // 4. Partial sums out.
  Acc* partial = args.partial + int64_t{blockIdx.z} * args.out_channels * args.in_channels;
  const bool vectors = args.in_channels % 4 == 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = first_co + m * 4 + i, c = first_ci + n * 4;
    if (k >= args.out_channels) break;
    store_quad(partial + int64_t{k} * args.in_channels + c, sums[i], args.in_channels - c, vectors);
  }
}

// --- The sum over the splits.

constexpr int kWgradReduceWeights = 32;

// out[i, tap] = sum over the tap's splits of partial[split, i], in order. Block: (kWgradReduceWeights, taps).
template <typename T>
__global__ void __launch_bounds__(kWgradReduceWeights* kWgradTaps)
    atrous_conv2d_wgrad_reduce(const __grid_constant__ WgradArgs<T> args,
                               T* __restrict__ out,  // [C_out, C_in, 3, 3]
                               int64_t count) {      // C_out * C_in
  __shared__ Accumulator<T> turned[kWgradReduceWeights * kWgradTaps];
  const int64_t first = int64_t{blockIdx.x} * kWgradReduceWeights;
  const int64_t i = first + threadIdx.x;
  const WgradTap& tap = args.taps[threadIdx.y];
  Accumulator<T> sum = 0;
  if (i < count) {
#pragma unroll 4
    for (int split = 0; split < tap.splits; ++split) sum += args.partial[(tap.first_split + split) * count + i];
  }
  turned[threadIdx.x * kWgradTaps + threadIdx.y] = sum;
  __syncthreads();
  const int at = threadIdx.y * kWgradReduceWeights + threadIdx.x;
  if (first * kWgradTaps + at < count * kWgradTaps) out[first * kWgradTaps + at] = narrow<T>(turned[at]);
}

}  // namespace pyseg::atrous
