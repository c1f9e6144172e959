// valve_conv2d, region_gate and their gradients (Eppel 2017, 1708.08711; formula in valve_conv2d_math.h).
// Torch-free.
//
// A block takes a tile of kM lines x kN elements of an image's output: channels x pixels, or in channels_last pixels x
// channels; elements lie side by side in memory, and a thread has kRows x kVec of them, 16 bytes a row.
//   1. Columns of both windows, each followed by ones whose weight is the bias, and their weights come into shared
//      memory, kChunk at a time. Each side of the products is [column][line or element].
//   2. The tile's convolutions, in registers: of the region, and of the image or its features from memory.
//   3. forward: y. backward: gradients of both factors; that of the features to memory, both by turns into shared
//      memory, where sums over pixels (the weights' gradients, kept in registers over all tiles of the block) and over
//      channels (the gradient of the region's columns, which valve_gather_region brings to the region) are made of them.
// Bytes at the least: features and gradients read once, outputs written once; no convolution is stored. Sums of blocks
// are added in order by valve_add_sums. No atomics, deterministic.
#pragma once

#include "common/divide_cuda.cuh"
#include "conv/atrous_conv2d_elements.cuh"
#include "conv/valve_conv2d_math.h"

namespace pyseg::valve {

using atrous::kVectorBytes;
using atrous::Vector;

constexpr int kThreads = 256;

template <typename T>
struct Tile {
  using A = Accumulator<T>;
  static constexpr bool kWide = sizeof(A) == 8;
  static constexpr int kM = kWide ? 32 : 64, kN = 64;
  static constexpr int kVec = kVectorBytes / int(sizeof(T));
  static constexpr int kGroups = kN / kVec;  // threads along a line
  static constexpr int kRows = kM * kN / kThreads / kVec;
  static constexpr int kChunk = kWide ? 16 : 56;  // columns in shared memory: with the tile below 48 KB
  static constexpr int kSlots = kWide ? 4 : 14;   // sums of a thread
  static constexpr int kStep = kVectorBytes / int(sizeof(A));
  static constexpr int kPitchM = kM + kStep, kPitchN = kN + kStep;  // whole vectors
  static constexpr int kPitchTile = kN + 1;                         // no bank conflicts along either axis
  static_assert(kRows * kThreads / kGroups == kM, "threads share the tile evenly");
  static_assert(kSlots * (kThreads / kN) == kChunk, "the block's threads have a sum of each channel and column");
};

template <typename T>
constexpr int shared_bytes(int64_t columns, bool backward) {
  using Tiles = Tile<T>;
  const int rows = columns < Tiles::kChunk ? int(columns) : Tiles::kChunk;
  const int sides = rows * (Tiles::kPitchM + Tiles::kPitchN);
  return (sides + (backward ? Tiles::kM * Tiles::kPitchTile : 0)) * int(sizeof(Accumulator<T>));
}

// Pixels and channels of a tile.
struct Part {
  int64_t image, pixel, channel;  // the first
  int pixels, channels;           // how many there are
};

inline __host__ __device__ int64_t tiles_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

template <typename T>
class ValveTile {
 public:
  using A = Accumulator<T>;
  using Tiles = Tile<T>;
  using Values = A[Tiles::kRows][Tiles::kVec];

  __device__ ValveTile(const Maps& m, A* shared)
      : m_(m),
        columns_(int(m.region.taps + 1 + (m.image.map ? m.image.taps + 1 : 0))),
        region_columns_(int(m.region.taps) + 1),
        kept_(columns_ < Tiles::kChunk ? columns_ : Tiles::kChunk),
        m_side_(shared),
        n_side_(shared + kept_ * Tiles::kPitchM),
        tile_(n_side_ + kept_ * Tiles::kPitchN),
        line_(int(threadIdx.x) / Tiles::kGroups * Tiles::kRows),
        element_(int(threadIdx.x) % Tiles::kGroups * Tiles::kVec) {}

  __device__ int columns() const { return columns_; }
  __device__ int region_columns() const { return region_columns_; }
  __device__ int line() const { return line_; }
  __device__ int element() const { return element_; }
  __device__ int pixels_of_tile() const { return m_.last ? Tiles::kM : Tiles::kN; }
  __device__ int channels_of_tile() const { return m_.last ? Tiles::kN : Tiles::kM; }

