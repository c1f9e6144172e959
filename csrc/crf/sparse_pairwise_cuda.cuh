// Sums over the links of pixels (compressed rows) on CUDA devices, and their gradient with respect to the weights.
//     y_i = sum over the entries k of row i of weights_k * v_columns_k      dw_k = sum over the channels of left_i * right_columns_k
// Values lie in planes, [images, channels, points], or in rows, [images, points, channels].
// Planes: a thread takes a pixel and a few channels, neighbouring threads neighbouring pixels: starts are read and results
// written whole lines at a time; values are gathered. Rows: neighbouring threads take neighbouring units of channels, 16
// bytes where channels are whole units, so gathers are whole rows. Gradient: a thread takes a pixel's entries.
// Bytes at the least: results written, starts, columns and weights read once, and the channels of each entry's pixel.
// Indices that do not exist are compared with sizes before use and count for nothing. No atomics, sums in the order of
// the entries: deterministic.
#pragma once

#include "common/divide_cuda.cuh"
#include "crf/units_cuda.cuh"

namespace pyseg::crf {

constexpr int kSparseThreads = 256;
constexpr int kSparseGroup = 4;          // planes that a thread sums at once
constexpr int64_t kSparseChannels = 16;  // that a block takes, so that starts are not read for each group
static_assert(kSparseChannels % kSparseGroup == 0, "a block takes whole groups");

struct SparseView {
  const int64_t* starts;   // [images * points + 1]
  const int32_t* columns;  // [length]
  const int32_t* entries;  // [length], where the weights stand; null: in the order of the columns
  int64_t length;
  int64_t images, channels, points;
  __host__ __device__ int64_t pixels() const { return images * points; }
};

// Of a pixel, within what there is.
__device__ __forceinline__ longlong2 sparse_range(const SparseView& s, int64_t pixel) {
  return {max(s.starts[pixel], int64_t{0}), min(s.starts[pixel + 1], s.length)};
}

// The weight of entry k and its pixel; false where one of them does not exist.
template <typename T>
__device__ __forceinline__ bool sparse_entry(const SparseView& s, const T* weights, int64_t k, T* weight,
                                             int64_t* pixel) {
  const int32_t column = s.columns[k];
  const int64_t at = s.entries == nullptr ? k : int64_t{s.entries[k]};
  if (uint32_t(column) >= uint64_t(s.pixels()) || uint64_t(at) >= uint64_t(s.length)) return false;
  *weight = weights[at];
  *pixel = column;
  return true;
}

// Where a pixel's first channel lies in planes.
__device__ __forceinline__ int64_t plane_offset(const SparseView& s, int64_t pixel) {
  return pixel + divide(pixel, s.points) * (s.channels - 1) * s.points;
}

// Grid: threads for all pixels, kSparseChannels along y.
template <typename T>
__global__ void __launch_bounds__(kSparseThreads)
    sparse_planes_kernel(const __grid_constant__ SparseView s, const T* weights,  // [length]
                         const T* values, const T* base, const T* factor,  // planes; planes or null; [channels] or null
                         T* output) {                                      // planes
  const int64_t pixel = int64_t{blockIdx.x} * kSparseThreads + threadIdx.x;
  if (pixel >= s.pixels()) return;
  const longlong2 range = sparse_range(s, pixel);
  const int64_t own = plane_offset(s, pixel);
  const int64_t first = int64_t{blockIdx.y} * kSparseChannels, last = min(first + kSparseChannels, s.channels);
  for (int64_t c = first; c < last; c += kSparseGroup) {
    const int channels = int(min(last - c, int64_t{kSparseGroup}));
    T sum[kSparseGroup] = {};
    for (int64_t k = range.x; k < range.y; ++k) {
      T weight;
      int64_t other;
      if (!sparse_entry(s, weights, k, &weight, &other)) continue;
      const T* const from = values + plane_offset(s, other) + c * s.points;
#pragma unroll
      for (int u = 0; u < kSparseGroup; ++u)
        if (u < channels) sum[u] += from[u * s.points] * weight;
    }
#pragma unroll
    for (int u = 0; u < kSparseGroup; ++u) {
      if (u >= channels) continue;
      const int64_t at = own + (c + u) * s.points;
      if (factor != nullptr) sum[u] *= factor[c + u];
      output[at] = base == nullptr ? sum[u] : base[at] + sum[u];
    }
  }
}

template <typename T, int kUnit>
struct alignas(kUnit * sizeof(T)) SparseUnit {
  T v[kUnit];
};

// Grid: threads for all units of kUnit channels of all pixels.
template <typename T, int kUnit>
__global__ void __launch_bounds__(kSparseThreads)
    sparse_rows_kernel(const __grid_constant__ SparseView s, const T* weights,  // [length]
                       const T* values, const T* base, const T* factor,  // rows; rows or null; [channels] or null
                       T* output) {                                      // rows
  using U = SparseUnit<T, kUnit>;
  const int64_t index = int64_t{blockIdx.x} * kSparseThreads + threadIdx.x, units = s.channels / kUnit;
  int64_t unit;
  const int64_t pixel = divide(index, units, &unit);
  if (pixel >= s.pixels()) return;
  const longlong2 range = sparse_range(s, pixel);
  T sum[kUnit] = {};
#pragma unroll 2
  for (int64_t k = range.x; k < range.y; ++k) {
    T weight;
    int64_t other;
    if (!sparse_entry(s, weights, k, &weight, &other)) continue;
    const U from = reinterpret_cast<const U*>(values)[other * units + unit];
#pragma unroll
    for (int u = 0; u < kUnit; ++u) sum[u] += from.v[u] * weight;
  }
  if (factor != nullptr) {
#pragma unroll
    for (int u = 0; u < kUnit; ++u) sum[u] *= factor[unit * kUnit + u];
  }
  if (base != nullptr) {
    const U from = reinterpret_cast<const U*>(base)[index];
#pragma unroll
    for (int u = 0; u < kUnit; ++u) sum[u] += from.v[u];
  }
  U result;
#pragma unroll
  for (int u = 0; u < kUnit; ++u) result.v[u] = sum[u];
  reinterpret_cast<U*>(output)[index] = result;
}

// Grid: threads for all pixels. What lies between two channels of a pixel: `step`.
template <typename T>
__global__ void __launch_bounds__(kSparseThreads)
    sparse_dots_kernel(const __grid_constant__ SparseView s, bool rows, const T* left, const T* right, T* output) {
  const int64_t pixel = int64_t{blockIdx.x} * kSparseThreads + threadIdx.x;
  if (pixel >= s.pixels()) return;
  const longlong2 range = sparse_range(s, pixel);
  const int64_t step = rows ? 1 : s.points;
  const T* const own = left + (rows ? pixel * s.channels : plane_offset(s, pixel));
  for (int64_t k = range.x; k < range.y; ++k) {
    const int32_t column = s.columns[k];
    T sum = T(0);
    if (uint32_t(column) < uint64_t(s.pixels())) {
      const T* const other = right + (rows ? column * s.channels : plane_offset(s, column));
#pragma unroll 4
      for (int64_t c = 0; c < s.channels; ++c) sum += own[c * step] * other[c * step];
    }
    output[k] = sum;
  }
}

}  // namespace pyseg::crf
