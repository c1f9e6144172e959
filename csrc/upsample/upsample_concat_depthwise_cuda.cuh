// upsample_concat_depthwise and its gradient (1903.11816, figure 4 and section 3.3). Torch-free.
//
//   y[r] = scale[r] * conv_r(u, weight[r]) + shift[r], u the interpolated and concatenated maps, zero outside
//
// A block takes a tile of kTileH x kTileW pixels of kChannels channels of an image: 32 bytes of channels side by side in
// channels_last, otherwise one. A warp's lanes run along memory.
// upsample_depthwise_forward  1. u of the tile and of what the taps reach around it, into shared memory.
//                             2. For each rate nine weights in registers, nine loads from shared memory an output.
// upsample_depthwise_grad_maps  dL/du: for each rate the tile of its gradient into shared memory, then the flipped
//                             filter, added up in registers. Maps that are copied get it as their gradient, the others'
//                             is kept in accumulators for upsample_gather.
// upsample_depthwise_grad_weights  A block walks along a row of tiles: u into shared memory, products with the
//                             gradients of each rate, added over lanes and warps in a fixed order; one partial sum
//                             for each row of tiles and image, which upsample_depthwise_add_sums adds up in order.
// kShared = false: dilations whose reach does not fit into shared memory read global memory at every tap.
//
// Bytes at the least: inputs once, outputs (gradients) once; u is not stored. No atomics, deterministic.
#pragma once

#include "upsample/upsample_concat_cuda.cuh"

namespace pyseg::upsample {

constexpr int kWarps = 8, kLanes = 32;
constexpr int kTaps = 9;
constexpr int kAddThreads = 128;
constexpr int kSectorBytes = 32;

// The part of a block.
template <typename T, bool kLast>
struct Tile {
  static constexpr int kChannels = kLast ? kSectorBytes / int(sizeof(T)) : 1;
  static constexpr int kH = kLast ? 16 : 32, kW = kLast ? 16 : 64;
  static constexpr int kRowsOfThread = kH / kWarps, kColumnsOfThread = kW * kChannels / kLanes;
  static_assert(kLanes % kChannels == 0, "a thread stays with one channel");
  static_assert(kH % kWarps == 0 && kW * kChannels % kLanes == 0, "threads share a tile evenly");

  const CudaMap* map;
  int number;         // of the map
  int64_t image, c0;  // c0: of the map's channels
  int y, x;           // its first pixel
  int64_t tile_row, tile_rows;
};

inline __host__ __device__ int64_t tiles_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

// Grid: tiles along x (or 1), along y, blocks of channels, images, one after the other.
template <typename T, bool kLast>
__device__ __forceinline__ Tile<T, kLast> tile_of(const CudaDepthwiseArgs& d, unsigned tiles_x) {
  using Tiles = Tile<T, kLast>;
  const CudaUpsampleArgs& a = d.upsample;
  Tiles t;
  unsigned rest = blockIdx.x;
  t.x = int(rest % tiles_x) * Tiles::kW;
  rest /= tiles_x;
  t.tile_rows = tiles_of(a.height, Tiles::kH);
  t.tile_row = rest % unsigned(t.tile_rows);
  t.y = int(t.tile_row) * Tiles::kH;
  rest /= unsigned(t.tile_rows);
  const int64_t block = rest % unsigned(d.blocks);
  t.image = rest / unsigned(d.blocks);
  t.number = 0;
  while (t.number + 1 < a.maps && block >= a.map[t.number + 1].first_block) ++t.number;
  t.map = &a.map[t.number];
  t.c0 = (block - t.map->first_block) * Tiles::kChannels;
  return t;
}

// u at (y, x) of the output, of the channel that `from` points to.
template <typename T, typename A>
__device__ __forceinline__ A interpolated(const CudaMap& map, const T* from, const CudaTap<A>& row, int x) {
  const CudaTap<A> column = load_tap<A>(map.columns, x);
  const auto source = [&](int64_t i) {
    const T* const p = from + i * map.row_stride;
    const A low = widen(__ldg(p + column.low * map.column_stride));
    if (map.copied_columns) return low;
    const A high = widen(__ldg(p + column.high * map.column_stride));
    return (A(1) - column.weight) * low + column.weight * high;
  };
  const A low = source(row.low);
  if (map.copied_rows) return low;
  return (A(1) - row.weight) * low + row.weight * source(row.high);
}

// Values of a tile and `row_reach`, `column_reach` around it, from shared memory or from where they come from.
template <typename T, bool kLast, bool kShared, typename F>
class TileValues {
 public:
  using A = Accumulator<T>;
  using Tiles = Tile<T, kLast>;

