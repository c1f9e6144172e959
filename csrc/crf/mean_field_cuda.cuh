// An update of mean field marginals on CUDA devices (Kraehenbuehl and Koltun 2011, algorithm 1): slice, scales,
// compatibility, unary energies and softmax in one kernel.
//
//   energy = unary + sum over kernels of compatibility * message,   Q = softmax(-energy), all over the temperature
//
// Rows of marginals, energies and vertices lie in units of 16 bytes. A group of threads, a power of two and at most a
// warp, takes a point, each thread the units lane, lane + group, ...: up to kUnits of them in registers, more in
// the result's own row. A full compatibility matrix is multiplied with messages that the group exchanges through shared
// memory. Minimum and sum of the softmax go through shuffles. Bytes at the least for a point: its unaries, a row for
// each corner and lattice, a row for each Gaussian kernel, its marginals. No atomics, sums in a fixed order:
// deterministic.
#pragma once

#include "common/element_cuda.cuh"
#include "crf/lattice_rows_cuda.cuh"
#include "crf/mean_field_cuda.h"

namespace pyseg::crf {

constexpr int kUpdateThreads = 128;
static_assert(kUpdateThreads % kWarpLanes == 0, "whole warps");

// A point's energies that a thread has: in registers, or (kUnits 0) in memory.
template <typename T, int kUnits>
class Energies {
 public:
  __device__ Energies(T* row, int lane, int group, int units) : row_(row), lane_(lane), group_(group), units_(units) {}
  __device__ int count() const { return kUnits > 0 ? kUnits : (units_ + group_ - 1) / group_; }
  __device__ int64_t channel(int n) const { return int64_t{lane_ + n * group_} * Unit<T>::kLanes; }
  __device__ bool has(int n) const { return row_ != nullptr && lane_ + n * group_ < units_; }
  __device__ Unit<T> get(int n) const {
    if constexpr (kUnits > 0) return own_[n];
    return has(n) ? load_unit(row_ + channel(n)) : Unit<T>::all(T(INFINITY));
  }
  __device__ void set(int n, const Unit<T>& u) {
    if constexpr (kUnits > 0)
      own_[n] = u;
    else if (has(n))
      store_unit(row_ + channel(n), u);
  }