  // `tile` of all pixels of all images.
  __device__ Part part(int64_t tile, int64_t channel_tile) const {
    const int64_t pixels = m_.height * m_.width;
    int64_t rest;
    const int64_t image = divide(tile, tiles_of(pixels, pixels_of_tile()), &rest);
    const int64_t pixel = rest * pixels_of_tile(), channel = channel_tile * channels_of_tile();
    return {image, pixel, channel, int(min(int64_t(pixels_of_tile()), pixels - pixel)),
            int(min(int64_t(channels_of_tile()), m_.channels - channel))};
  }

  // Columns and weights begin .. end - 1 of both windows into shared memory; between barriers.
  __device__ void fill_columns(const Part& p, int begin, int end) const {
    A* const side = m_.last ? m_side_ : n_side_;
    const int pitch = m_.last ? Tiles::kPitchM : Tiles::kPitchN;
    fill_columns_of(m_.region, p, begin, min(end, region_columns_), side, pitch);
    const int first = max(begin, region_columns_);
    fill_columns_of(m_.image, p, first - region_columns_, end - region_columns_, side + (first - begin) * pitch, pitch);
  }
  __device__ void fill_weights(const Part& p, int begin, int end) const {
    A* const side = m_.last ? n_side_ : m_side_;
    const int pitch = m_.last ? Tiles::kPitchN : Tiles::kPitchM;
    for (int i = threadIdx.x; i < (end - begin) * channels_of_tile(); i += kThreads) {
      const int k = i % channels_of_tile(), column = begin + i / channels_of_tile();
      const bool of_region = column < region_columns_;
      const Window& w = of_region ? m_.region : m_.image;
      const int t = of_region ? column : column - region_columns_;
      A value = A(0);
      if (k < p.channels) {
        const int64_t channel = p.channel + k;
        if (t < w.taps) {
          value = A(widen(static_cast<const T*>(w.weight)[channel * w.taps + t]));
        } else if (w.bias) {
          value = A(widen(static_cast<const T*>(w.bias)[channel]));
        }
      }
      side[(column - begin) * pitch + k] = value;
    }
  }

  // Adds the products of columns begin .. end - 1, of which `first` is the first in shared memory.
  __device__ void add_products(int begin, int end, int first, Values& sums) const {
    for (int c = begin - first; c < end - first; ++c) {
      A lines[Tiles::kRows], elements[Tiles::kVec];
#pragma unroll
      for (int i = 0; i < Tiles::kRows; ++i) lines[i] = m_side_[c * Tiles::kPitchM + line_ + i];
#pragma unroll
      for (int j = 0; j < Tiles::kVec; j += Tiles::kStep) {
        const auto v = Vector<A, Tiles::kStep>::load(n_side_ + c * Tiles::kPitchN + element_ + j);
#pragma unroll
        for (int s = 0; s < Tiles::kStep; ++s) elements[j + s] = v.at[s];
      }
#pragma unroll
      for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
        for (int j = 0; j < Tiles::kVec; ++j) sums[i][j] += lines[i] * elements[j];
    }
  }

  // Both convolutions. *filled: whether shared memory already holds the weights, all of them.
  __device__ void convolve(const Part& p, bool* filled, Values& gate, Values& features) const {
    for (int begin = 0; begin < columns_; begin += Tiles::kChunk) {
      const int end = min(columns_, begin + Tiles::kChunk);
      __syncthreads();
      fill_columns(p, begin, end);
      if (!*filled) fill_weights(p, begin, end);
      __syncthreads();
      add_products(begin, min(end, region_columns_), begin, gate);
      add_products(max(begin, region_columns_), end, begin, features);
    }
    *filled = columns_ <= Tiles::kChunk;
  }

  // Calls f(i, from, count) for the thread's lines of a map; from: its kVec elements, of which `count` exist.
  template <typename F>
  __device__ void each_line(const Part& p, const Lines& lines, const F& f) const {
    const int all = m_.last ? p.pixels : p.channels, length = m_.last ? p.channels : p.pixels;
    const int64_t line = m_.last ? p.pixel : p.channel, element = m_.last ? p.channel : p.pixel;
    const int count = min(Tiles::kVec, length - element_);
#pragma unroll
    for (int i = 0; i < Tiles::kRows; ++i)
      if (line_ + i < all && count > 0)
        f(i,
          static_cast<T*>(lines.data) + p.image * lines.image_stride + (line + line_ + i) * lines.line_stride +
              element + element_,
          count);
  }

