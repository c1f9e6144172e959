// A Gaussian along one axis on CUDA devices: weighted sums of shifted lines.
//
// A thread computes kOutputs successive results of a line, so that what it reads serves all of them, for one unit of
// elements that lie side by side: 16 bytes, or one element where rows are not whole units. Neighbouring threads take
// neighbouring units, and then neighbouring results: a block reads each line of its tile and of the halo through L1.
// Along the innermost axis of planes neighbouring threads take neighbouring results. Nothing beyond the radius is
// touched, so NaN and infinity do not reach further. Bytes at the least: each element read and written once.
// Sums run from the first line to the last: deterministic.
#pragma once

#include "crf/gaussian_filter_cuda.h"
#include "crf/units_cuda.cuh"

namespace pyseg::crf {

constexpr int kGaussianThreads = 256;

// kUnit elements that lie side by side.
template <typename T, int kUnit>
struct Elements {
  T v[kUnit];
};

template <int kUnit, typename T>
__device__ __forceinline__ Elements<T, kUnit> load_elements(const T* at) {
  if constexpr (kUnit == 1) {
    return {*at};
  } else {
    const Unit<T> u = load_unit(at);
    Elements<T, kUnit> e;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) e.v[i] = u.v[i];
    return e;
  }
}

// Grid: tiles of `across` units times results of kGaussianThreads / across threads, over all lines.
template <typename T, int kUnit, int kOutputs>
__global__ void __launch_bounds__(kGaussianThreads)
    gaussian_pass_kernel(const __grid_constant__ GaussianPass p, int across) {
  const int64_t units = p.inner / kUnit, unit_tiles = (units + across - 1) / across;
  const int64_t slots = (p.length + kOutputs - 1) / kOutputs;  // of a line
  const int down = kGaussianThreads / across, t = threadIdx.x / across;
  const int64_t tile = divide(blockIdx.x, unit_tiles);
  const int64_t unit = (blockIdx.x - tile * unit_tiles) * across + threadIdx.x % across;
  const int64_t slot = tile * down + t;
  if (t >= down || unit >= units || slot >= p.outer * slots) return;
  const int64_t o = divide(slot, slots), first = (slot - o * slots) * kOutputs;
  const int64_t line = o * p.length * p.inner + unit * kUnit;
  const T* from = static_cast<const T*>(p.from) + line;
  const T* taps = static_cast<const T*>(p.taps);
  // A line lies in one image.
  const T* scale =
      p.scale == nullptr ? nullptr : static_cast<const T*>(p.scale) + divide(line, p.scale_run) % p.scale_period;
  const int64_t scale_step = p.inner / p.scale_run;

  // Result k takes line l with tap |l - first - k|: those of the next line are these, each one result further.
  const int radius = int(p.radius);
  const auto tap_at = [&](int x) {
    const int distance = x < 0 ? -x : x;
    return distance <= radius ? taps[distance] : T(0);
  };
  const int64_t begin = max(first - p.radius, int64_t{0});
  const int64_t end = min(first + kOutputs - 1 + p.radius, p.length - 1);
  int x = int(begin - first);
  T tap[kOutputs], sum[kOutputs][kUnit] = {};
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) tap[k] = tap_at(x - k);
  for (int64_t l = begin; l <= end; ++l, ++x) {
    Elements<T, kUnit> e = load_elements<kUnit>(from + l * p.inner);
    if (scale != nullptr) {
      const T factor = scale[l * scale_step];
#pragma unroll
      for (int i = 0; i < kUnit; ++i) e.v[i] *= factor;
    }
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      if (x - k < -radius || x - k > radius) continue;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) sum[k][i] += tap[k] * e.v[i];
    }
#pragma unroll
    for (int k = kOutputs - 1; k > 0; --k) tap[k] = tap[k - 1];
    tap[0] = tap_at(x + 1);
  }
  T* to = static_cast<T*>(p.to) + line;
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    if (first + k >= p.length) break;
    if constexpr (kUnit == 1) {
      to[(first + k) * p.inner] = sum[k][0];
    } else {
      Unit<T> u;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) u.v[i] = sum[k][i];
      store_unit(to + (first + k) * p.inner, u);
    }
  }
}

// Taps are made on the device: nothing has to be copied to it.
template <typename T>
__global__ void __launch_bounds__(kGaussianThreads)
    gaussian_taps_kernel(double exponent, int64_t count, double peak, T* taps) {
  const int64_t x = int64_t{blockIdx.x} * kGaussianThreads + threadIdx.x;
  if (x < count) taps[x] = T(peak * exp(exponent * double(x) * double(x)));
}

}  // namespace pyseg::crf
