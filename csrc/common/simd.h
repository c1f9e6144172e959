// Vectors of one CPU target, on the compiler's vector extensions. Torch-free: included by target units only, which
// are compiled once per instruction set with PYSEG_TARGET set to its name. Everything lives in that target's
// namespace and has internal linkage, so that the linker can never pick another target's copy.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VecTypes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <typename T>
using Vec = typename VecTypes<T>::Vec;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(p);
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(p) = v;
}

// Stores past the caches: for results larger than these, which would otherwise be read before they are overwritten. `p` is
// aligned to a vector. Call stream_fence before another thread reads.
#if defined(__AVX512F__)
inline void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
#elif defined(__AVX2__)
inline void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
#elif defined(__SSE2__)
inline void stream(float* p, Vec<float> v) { _mm_stream_ps(p, (__m128)v); }
inline void stream(double* p, Vec<double> v) { _mm_stream_pd(p, (__m128d)v); }
#else
template <typename T>
inline void stream(T* p, Vec<T> v) {
  store(p, v);
}
#endif

// One bit a lane of the result of a comparison of Vec<T>.
template <typename T, typename Mask>
inline uint32_t lane_bits(Mask mask) {
#if defined(__AVX512F__)
  return sizeof(T) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return sizeof(T) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
#elif defined(__SSE2__)
  return sizeof(T) == 4 ? _mm_movemask_ps((__m128)mask) : _mm_movemask_pd((__m128d)mask);
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) bits |= uint32_t(mask[lane] != 0) << lane;
  return bits;
#endif
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename T>
inline Vec<T> broadcast(T s) {
  return s - Vec<T>{};  // x - (+0) is x for every x, so the subtraction folds away and one broadcast remains
}

// max(v, 0) that keeps NaN, as torch's relu does.
template <typename T>
inline Vec<T> relu(Vec<T> v) {
  return v < Vec<T>{} ? Vec<T>{} : v;
}
template <typename T>
inline T relu(T v) {
  return v < T(0) ? T(0) : v;
}

template <typename T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
// The least multiple of `step` that is not below n >= 0.
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