  // value(y, x) of the thread's channel, for pixels of the map.
  __device__ TileValues(const Tiles& t, const CudaUpsampleArgs& a, int row_reach, int column_reach, A* shared,
                        const F& value)
      : value_(value),
        height_(int(a.height)),
        width_(int(a.width)),
        y0_(t.y - row_reach),
        x0_(t.x - column_reach),
        row_(kShared ? (Tiles::kW + 2 * column_reach) * Tiles::kChannels : 0),
        rows_(kShared ? Tiles::kH + 2 * row_reach : 0),
        shared_(shared) {}

  // All threads of the block; between barriers.
  __device__ void fill(bool own) const {
    if constexpr (kShared) {
      for (int i = threadIdx.y; i < rows_; i += kWarps)
        for (int f = threadIdx.x; f < row_; f += kLanes) {
          const int y = y0_ + i, x = x0_ + f / Tiles::kChannels;
          shared_[i * row_ + f] = own && on_map(y, x) ? value_(y, x) : A(0);
        }
    }
  }
  __device__ __forceinline__ A at(int y, int x) const {
    if constexpr (kShared) {
      return shared_[(y - y0_) * row_ + (x - x0_) * Tiles::kChannels + int(threadIdx.x) % Tiles::kChannels];
    } else {
      return on_map(y, x) ? value_(y, x) : A(0);
    }
  }

 private:
  __device__ bool on_map(int y, int x) const { return y >= 0 && y < height_ && x >= 0 && x < width_; }

  const F& value_;
  const int height_, width_, y0_, x0_, row_, rows_;
  A* const shared_;
};

// Calls f(k, y, x) for the thread's pixels of the tile that lie on the map; k counts all. Rolled, k is no constant.
template <bool kUnrolled, typename Tiles, typename F>
__device__ __forceinline__ void each_pixel(const Tiles& t, const CudaUpsampleArgs& a, const F& f) {
  constexpr int kPixels = Tiles::kRowsOfThread * Tiles::kColumnsOfThread;
#pragma unroll(kUnrolled ? kPixels : 1)
  for (int k = 0; k < kPixels; ++k) {
    const int y = t.y + int(threadIdx.y) + k / Tiles::kColumnsOfThread * kWarps;
    const int x = t.x + (int(threadIdx.x) + k % Tiles::kColumnsOfThread * kLanes) / Tiles::kChannels;
    if (y < a.height && x < a.width) f(k, y, x);
  }
}

// Where the pixels of a channel of an image of [.., N, C, H, W] begin, and how far apart they are.
template <bool kLast>
__device__ __forceinline__ int64_t offset_of(const CudaUpsampleArgs& a, int64_t image, int64_t channel) {
  const int64_t pixels = a.height * a.width;
  return image * a.channels * pixels + (kLast ? channel : channel * pixels);
}

template <typename T>
__device__ __forceinline__ const T* channel_of(const CudaMap& map, int64_t image, int64_t c) {
  return static_cast<const T*>(map.input) + image * map.image_stride + c * map.channel_stride;
}

template <typename T, bool kLast, bool kShared>
__global__ void __launch_bounds__(kLanes* kWarps, 2)
    upsample_depthwise_forward(const __grid_constant__ CudaDepthwiseArgs d) {
  using A = Accumulator<T>;
  using Tiles = Tile<T, kLast>;
  extern __shared__ __align__(16) unsigned char memory[];
  const CudaUpsampleArgs& a = d.upsample;
  const Tiles t = tile_of<T, kLast>(d, unsigned(tiles_of(a.width, Tiles::kW)));
  const int64_t c = t.c0 + threadIdx.x % Tiles::kChannels, channel = t.map->first_channel + c;
  const bool own = c < t.map->channels;
  const T* const from = own ? channel_of<T>(*t.map, t.image, c) : nullptr;
  const auto value = [&](int y, int x) { return interpolated<T, A>(*t.map, from, load_tap<A>(t.map->rows, y), x); };

  // 1. The interpolated maps.
  const TileValues<T, kLast, kShared, decltype(value)> u(t, a, d.row_reach, d.column_reach,
                                                         reinterpret_cast<A*>(memory), value);
  u.fill(own);
  if constexpr (kShared) __syncthreads();
  if (!own) return;

  // 2. The filters.
  const int64_t pixel = kLast ? a.channels : 1;
  for (int r = 0; r < d.rates; ++r) {
    const A* const weight = static_cast<const A*>(d.weight) + (r * a.channels + channel) * kTaps;
    const A scale = d.scale ? static_cast<const A*>(d.scale)[r * a.channels + channel] : A(1);
    const A shift = d.shift ? static_cast<const A*>(d.shift)[r * a.channels + channel] : A(0);
    A w[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) w[tap] = scale * __ldg(weight + tap);
    const int dy = d.row_dilation[r], dx = d.column_dilation[r];
    T* const to = static_cast<T*>(a.output) + offset_of<kLast>(a, r * a.images + t.image, channel);
    each_pixel<kShared>(t, a, [&](int, int y, int x) {
      A sum = shift;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) sum += w[tap] * u.at(y + (tap / 3 - 1) * dy, x + (tap % 3 - 1) * dx);
      to[(y * a.width + x) * pixel] = narrow<T>(sum);
    });
  }
}

