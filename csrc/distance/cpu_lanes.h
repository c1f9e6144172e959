// Vectors of the element types that distances need beyond those of common/simd.h.
#pragma once

#include <utility>

#include "common/simd.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename T, int kCount = kVectorBytes / static_cast<int>(sizeof(T))>
struct LaneTypes {
  typedef T Type __attribute__((vector_size(kCount * sizeof(T))));
  typedef T Loose __attribute__((vector_size(kCount * sizeof(T)), aligned(1), may_alias));
};
template <typename T>
using Lanes = typename LaneTypes<T>::Type;
template <typename T>
constexpr int kLaneCount = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Lanes<T> load_lanes(const T* p) {
  return *reinterpret_cast<const typename LaneTypes<T>::Loose*>(p);
}
template <typename T>
inline void store_lanes(T* p, Lanes<T> v) {
  *reinterpret_cast<typename LaneTypes<T>::Loose*>(p) = v;
}
template <typename T>
inline Lanes<T> all_lanes(T s) {
  return s - Lanes<T>{};
}
template <typename V>
inline V lanes_min(V a, V b) {
  return a < b ? a : b;
}
template <typename V>
inline V lanes_max(V a, V b) {
  return a < b ? b : a;
}

// Whether any lane of v is above `bound`: the question that ends every scan.
inline bool any_above(Lanes<uint16_t> v, uint16_t bound) {
#if defined(__AVX512BW__)
  return _mm512_cmpgt_epu16_mask((__m512i)v, _mm512_set1_epi16(static_cast<short>(bound))) != 0;
#elif defined(__AVX2__)
  const __m256i above = _mm256_subs_epu16((__m256i)v, _mm256_set1_epi16(static_cast<short>(bound)));
  return !_mm256_testz_si256(above, above);
#elif defined(__SSE4_1__)
  const __m128i above = _mm_subs_epu16((__m128i)v, _mm_set1_epi16(static_cast<short>(bound)));
  return !_mm_testz_si128(above, above);
#else
  bool any = false;
  for (int i = 0; i < kLaneCount<uint16_t>; ++i) any |= v[i] > bound;
  return any;
#endif
}
// Whether a comparison of vectors holds in any lane.
template <typename M>
inline bool any_lane(M mask) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(mask[0]) == 4) return _mm512_movepi32_mask((__m512i)mask) != 0;
  return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE4_1__)
  return !_mm_testz_si128((__m128i)mask, (__m128i)mask);
#else
  bool any = false;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(mask[0])); ++i) any |= mask[i] != 0;
  return any;
#endif
}
template <typename T>
inline bool any_above(Lanes<T> v, T bound) {
  return any_lane(v > all_lanes<T>(bound));
}

// Lanes moved by kStep towards higher (up) or lower (down) numbers, zeros moved in.
template <int kStep, typename V, int... I>
inline V shifted_up(V v, std::integer_sequence<int, I...>) {
  constexpr int kCount = sizeof...(I);
  return __builtin_shufflevector(V{}, v, (I >= kStep ? kCount + I - kStep : I)...);
}
template <int kStep, typename V, int... I>
inline V shifted_down(V v, std::integer_sequence<int, I...>) {
  constexpr int kCount = sizeof...(I);
  return __builtin_shufflevector(v, V{}, (I + kStep < kCount ? I + kStep : kCount + I)...);
}
template <int kLane, typename V, int... I>
inline V one_lane(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I * 0 + kLane)...);
}

// The largest of the lanes up to and including each, or from it on.
template <typename T, int kStep = 1>
inline Lanes<T> running_max_up(Lanes<T> v) {
  if constexpr (kStep < kLaneCount<T>) {
    v = lanes_max(v, shifted_up<kStep>(v, std::make_integer_sequence<int, kLaneCount<T>>{}));
    return running_max_up<T, 2 * kStep>(v);
  }
  return v;
}
template <typename T, int kStep = 1>
inline Lanes<T> running_max_down(Lanes<T> v) {
  if constexpr (kStep < kLaneCount<T>) {
    v = lanes_max(v, shifted_down<kStep>(v, std::make_integer_sequence<int, kLaneCount<T>>{}));
    return running_max_down<T, 2 * kStep>(v);
  }
  return v;
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