  // Elements that do not exist stay as they are.
  __device__ void load(const Part& p, const Lines& lines, Values& values) const {
    const bool aligned = is_aligned(lines);
    each_line(p, lines, [&](int i, const T* from, int count) {
      if (aligned && count == Tiles::kVec) {
        const auto v = Vector<T, Tiles::kVec>::load(from);
#pragma unroll
        for (int j = 0; j < Tiles::kVec; ++j) values[i][j] = A(widen(v.at[j]));
      } else {
#pragma unroll
        for (int j = 0; j < Tiles::kVec; ++j)
          if (j < count) values[i][j] = A(widen(from[j]));
      }
    });
  }
  __device__ void store(const Part& p, const Lines& lines, const Values& values) const {
    const bool aligned = is_aligned(lines);
    each_line(p, lines, [&](int i, T* to, int count) {
      if (aligned && count == Tiles::kVec) {
        Vector<T, Tiles::kVec> v;
#pragma unroll
        for (int j = 0; j < Tiles::kVec; ++j) v.at[j] = narrow<T>(values[i][j]);
        v.store(to);
      } else {
#pragma unroll
        for (int j = 0; j < Tiles::kVec; ++j)
          if (j < count) to[j] = narrow<T>(values[i][j]);
      }
    });
  }

  // The block's values into shared memory; between barriers.
  __device__ void share(const Values& values) const {
#pragma unroll
    for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Tiles::kVec; ++j) tile_[(line_ + i) * Tiles::kPitchTile + element_ + j] = values[i][j];
  }

  // Sums over the tile's pixels (kOverPixels; a thread has one channel) or channels (one pixel) of the shared values
  // times columns (times weights): slot i is of column group + i * groups of those in shared memory, for begin <= i <
  // end.
  template <bool kOverPixels>
  __device__ void add_over(int begin, int end, A (&sums)[Tiles::kSlots]) const {
    const bool lines = kOverPixels == m_.last;  // what is summed over
    const int along = lines ? Tiles::kPitchTile : 1, across = lines ? 1 : Tiles::kPitchTile;
    const int steps = lines ? Tiles::kM : Tiles::kN, lanes = lines ? Tiles::kN : Tiles::kM;
    const int pitch = lines ? Tiles::kPitchM : Tiles::kPitchN;
    const A* const rows = (lines ? m_side_ : n_side_) + int(threadIdx.x) / lanes * pitch;
    const int next = kThreads / lanes * pitch;
    const A* from = tile_ + int(threadIdx.x) % lanes * across;
    for (int s = 0; s < steps; s += Tiles::kStep, from += Tiles::kStep * along) {
      A values[Tiles::kStep];
#pragma unroll
      for (int j = 0; j < Tiles::kStep; ++j) values[j] = from[j * along];
#pragma unroll
      for (int i = 0; i < Tiles::kSlots; ++i) {
        if (i >= end) break;
        if (i < begin) continue;
        const auto factors = Vector<A, Tiles::kStep>::load(rows + i * next + s);
#pragma unroll
        for (int j = 0; j < Tiles::kStep; ++j) sums[i] += values[j] * factors.at[j];
      }
    }
  }

 private:
  __device__ void fill_columns_of(const Window& w, const Part& p, int begin, int end, A* side, int pitch) const {
    if (begin >= end) return;
    const int width = pixels_of_tile(), own = int(threadIdx.x) % width, step = kThreads / width;
    const bool exists = own < p.pixels;
    int64_t x;
    const int64_t y = divide(p.pixel + own, m_.width, &x);
    const int top = int(y * w.stride_y - w.padding_y), left = int(x * w.stride_x - w.padding_x);
    const T* const map = static_cast<const T*>(w.map) + p.image * w.image_stride;
    const int window = int(w.kernel_height * w.kernel_width), kernel_width = int(w.kernel_width);
    for (int t = begin + int(threadIdx.x) / width; t < end; t += step) {
      A value = A(0);
      if (t == w.taps) {
        value = A(1);
      } else if (exists) {
        const int c = t / window, tap = t - c * window, u = tap / kernel_width, v = tap - u * kernel_width;
        const int64_t row = top + u * w.dilation_y, column = left + v * w.dilation_x;
        if (row >= 0 && row < w.height && column >= 0 && column < w.width)
          value = A(widen(map[c * w.channel_stride + row * w.row_stride + column * w.column_stride]));
      }
      side[(t - begin) * pitch + own] = value;
    }
  }

