// One element of a segmentation map on CUDA devices: dtypes, activations, the closed forms of segmentation_math.h.
#pragma once

#include <cstdint>

#include "common/element_cuda.cuh"
#include "loss/segmentation_cuda.h"

namespace pyseg::loss {

__device__ __forceinline__ int64_t load_integer(const void* data, Element type, int64_t i) {
  switch (type) {
    case Element::kUInt8: return static_cast<const uint8_t*>(data)[i];
    case Element::kInt8: return static_cast<const int8_t*>(data)[i];
    case Element::kInt16: return static_cast<const int16_t*>(data)[i];
    case Element::kInt32: return static_cast<const int32_t*>(data)[i];
    default: return static_cast<const int64_t*>(data)[i];
  }
}

template <typename A>
__device__ __forceinline__ A load_number(const void* data, Element type, int64_t i) {
  switch (type) {
    case Element::kFloat: return A(static_cast<const float*>(data)[i]);
    case Element::kDouble: return A(static_cast<const double*>(data)[i]);
    case Element::kHalf: return A(widen(static_cast<const __half*>(data)[i]));
    case Element::kBFloat16: return A(widen(static_cast<const __nv_bfloat16*>(data)[i]));
    default: return A(load_integer(data, type, i));
  }
}

__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float logarithm_1p(float x) { return log1pf(x); }
__device__ __forceinline__ double logarithm_1p(double x) { return log1p(x); }

// x * y with 0 * inf = 0.
template <typename A>
__device__ __forceinline__ A product(A x, A y) {
  return x == A(0) ? A(0) : x * y;
}

// x^gamma, 0^0 = 1.
template <typename A>
__device__ __forceinline__ A power(A x, A gamma) {
  if (gamma == A(0)) return A(1);
  if (gamma == A(1)) return x;
  if (gamma == A(2)) return x * x;
  return exponential(gamma * logarithm(x));
}

// q = (1 - p)^gamma + gamma p (1 - p)^(gamma - 1) (-log p); for gamma < 1 the power is cut off just before p = 1.
template <typename A>
__device__ __forceinline__ A focal_slope(A p, A rest, A minus_log, A gamma) {
  if (gamma == A(0)) return A(1);
  const A pl = product(p, minus_log);
  if (gamma == A(1)) return rest + pl;
  if (gamma == A(2)) return rest * (rest + (pl + pl));
  const A base = rest < A(1e-30) ? A(1e-30) : rest;
  const A raised = power(base, gamma);
  return raised + gamma * pl * raised / base;
}

template <typename A>
struct Probability {
  A p, rest;          // p, 1 - p
  A log_p, log_rest;  // -log p, -log(1 - p)
};

// From z - max, 1 / sum and log sum. Where p is so near 1 that 1 - p is rounding, its lower bound p (-log p) is nearer.
template <typename A>
__device__ __forceinline__ Probability<A> softmax_of(A d, A scale, A log_sum) {
  Probability<A> x;
  x.p = exponential(d) * scale;
  x.log_p = log_sum - d;
  const A rest = A(1) - x.p, bound = product(x.p, x.log_p);
  x.rest = rest < bound ? bound : rest;
  x.log_rest = A(0);
  return x;
}

template <typename A>
__device__ __forceinline__ Probability<A> sigmoid_of(A z) {
  const A e = exponential(z < A(0) ? z : -z), r = A(1) / (A(1) + e), l = logarithm_1p(e);
  return z < A(0) ? Probability<A>{e * r, r, l - z, l} : Probability<A>{r, e * r, l, l + z};
}

template <typename A>
__device__ __forceinline__ Probability<A> probability_of(A p) {
  const A most = A(-kLeastLog), log_p = -logarithm(p), log_rest = -logarithm(A(1) - p);
  return {p, A(1) - p, log_p > most ? most : log_p, log_rest > most ? most : log_rest};
}

}  // namespace pyseg::loss
