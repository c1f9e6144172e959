// The interface between the separable Gaussian on CUDA devices and the launchers of its kernels: torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyseg::crf {

// One axis: to[o, l, i] = sum over |x| <= radius of taps[|x|] * from[o, l + x, i]. T is double where float64 is set.
struct GaussianPass {
  bool float64;
  int64_t outer, length, inner;  // inner: elements that lie side by side
  int64_t radius;
  const void* taps;  // [radius + 1], the middle one first
  const void* from;  // [outer, length, inner]
  void* to;          // not `from`
  // Factors of what is read, null: 1. A factor serves `scale_run` elements; they repeat after `scale_period` factors.
  const void* scale;
  int64_t scale_run, scale_period;
};

cudaError_t launch_gaussian_pass(const GaussianPass&, cudaStream_t);

// taps [radius + 1] = peak * exp(-x^2 / (2 sigma^2)); sigma 0: one tap.
cudaError_t launch_gaussian_taps(double sigma, int64_t radius, double peak, bool float64, void* taps, cudaStream_t);

}  // namespace pyseg::crf