  static __device__ bool is_aligned(const Lines& lines) {
    constexpr int64_t kSize = sizeof(T);
    return (reinterpret_cast<uintptr_t>(lines.data) | uintptr_t(lines.image_stride * kSize) |
            uintptr_t(lines.line_stride * kSize)) %
               kVectorBytes ==
           0;
  }

  const Maps& m_;
  const int columns_, region_columns_, kept_;
  A *const m_side_, *const n_side_, *const tile_;
  const int line_, element_;
};

template <typename A>
__device__ __forceinline__ A combined(bool additive, A f, A r) {
  return additive ? f + r : f * r;
}

// Grid: tiles of channels, of pixels, images, one after the other.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) valve_forward(const __grid_constant__ Maps m) {
  using A = Accumulator<T>;
  using Tiles = Tile<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  const ValveTile<T> tile(m, reinterpret_cast<A*>(memory));
  int64_t channel_tile;
  const int64_t pixel_tile = divide(blockIdx.x, tiles_of(m.channels, tile.channels_of_tile()), &channel_tile);
  const Part p = tile.part(pixel_tile, channel_tile);
  typename ValveTile<T>::Values gate = {}, features = {};
  bool filled = false;
  tile.convolve(p, &filled, gate, features);
  if (!m.image.map) tile.load(p, m.features, features);
#pragma unroll
  for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Tiles::kVec; ++j) {
      const A y = combined(m.additive, features[i][j], gate[i][j]);
      gate[i][j] = m.relu && y < 0 ? A(0) : y;  // a NaN stays
    }
  tile.store(p, m.output, gate);
}

// Grid: (tiles of channels, parts) x chunks of columns whose sums are made. A block takes every `parts`-th tile of
// pixels.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) valve_backward(const __grid_constant__ Maps m) {
  using A = Accumulator<T>;
  using Tiles = Tile<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  const ValveTile<T> tile(m, reinterpret_cast<A*>(memory));
  int64_t channel_tile;
  const int64_t part = divide(blockIdx.x, tiles_of(m.channels, tile.channels_of_tile()), &channel_tile);
  const int64_t pixels = m.height * m.width, tiles = m.images * tiles_of(pixels, tile.pixels_of_tile());
  const int columns = tile.columns(), region_columns = tile.region_columns();
  const int begin = int(blockIdx.y) * Tiles::kChunk, end = min(columns, begin + Tiles::kChunk);

  // Sums over pixels: of the thread's channel and of columns begin + group + i * groups; slots below `of_region` are the
  // region's.
  const int own_channel = int(threadIdx.x) % tile.channels_of_tile();
  const int group = int(threadIdx.x) / tile.channels_of_tile(), groups = kThreads / tile.channels_of_tile();
  const auto slots_before = [&](int column) {
    const int n = column - begin - group;
    return n > 0 ? min((n + groups - 1) / groups, Tiles::kSlots) : 0;
  };
  const int of_region = slots_before(min(end, region_columns)), slots = slots_before(end);
  A sums[Tiles::kSlots] = {};
  bool filled = false;

  for (int64_t t = part; t < tiles; t += m.parts) {
    const Part p = tile.part(t, channel_tile);
    // 1. Gradients of both factors; zeros where the tile has no elements. The factors come first, each in the place of
    // the other's gradient.
    typename ValveTile<T>::Values of_gate = {}, of_features = {}, grad = {};
    tile.convolve(p, &filled, of_features, of_gate);
    if (!m.image.map) tile.load(p, m.features, of_gate);
    tile.load(p, m.grad, grad);
    const int lines = m.last ? p.pixels : p.channels, length = m.last ? p.channels : p.pixels;
#pragma unroll
    for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Tiles::kVec; ++j) {
        const bool exists = tile.line() + i < lines && tile.element() + j < length;
        const A f = of_gate[i][j], r = of_features[i][j];
        const A g = !exists || (m.relu && combined(m.additive, f, r) <= 0) ? A(0) : grad[i][j];
        of_gate[i][j] = !exists ? A(0) : m.additive ? g : g * f;
        of_features[i][j] = !exists ? A(0) : m.additive ? g : g * r;
      }
    if (m.features_grad.data && blockIdx.y == 0) tile.store(p, m.features_grad, of_features);
    if (!m.sums && !m.scattered) continue;

    // 2. Sums of the gate's gradient.
    __syncthreads();
    tile.share(of_gate);
    if (m.sums && columns > Tiles::kChunk) tile.fill_columns(p, begin, end);
    __syncthreads();
    if (m.sums) tile.template add_over<true>(0, of_region, sums);
    if (m.scattered && blockIdx.y == 0) {
      const int own_pixel = int(threadIdx.x) % tile.pixels_of_tile();
      const int first = int(threadIdx.x) / tile.pixels_of_tile(), step = kThreads / tile.pixels_of_tile();
      for (int c = 0; c < region_columns - 1; c += Tiles::kChunk) {
        const int n = min(region_columns - 1 - c, Tiles::kChunk);
        if (!filled) {
          __syncthreads();
          tile.fill_weights(p, c, c + n);
          __syncthreads();
        }
        // With more lanes than channels have, a thread has fewer slots.
        A scattered[Tiles::kSlots] = {};
        const int own = n > first ? min((n - first + step - 1) / step, Tiles::kSlots) : 0;
        tile.template add_over<false>(0, own, scattered);
        A* const to = static_cast<A*>(m.scattered) + (channel_tile * m.images + p.image) * m.region.taps * pixels;
#pragma unroll
        for (int i = 0; i < Tiles::kSlots; ++i)
          if (i < own && own_pixel < p.pixels) to[(c + first + i * step) * pixels + p.pixel + own_pixel] = scattered[i];
      }
    }
    // 3. Sums of the features' gradient.
    if (m.sums && end > region_columns) {  // the same for all threads
      __syncthreads();
      tile.share(of_features);
      __syncthreads();
      tile.template add_over<true>(of_region, slots, sums);
    }
  }
  if (!m.sums || own_channel >= m.channels - channel_tile * tile.channels_of_tile()) return;
  const int64_t channel = channel_tile * tile.channels_of_tile() + own_channel;
