// bilinear_upsample, upsample_concat and their gradient (1903.11816, section 3.3). Torch-free.
//
// upsample_taps fills tables of what each row and column of the output reads; all other kernels look them up.
// upsample_forward: one launch a map. A thread takes a column of one channel, or in channels_last of 16 bytes of
// channels, down through kStrip rows. It keeps the two source rows between which it is, interpolated along x, so that a
// source element is read about twice (by the columns beside it) and not four times for each output. One store an output.
// upsample_gather: one launch a map. A thread takes one source element, or 16 bytes of channels, and adds up what the
// rows and columns of the gradient that read it contribute, in their order.
//
// Bytes at the least: inputs and output once. No atomics, deterministic, the same bits for any grid.
#pragma once

#include "common/element_cuda.cuh"
#include "upsample/upsample_cuda.h"

namespace pyseg::upsample {

constexpr int kThreadsOfBlock = 128;
constexpr int kStrip = 8;  // rows of the output that a thread walks
constexpr int kTapThreads = 128;
constexpr int kVectorBytes = 16;
constexpr int kReaders = 8;  // columns of the gradient whose weights are kept

template <typename A>
struct TapTable {
  Axis axis;
  CudaTap<A>* taps;
};
template <typename A>
struct TapTables {
  int count;
  TapTable<A> table[2 * kMostMaps];
};

// Grid: tables x parts of the longest.
template <typename A>
__global__ void __launch_bounds__(kTapThreads) upsample_taps(const __grid_constant__ TapTables<A> tables) {
  const TapTable<A>& table = tables.table[blockIdx.y];
  const int64_t i = int64_t(blockIdx.x) * kTapThreads + threadIdx.x;
  if (i >= table.axis.out) return;
  const Tap tap = tap_of(table.axis, i);
  table.taps[i] = {tap.low, tap.high, A(tap.weight)};
}

// In one load of 16 bytes.
template <typename A>
__device__ __forceinline__ CudaTap<A> load_tap(const void* taps, int64_t i) {
  const uint4 bits = __ldg(static_cast<const uint4*>(taps) + i);
  if constexpr (sizeof(A) == 8) {
    return {int32_t(bits.x), int32_t(bits.y), __hiloint2double(int(bits.w), int(bits.z))};
  } else {
    return {int32_t(bits.x), int32_t(bits.y), __uint_as_float(bits.z)};
  }
}

// kVec elements side by side.
template <int kVec, typename T, typename A>
__device__ __forceinline__ void load_elements(const T* from, A (&to)[kVec]) {
  if constexpr (kVec * sizeof(T) == kVectorBytes) {
    alignas(kVectorBytes) T values[kVec];
    *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(from));
#pragma unroll
    for (int v = 0; v < kVec; ++v) to[v] = widen(values[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kVec; ++v) to[v] = widen(__ldg(from + v));
  }
}
template <int kVec, typename T, typename A>
__device__ __forceinline__ void store_elements(const A (&from)[kVec], T* to) {
  if constexpr (kVec * sizeof(T) == kVectorBytes) {
    alignas(kVectorBytes) T values[kVec];
#pragma unroll
    for (int v = 0; v < kVec; ++v) values[v] = narrow<T>(from[v]);
    __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(values));  // a plain store would be split
  } else {
#pragma unroll
    for (int v = 0; v < kVec; ++v) to[v] = narrow<T>(from[v]);
  }
}

// Grid: blocks of an image's row of columns x channels as they lie in memory, strips of rows, images, one after the
// other.
struct GridShape {
  unsigned inner, items;  // columns or vectors of channels, whichever is innermost; all of a row
  unsigned blocks, strips;
};
struct GridPlace {
  int column, vector;
  int64_t strip, image;
  bool inside;
};
template <bool kLast>
__device__ __forceinline__ GridPlace place_in(const GridShape& shape) {
  unsigned rest = blockIdx.x;
  const unsigned item = rest % shape.blocks * kThreadsOfBlock + threadIdx.x;
  rest /= shape.blocks;
  const unsigned outer = item / shape.inner, inner = item % shape.inner;
  return {int(kLast ? outer : inner), int(kLast ? inner : outer), rest % shape.strips, rest / shape.strips,
          item < shape.items};
}

