// Units of 16 bytes: some channels of a row, loaded and stored together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/divide_cuda.cuh"
#include "crf/lattice_rows_cuda.h"

namespace pyseg::crf {

template <typename T>
struct alignas(kUnitBytes) Unit {
  static constexpr int kLanes = kUnitBytes / int(sizeof(T));
  T v[kLanes];

  static __device__ __forceinline__ Unit all(T value) {
    Unit u;
#pragma unroll
    for (T& lane : u.v) lane = value;
    return u;
  }
  // this += a * b
  __device__ __forceinline__ void add(const Unit& a, T b) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) v[i] += a.v[i] * b;
  }
  __device__ __forceinline__ void add(const Unit& a) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) v[i] += a.v[i];
  }
};

__device__ __forceinline__ Unit<float> load_unit(const float* at) {
  const float4 u = *reinterpret_cast<const float4*>(at);
  return {u.x, u.y, u.z, u.w};
}
__device__ __forceinline__ Unit<double> load_unit(const double* at) {
  const double2 u = *reinterpret_cast<const double2*>(at);
  return {u.x, u.y};
}
// By the intrinsics: the compiler splits some assignments into single elements.
__device__ __forceinline__ void store_unit(float* at, const Unit<float>& u) {
  __stwb(reinterpret_cast<float4*>(at), make_float4(u.v[0], u.v[1], u.v[2], u.v[3]));
}
__device__ __forceinline__ void store_unit(double* at, const Unit<double>& u) {
  __stwb(reinterpret_cast<double2*>(at), make_double2(u.v[0], u.v[1]));
}

constexpr int kMostUnits = 32;  // that a block takes of a row

// How a block's threads share rows: `per_row` threads take units of one row, blocks along y the next units.
struct RowLanes {
  int units, per_row, rows;
  unsigned chunks;
};

inline RowLanes row_lanes(int64_t units, int threads) {
  const int64_t chunks = (units + kMostUnits - 1) / kMostUnits;
  const int per_row = static_cast<int>((units + chunks - 1) / chunks);
  return {static_cast<int>(units), per_row, threads / per_row, static_cast<unsigned>(chunks)};
}

}  // namespace pyseg::crf
