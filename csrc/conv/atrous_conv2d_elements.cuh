// Elements of the SIMT kernels of atrous_conv2d: accumulator types, conversions, 16-byte vectors, the epilogue.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/element_cuda.cuh"

namespace pyseg::atrous {

constexpr int kVectorBytes = 16;  // the widest load and store of one thread

// kSize elements that travel together: one access of 8 or 16 bytes, or a single element.
template <typename T, int kSize>
struct Vector {
  static constexpr int kBytes = kSize * sizeof(T);
  static_assert(kSize == 1 || kBytes == 8 || kBytes == kVectorBytes, "other sizes have no single access");
  using Bits = std::conditional_t<kBytes == kVectorBytes, uint4, uint2>;
  T at[kSize];

  static __device__ __forceinline__ Vector load(const T* from) {
    Vector v;
    if constexpr (kSize == 1) {
      v.at[0] = *from;
    } else {
      const Bits bits = *reinterpret_cast<const Bits*>(from);
      __builtin_memcpy(v.at, &bits, kBytes);
    }
    return v;
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kSize == 1) {
      *to = at[0];
    } else {
      Bits bits;
      __builtin_memcpy(&bits, at, kBytes);
      *reinterpret_cast<Bits*>(to) = bits;
    }
  }

  static __device__ __forceinline__ Vector filled(float value) {
    Vector v;
#pragma unroll
    for (int i = 0; i < kSize; ++i) v.at[i] = narrow<T>(value);
    return v;
  }
};

// relu((sum + bias) * scale + shift) of kSize channels; absent terms are 0, 1 and 0, which change no value.
template <typename T, int kSize>
struct ChannelEpilogue {
  Vector<T, kSize> bias, scale, shift;
  bool relu;

  __device__ __forceinline__ ChannelEpilogue(const T* bias_, const T* scale_, const T* shift_, bool relu_, int channel)
      : bias(bias_ ? Vector<T, kSize>::load(bias_ + channel) : Vector<T, kSize>::filled(0)),
        scale(scale_ ? Vector<T, kSize>::load(scale_ + channel) : Vector<T, kSize>::filled(1)),
        shift(shift_ ? Vector<T, kSize>::load(shift_ + channel) : Vector<T, kSize>::filled(0)),
        relu(relu_) {}

  __device__ __forceinline__ T operator()(Accumulator<T> sum, int i) const {
    const Accumulator<T> y = (sum + widen(bias.at[i])) * widen(scale.at[i]) + widen(shift.at[i]);
    return narrow<T>(relu && y < 0 ? Accumulator<T>(0) : y);  // a NaN stays
  }
};

// Four accumulators that travel together in shared memory.
template <typename Acc>
struct alignas(kVectorBytes) Quad {
  Acc at[4];
};

// The first `count` (may be negative) of four elements, zeros for the others. `aligned`: `from` is a multiple of four
// elements into 16-byte aligned memory, and `count` too.
template <typename T>
__device__ __forceinline__ Quad<Accumulator<T>> load_quad(const T* from, int count, bool aligned) {
  constexpr int kAtOnce = sizeof(T) == 8 ? 2 : 4;
  Quad<Accumulator<T>> quad = {};
  if (aligned) {
    if (count > 0) {
#pragma unroll
      for (int i = 0; i < 4; i += kAtOnce) {
        const auto elements = Vector<T, kAtOnce>::load(from + i);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) quad.at[i + j] = widen(elements.at[j]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) quad.at[i] = widen(from[i]);
    }
  }
  return quad;
}

// The counterpart: stores the first `count` of four.
template <typename T>
__device__ __forceinline__ void store_quad(T* to, const T (&elements)[4], int count, bool aligned) {
  constexpr int kAtOnce = sizeof(T) == 8 ? 2 : 4;
  if (aligned) {
    if (count > 0) {
#pragma unroll
      for (int i = 0; i < 4; i += kAtOnce) {
        Vector<T, kAtOnce> together;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) together.at[j] = elements[i + j];
        together.store(to + i);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = elements[i];
    }
  }
}

}  // namespace pyseg::atrous
