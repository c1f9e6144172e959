// Runs of elements of any dtype to and from the type that one CPU target computes in.
#pragma once

#include <string.h>

#include "common/element.h"
#include "common/simd.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename T, typename U>
constexpr bool kSame = false;
template <typename T>
constexpr bool kSame<T, T> = true;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

template <typename T>
inline T widen(T x) {
  return x;
}
inline float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 5.192296858534828e33f);  // 2^112, denormal numbers too
  const uint32_t special = magnitude | 0x7f800000;                               // infinity, NaN
  return float_of((uint32_t(x.bits & 0x8000) << 16) | (magnitude >= 0x0f800000 ? special : finite));
}

// To the nearest, ties to even; NaN becomes the quiet NaN.
template <typename T, typename A>
inline T narrowed(A x) {
  if constexpr (kSame<T, BFloat16>) {
    const uint32_t bits = bits_of(x);
    return {uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (kSame<T, Half>) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // 0.5 is 2^23 steps of 2^-24
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const uint32_t finite = magnitude < 0x38800000 ? denormal : magnitude < 0x477ff000 ? normal : 0x7c00;
    return {uint16_t((bits >> 16 & 0x8000) | (magnitude > 0x7f800000 ? 0x7e00 : finite))};
  } else {
    return T(x);
  }
}

// to[i] = from[i], i < count.
template <typename A, typename T>
inline void convert_run(const T* from, A* to, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (kSame<T, Half> && kSame<A, float>)
    for (; i + 16 <= count; i += 16)
      _mm512_storeu_ps(to + i,
                       _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(from + i))));
#elif defined(__AVX2__)
  if constexpr (kSame<T, Half> && kSame<A, float>)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = A(widen(from[i]));
}

template <typename A, typename T>
inline void narrow_run(const A* from, T* to, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (kSame<T, Half> && kSame<A, float>)
    for (; i + 16 <= count; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to + i),
                          _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from + i), 0));
#elif defined(__AVX2__)
  if constexpr (kSame<T, Half> && kSame<A, float>)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i_u*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < count; ++i) to[i] = narrowed<T>(from[i]);
}

// Calls f with a null pointer to elements of the type.
template <typename F>
inline void with_type(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f(static_cast<const float*>(nullptr));
    case Element::kDouble: return f(static_cast<const double*>(nullptr));
    case Element::kHalf: return f(static_cast<const Half*>(nullptr));
    case Element::kBFloat16: return f(static_cast<const BFloat16*>(nullptr));
    case Element::kUInt8: return f(static_cast<const uint8_t*>(nullptr));
    case Element::kInt8: return f(static_cast<const int8_t*>(nullptr));
    case Element::kInt16: return f(static_cast<const int16_t*>(nullptr));
    case Element::kInt32: return f(static_cast<const int32_t*>(nullptr));
    case Element::kInt64: return f(static_cast<const int64_t*>(nullptr));
  }
}

// Calls f.template operator()<T, A>() with the types of elements of floating point and of their arithmetic.
template <typename F>
inline auto with_types(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f.template operator()<float, float>();
    case Element::kDouble: return f.template operator()<double, double>();
    case Element::kHalf: return f.template operator()<Half, float>();
    default: return f.template operator()<BFloat16, float>();
  }
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