 private:
  T* row_;  // null: no point
  int lane_, group_, units_;
  Unit<T> own_[kUnits > 0 ? kUnits : 1];
};

template <typename T>
__device__ __forceinline__ Unit<T> message_unit(const Message& m, int64_t image, int64_t point, int64_t points,
                                                int64_t channel, int64_t stride) {
  const int64_t at = image * points + point;
  T factor = T(m.factor);
  if (m.scale.data != nullptr) factor *= static_cast<const T*>(m.scale.data)[image * m.scale.image_stride + point];
  const T* rows = static_cast<const T*>(m.rows) + channel;
  if (m.vertex != nullptr)
    return slice_unit(m.vertex + at * m.corners, static_cast<const T*>(m.weight) + at * m.corners, m.corners,
                      m.vertices, rows, stride, factor);
  Unit<T> sum = Unit<T>::all(T(0));
  sum.add(load_unit(rows + at * stride), factor);
  return sum;
}

// Blocks that a multiprocessor shall hold: without it the compiler takes fewer registers and spills a few.
template <int kUnits>
constexpr int kUpdateBlocks = kUnits > 0 ? 8 : 4;

// Grid: groups of `group` threads for all points.
template <typename T, int kUnits>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateBlocks<kUnits>)
    mean_field_update_kernel(const __grid_constant__ Update a, int units, int group) {
  // Of each group, one unit apart: groups that read at the same time find other banks.
  __shared__ __align__(16) T exchange[2 * kUpdateThreads * Unit<T>::kLanes];
  constexpr int kLanes = Unit<T>::kLanes, kAtOnce = kUnits > 0 ? kUnits : 1;
  const int lane = threadIdx.x % group;
  const int64_t at = int64_t{blockIdx.x} * (kUpdateThreads / group) + threadIdx.x / group;
  const bool exists = at < a.images * a.points;  // the others stay for the warp's exchanges
  const int64_t image = exists ? uint32_t(at) / uint32_t(a.points) : 0, point = exists ? at - image * a.points : 0;
  const int64_t stride = int64_t{units} * kLanes;
  T* const to = static_cast<T*>(a.to) + at * stride;
  Energies<T, kUnits> energies(exists ? to : nullptr, lane, group, units);
  const int count = energies.count();

  T* const messages = exchange + threadIdx.x / group * (group + 1) * kLanes;

  // 1. Unary energies.
#pragma unroll(kAtOnce)
  for (int n = 0; n < count; ++n)
    energies.set(n, energies.has(n) ? load_unit(static_cast<const T*>(a.energy) + at * stride + energies.channel(n))
                                    : Unit<T>::all(T(INFINITY)));

  // 2. Messages.
  for (int k = 0; k < a.count; ++k) {
    const Message& m = a.messages[k];
    const T* compatibility = static_cast<const T*>(m.compatibility);
#pragma unroll(kAtOnce)
    for (int n = 0; n < count; ++n) {
      Unit<T> message = Unit<T>::all(T(0));
      if (energies.has(n)) message = message_unit<T>(m, image, point, a.points, energies.channel(n), stride);
      if (!m.matrix) {
        if (!energies.has(n)) continue;
        const Unit<T> cost = load_unit(compatibility + energies.channel(n));
        Unit<T> sum = energies.get(n);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sum.v[i] += cost.v[i] * message.v[i];
        energies.set(n, sum);
        continue;
      }
      *reinterpret_cast<Unit<T>*>(messages + lane * kLanes) = message;
      __syncwarp();
      const int64_t first = int64_t{n} * group * kLanes;
      const int others = int(min(int64_t{group} * kLanes, stride - first));
#pragma unroll(kAtOnce)
      for (int own = 0; own < count; ++own) {
        if (!energies.has(own)) continue;
        Unit<T> sum = energies.get(own);
        const T* costs = compatibility + first * stride + energies.channel(own);
        for (int other = 0; other < others; other += kLanes) {
          const Unit<T> some = *reinterpret_cast<const Unit<T>*>(messages + other);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) sum.add(load_unit(costs + (other + i) * stride), some.v[i]);
        }
        energies.set(own, sum);
      }
      __syncwarp();
    }
  }
  if (!a.softmax) {
    if constexpr (kUnits > 0)
#pragma unroll(kAtOnce)
      for (int n = 0; n < count; ++n)
        if (energies.has(n)) store_unit(to + energies.channel(n), energies.get(n));
    return;
  }

  // 3. Softmax.
  T least = T(INFINITY);
#pragma unroll(kAtOnce)
  for (int n = 0; n < count; ++n) {
    const Unit<T> e = energies.get(n);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) least = e.v[i] < least ? e.v[i] : least;
  }
  for (int step = group / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, least, step);
    least = other < least ? other : least;
  }
  T sum = T(0);
#pragma unroll(kAtOnce)
  for (int n = 0; n < count; ++n) {
    if (!energies.has(n)) continue;
    Unit<T> e = energies.get(n);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      e.v[i] = exponential(least - e.v[i]);
      sum += e.v[i];
    }
    energies.set(n, e);
  }
  for (int step = group / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  const T scale = T(1) / sum;
#pragma unroll(kAtOnce)
  for (int n = 0; n < count; ++n) {
    if (!energies.has(n)) continue;
    Unit<T> q = energies.get(n);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) q.v[i] *= scale;
    store_unit(to + energies.channel(n), q);
  }
}

// to[other, c] = factor * compatibility[c, other], or of a diagonal to[0, c]; zeros beyond the classes. Grid: threads for
// all elements.
template <typename T>
__global__ void __launch_bounds__(kUpdateThreads)
    mean_field_compatibility_kernel(const T* compatibility, int64_t classes, int64_t stride, bool matrix, T factor,
                                    T* to) {
  const int64_t i = int64_t{blockIdx.x} * kUpdateThreads + threadIdx.x;
  if (i >= (matrix ? stride : 1) * stride) return;
  const int64_t other = i / stride, c = i - other * stride;
  to[i] = c < classes && other < classes ? factor * compatibility[matrix ? c * classes + other : c] : T(0);
}

}  // namespace pyseg::crf