#pragma unroll
  for (int i = 0; i < Tiles::kSlots; ++i)
    if (i < slots)
      static_cast<A*>(m.sums)[(part * columns + begin + group + i * groups) * m.channels + channel] = sums[i];
}

// totals [size] = sum over parts of sums [parts, size].
template <typename A>
__global__ void __launch_bounds__(kThreads)
    valve_add_sums(const A* sums, int64_t parts, int64_t size, A* totals /* [columns, K] */) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  A total = 0;
  for (int64_t part = 0; part < parts; ++part) total += sums[part * size + i];
  totals[i] = total;
}

// A thread for each element of the region: the taps that read it, of all tiles of channels.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    valve_gather_region(const __grid_constant__ Maps m, int64_t channel_tiles, T* region_grad /* [N, R, H_r, W_r] */) {
  using A = Accumulator<T>;
  const Window& w = m.region;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= m.images * w.channels * w.height * w.width) return;
  int64_t x, y, channel;
  int64_t rest = divide(index, w.width, &x);
  rest = divide(rest, w.height, &y);
  const int64_t image = divide(rest, w.channels, &channel), pixels = m.height * m.width;
  A total = 0;
  for (int64_t tile = 0; tile < channel_tiles; ++tile) {
    const A* const columns = static_cast<const A*>(m.scattered) +
                             ((tile * m.images + image) * w.taps + channel * w.kernel_height * w.kernel_width) * pixels;
    for (int64_t u = 0; u < w.kernel_height; ++u) {
      const int64_t at_y = y + w.padding_y - u * w.dilation_y;
      if (at_y < 0) break;
      int64_t rest_y;
      const int64_t from_y = divide(at_y, w.stride_y, &rest_y);
      if (rest_y != 0 || from_y >= m.height) continue;
      for (int64_t v = 0; v < w.kernel_width; ++v) {
        const int64_t at_x = x + w.padding_x - v * w.dilation_x;
        if (at_x < 0) break;
        int64_t rest_x;
        const int64_t from_x = divide(at_x, w.stride_x, &rest_x);
        if (rest_x != 0 || from_x >= m.width) continue;
        total += columns[(u * w.kernel_width + v) * pixels + from_y * m.width + from_x];
      }
    }
  }
  region_grad[index] = narrow<T>(total);
}

}  // namespace pyseg::valve