template <typename T, bool kLast, bool kShared>
__global__ void __launch_bounds__(kLanes* kWarps, 2)
    upsample_depthwise_grad_maps(const __grid_constant__ CudaDepthwiseArgs d) {
  using A = Accumulator<T>;
  using Tiles = Tile<T, kLast>;
  extern __shared__ __align__(16) unsigned char memory[];
  const CudaUpsampleArgs& a = d.upsample;
  const Tiles t = tile_of<T, kLast>(d, unsigned(tiles_of(a.width, Tiles::kW)));
  const CudaMap& map = *t.map;
  const int64_t c = t.c0 + threadIdx.x % Tiles::kChannels, channel = map.first_channel + c;
  const bool own = c < map.channels;
  const int64_t pixel = kLast ? a.channels : 1;
  const int64_t pixels = a.height * a.width;
  const auto write = [&](int y, int x, A sum) {
    const int64_t at =
        t.image * map.channels * pixels + (kLast ? (y * a.width + x) * map.channels + c : c * pixels + y * a.width + x);
    if (map.interpolated_grad) {
      static_cast<A*>(map.interpolated_grad)[at] = sum;
    } else {
      static_cast<T*>(map.grad)[at] = narrow<T>(sum);
    }
  };
  // Calls f(weights, gradient of rate r, dilation along y, along x).
  const auto with_rate = [&](int r, const auto& f) {
    const T* const grad = static_cast<const T*>(a.grad) + offset_of<kLast>(a, r * a.images + t.image, channel);
    const auto value = [&](int y, int x) { return A(widen(__ldg(grad + (y * a.width + x) * pixel))); };
    const int dy = d.row_dilation[r], dx = d.column_dilation[r];
    const TileValues<T, kLast, kShared, decltype(value)> g(t, a, dy, dx, reinterpret_cast<A*>(memory), value);
    f(static_cast<const A*>(d.weight) + (r * a.channels + channel) * kTaps, g, dy, dx);
  };

  if constexpr (kShared) {
    A sum[Tiles::kRowsOfThread * Tiles::kColumnsOfThread] = {};
    for (int r = 0; r < d.rates; ++r)
      with_rate(r, [&](const A* weight, const auto& g, int dy, int dx) {
        __syncthreads();
        g.fill(own);
        __syncthreads();
        if (!own) return;
        A w[kTaps];
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) w[tap] = __ldg(weight + tap);
        each_pixel<true>(t, a, [&](int k, int y, int x) {
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap) sum[k] += w[tap] * g.at(y - (tap / 3 - 1) * dy, x - (tap % 3 - 1) * dx);
        });
      });
    if (own) each_pixel<true>(t, a, [&](int k, int y, int x) { write(y, x, sum[k]); });
  } else {
    if (!own) return;
    each_pixel<false>(t, a, [&](int, int y, int x) {
      A sum = 0;
      for (int r = 0; r < d.rates; ++r)
        with_rate(r, [&](const A* weight, const auto& g, int dy, int dx) {
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap)
            sum += __ldg(weight + tap) * g.at(y - (tap / 3 - 1) * dy, x - (tap % 3 - 1) * dx);
        });
      write(y, x, sum);
    });
  }
}

