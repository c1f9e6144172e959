// Division of indices on CUDA devices. Torch-free.
#pragma once

#include <cstdint>

namespace pyseg {

// Quotient and remainder of numbers that are not negative: in 32 bits where they fit, which is several times faster.
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
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  int64_t rest;
  return divide(a, b, &rest);
}

}  // namespace pyseg