template <typename T, bool kLast, int kVec>
__global__ void __launch_bounds__(kThreadsOfBlock, 8)
    upsample_forward(const __grid_constant__ CudaMap map, GridShape shape, int64_t channels, int64_t height,
                     int64_t width, T* output /* [N, C, H, W] */) {
  using A = Accumulator<T>;
  const GridPlace at = place_in<kLast>(shape);
  if (!at.inside) return;
  const int64_t x = at.column, c = int64_t(at.vector) * kVec;
  const CudaTap<A> column = load_tap<A>(map.columns, x);
  const T* const from = static_cast<const T*>(map.input) + at.image * map.image_stride + c * map.channel_stride;
  const int64_t pixel = kLast ? channels : 1, channel = map.first_channel + c;
  T* const to = output + at.image * channels * height * width + (kLast ? channel : channel * height * width);

  const auto source = [&](int64_t row, A(&value)[kVec]) {
    const T* const p = from + row * map.row_stride;
    load_elements<kVec>(p + column.low * map.column_stride, value);
    if (map.copied_columns) return;
    A high[kVec];
    load_elements<kVec>(p + column.high * map.column_stride, high);
#pragma unroll
    for (int v = 0; v < kVec; ++v) value[v] = (A(1) - column.weight) * value[v] + column.weight * high[v];
  };

  const int64_t begin = at.strip * kStrip, end = begin + kStrip < height ? begin + kStrip : height;
  A low[kVec], high[kVec];
  int low_row = -1, high_row = -1;
  for (int64_t y = begin; y < end; ++y) {
    const CudaTap<A> row = load_tap<A>(map.rows, y);
    if (row.low != low_row) {
      if (row.low == high_row) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) low[v] = high[v];
      } else {
        source(row.low, low);
      }
      low_row = row.low;
    }
    A value[kVec];
    if (map.copied_rows) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) value[v] = low[v];
    } else {
      if (row.high != high_row) {
        source(row.high, high);
        high_row = row.high;
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) value[v] = (A(1) - row.weight) * low[v] + row.weight * high[v];
    }
    store_elements<kVec>(value, to + (y * width + x) * pixel);
  }
}

// The first and last element of an axis of the output that may read element i; all that do lie between.
struct Readers {
  int64_t first, last;
};
__device__ __forceinline__ Readers readers_of(const Axis& axis, int64_t i) {
  if (is_copied(axis)) return {i, i};
  Readers readers{0, axis.out - 1};
  if (axis.inverse == 0) return readers;
  const double half = axis.align ? 0 : 0.5;
  if (i > 0) {
    const double first = floor((double(i - 1) + half) * axis.inverse - half) - 1;
    if (first > 0) readers.first = first < double(axis.out) ? int64_t(first) : axis.out;
  }
  if (i + 1 < axis.in) {
    const double last = ceil((double(i + 1) + half) * axis.inverse - half) + 1;
    if (last < double(axis.out - 1)) readers.last = int64_t(last);
  }
  return readers;
}

// S: of the gradient, whose channels from first_channel on are the map's.
template <typename T, typename S, bool kLast, int kVec>
__global__ void __launch_bounds__(kThreadsOfBlock, 8)
    upsample_gather(const __grid_constant__ CudaMap map, GridShape shape, const S* grad /* [N, C, H, W] */,
                    int64_t grad_channels, int64_t first_channel, int64_t height, int64_t width) {
  using A = Accumulator<T>;
  const GridPlace at = place_in<kLast>(shape);
  if (!at.inside) return;
  const int64_t j = at.column, c = int64_t(at.vector) * kVec, i = at.strip;
  const int64_t pixel = kLast ? grad_channels : 1, channel = first_channel + c;
  const S* const from = grad + at.image * grad_channels * height * width + (kLast ? channel : channel * height * width);
  const Readers y_readers = readers_of(map.row_axis, i), x_readers = readers_of(map.column_axis, j);

  const auto weight_of = [](const CudaTap<A>& tap, int64_t k) {
    return (tap.low == k ? A(1) - tap.weight : A(0)) + (tap.high == k ? tap.weight : A(0));
  };
  A sum[kVec] = {};
  for (int64_t first = x_readers.first; first <= x_readers.last; first += kReaders) {
    A weight[kReaders];
#pragma unroll
    for (int k = 0; k < kReaders; ++k)
      weight[k] = first + k <= x_readers.last ? weight_of(load_tap<A>(map.columns, first + k), j) : A(0);
    for (int64_t y = y_readers.first; y <= y_readers.last; ++y) {
      const A row_weight = weight_of(load_tap<A>(map.rows, y), i);
      if (row_weight == A(0)) continue;
      A part[kVec] = {};
#pragma unroll
      for (int k = 0; k < kReaders; ++k) {
        if (weight[k] == A(0)) continue;
        A g[kVec];
        load_elements<kVec>(from + (y * width + first + k) * pixel, g);
#pragma unroll
        for (int v = 0; v < kVec; ++v) part[v] += weight[k] * g[v];
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) sum[v] += row_weight * part[v];
    }
  }
  const int64_t size = map.channels * map.height * map.width;
  T* const to = static_cast<T*>(map.grad) + at.image * size +
                (kLast ? (i * map.width + j) * map.channels + c : (c * map.height + i) * map.width + j);
  store_elements<kVec>(sum, to);
}

}  // namespace pyseg::upsample