template <typename T, bool kLast, bool kShared>
__global__ void __launch_bounds__(kLanes* kWarps, 2)
    upsample_depthwise_grad_weights(const __grid_constant__ CudaDepthwiseArgs d) {
  using A = Accumulator<T>;
  using Tiles = Tile<T, kLast>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ A parts[kWarps][kTaps + 1][Tiles::kChannels];
  __shared__ A totals[kMostRates][kTaps + 1][Tiles::kChannels];
  const CudaUpsampleArgs& a = d.upsample;
  Tiles t = tile_of<T, kLast>(d, 1);
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  constexpr int kSums = (kTaps + 1) * Tiles::kChannels;
  static_assert(kSums <= kLanes * kWarps, "a thread adds one sum of the warps");
  const int64_t c = t.c0 + threadIdx.x % Tiles::kChannels, channel = t.map->first_channel + c;
  const bool own = c < t.map->channels;
  const T* const from = own ? channel_of<T>(*t.map, t.image, c) : nullptr;
  const auto value = [&](int y, int x) { return interpolated<T, A>(*t.map, from, load_tap<A>(t.map->rows, y), x); };
  if (thread < kSums)
    for (int r = 0; r < d.rates; ++r) (&totals[r][0][0])[thread] = A(0);

  for (; t.x < a.width; t.x += Tiles::kW) {
    // 1. The interpolated maps.
    const TileValues<T, kLast, kShared, decltype(value)> u(t, a, d.row_reach, d.column_reach,
                                                           reinterpret_cast<A*>(memory), value);
    __syncthreads();
    u.fill(own);
    __syncthreads();
    for (int r = 0; r < d.rates; ++r) {
      // 2. The thread's products.
      A sum[kTaps + 1] = {};
      if (own) {
        const int dy = d.row_dilation[r], dx = d.column_dilation[r];
        const T* const grad = static_cast<const T*>(a.grad) + offset_of<kLast>(a, r * a.images + t.image, channel);
        each_pixel<kShared>(t, a, [&](int, int y, int x) {
          const A g = widen(__ldg(grad + (y * a.width + x) * (kLast ? a.channels : 1)));
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap) sum[tap] += g * u.at(y + (tap / 3 - 1) * dy, x + (tap % 3 - 1) * dx);
          sum[kTaps] += g;
        });
      }
      // 3. Over the lanes of a channel, then over the warps.
#pragma unroll
      for (int s = 0; s <= kTaps; ++s) {
#pragma unroll
        for (int lane = kLanes / 2; lane >= Tiles::kChannels; lane /= 2) sum[s] += __shfl_xor_sync(~0u, sum[s], lane);
        if (int(threadIdx.x) < Tiles::kChannels) parts[threadIdx.y][s][threadIdx.x] = sum[s];
      }
      __syncthreads();
      if (thread < kSums) {
        A total = (&totals[r][0][0])[thread];
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += (&parts[warp][0][0])[thread];
        (&totals[r][0][0])[thread] = total;
      }
      __syncthreads();
    }
  }

  // 4. [N * rows of tiles, R, 10, C]
  if (thread >= kSums) return;
  const int64_t s = thread / Tiles::kChannels, k = t.c0 + thread % Tiles::kChannels;
  if (k >= t.map->channels) return;
  const int64_t row = t.image * t.tile_rows + t.tile_row;
  for (int r = 0; r < d.rates; ++r)
    static_cast<A*>(d.sums)[((row * d.rates + r) * (kTaps + 1) + s) * a.channels + t.map->first_channel + k] =
        (&totals[r][0][0])[thread];
}

// Grid: R x 10 x C. sums: [parts, R, 10, C]
template <typename A>
__global__ void __launch_bounds__(kAddThreads)
    upsample_depthwise_add_sums(const A* sums, int64_t parts, int64_t rates, int64_t channels,
                                A* weight /* [R, C, 9] */, A* shift /* [R, C] */) {
  const int64_t size = rates * (kTaps + 1) * channels, i = int64_t(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= size) return;
  A total = 0;
  for (int64_t part = 0; part < parts; ++part) total += sums[part * size + i];
  const int64_t c = i % channels, s = i / channels % (kTaps + 1), r = i / channels / (kTaps + 1);
  if (s < kTaps) {
    weight[(r * channels + c) * kTaps + s] = total;
  } else {
    shift[r * channels + c] = total;
  }
}

}  // namespace pyseg::upsample
