// Elements of the RoI kernels. Torch-free.
#pragma once

#include <cstdint>

#include "common/divide_cuda.cuh"
#include "common/element_cuda.cuh"

namespace pyseg::roi {

using pyseg::widen;
__device__ __forceinline__ float widen(uint8_t v) { return v != 0 ? 1.f : 0.f; }  // of masks

}  // namespace pyseg::roi
