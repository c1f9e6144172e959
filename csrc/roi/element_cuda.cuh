// Elements and indices of the RoI kernels. Torch-free.
#pragma once

#include <cstdint>

#include "common/element_cuda.cuh"

namespace pyseg::roi {

using pyseg::widen;
__device__ __forceinline__ float widen(uint8_t v) { return v != 0 ? 1.f : 0.f; }  // of masks

// Quotient and remainder of numbers >= 0; most are short.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, int64_t* rest) {
  if (((a | b) >> 32) == 0) {
    const uint32_t quotient = uint32_t(a) / uint32_t(b);
    *rest = uint32_t(a) - quotient * uint32_t(b);
    return quotient;
  }
  const int64_t quotient = a / b;
  *rest = a - quotient * b;
  return quotient;
}

}  // namespace pyseg::roi
