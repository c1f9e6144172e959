// Rows: the channels of a pixel or of a lattice's vertex side by side, padded with zeros to whole vectors, so that
// splatting, blurring and slicing are arithmetic on whole rows.
#pragma once

#include <math.h>

#include "common/cpu_math.h"
#include "common/simd.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename T, int kWidth>
struct RowVecTypes;
#define PYSEG_ROW_VEC(T, kWidth)                                                                         \
  template <>                                                                                            \
  struct RowVecTypes<T, kWidth> {                                                                        \
    typedef T Vec __attribute__((vector_size(kWidth * sizeof(T))));                                      \
    typedef T Unaligned __attribute__((vector_size(kWidth * sizeof(T)), aligned(sizeof(T)), may_alias)); \
  };
PYSEG_ROW_VEC(float, 4)
PYSEG_ROW_VEC(double, 2)
#if defined(__AVX2__)
PYSEG_ROW_VEC(float, 8)
PYSEG_ROW_VEC(double, 4)
#endif
#if defined(__AVX512F__)
PYSEG_ROW_VEC(float, 16)
#endif
#undef PYSEG_ROW_VEC

#if defined(__AVX512F__)
// 24 floats, the padded channels of 17 to 24 classes, in a whole and half a register.
struct Vec24 {
  RowVecTypes<float, 16>::Vec low;
  RowVecTypes<float, 8>::Vec high;
};
inline Vec24 operator+(Vec24 a, Vec24 b) { return {a.low + b.low, a.high + b.high}; }
inline Vec24 operator*(Vec24 a, Vec24 b) { return {a.low * b.low, a.high * b.high}; }
inline Vec24 operator*(Vec24 a, float b) { return {a.low * b, a.high * b}; }
inline Vec24 operator-(float a, Vec24 b) { return {a - b.low, a - b.high}; }
inline Vec24& operator+=(Vec24& a, Vec24 b) { return a = a + b; }
#endif

// The layout of rows: chunks of kVectors vectors V, of which there is one where kOne is set.
template <typename Element, typename Vector, int kVectors, bool kOne>
struct Rows {
  using T = Element;
  using V = Vector;
  static constexpr int kLane = sizeof(V) / sizeof(T), kN = kVectors, kChunk = kLane * kVectors;
  static constexpr bool kSingle = kOne;

  explicit Rows(int64_t channels) : chunks_((channels + kChunk - 1) / kChunk) {}
  int64_t chunks() const { return kOne ? 1 : chunks_; }
  int64_t stride() const { return kOne ? kChunk : chunks_ * kChunk; }

  static V load(const T* p) { return *reinterpret_cast<const typename RowVecTypes<T, kLane>::Unaligned*>(p); }
  static void store(T* p, V v) { *reinterpret_cast<typename RowVecTypes<T, kLane>::Unaligned*>(p) = v; }

 private:
  int64_t chunks_;
};

#if defined(__AVX512F__)
struct Rows24 {
  using T = float;
  using V = Vec24;
  static constexpr int kLane = 24, kN = 1, kChunk = 24;
  static constexpr bool kSingle = true;

  int64_t chunks() const { return 1; }
  int64_t stride() const { return kChunk; }

  static V load(const T* p) {
    return {*reinterpret_cast<const RowVecTypes<T, 16>::Unaligned*>(p),
            *reinterpret_cast<const RowVecTypes<T, 8>::Unaligned*>(p + 16)};
  }
  static void store(T* p, V v) {
    *reinterpret_cast<RowVecTypes<T, 16>::Unaligned*>(p) = v.low;
    *reinterpret_cast<RowVecTypes<T, 8>::Unaligned*>(p + 16) = v.high;
  }
};
#endif

constexpr int64_t kMostOneChunk = 32;  // channels

// Calls f(rows) with the layout for this number of channels.
template <typename F>
inline auto with_rows(bool float64, int64_t channels, const F& f) {
#if defined(__AVX2__)
  constexpr int kWidth = 8;
#else
  constexpr int kWidth = 4;
#endif
  using Narrow = RowVecTypes<float, 4>::Vec;
  using Usual = RowVecTypes<float, kWidth>::Vec;
  if (float64) return f(Rows<double, RowVecTypes<double, kWidth / 2>::Vec, 16 / kWidth, false>(channels));
  if (channels <= 4) return f(Rows<float, Narrow, 1, true>(channels));
  if (channels <= 8) return f(Rows<float, Usual, 8 / kWidth, true>(channels));
#if defined(__AVX512F__)
  constexpr int kWide = 16;
  if (channels > 16 && channels <= 24) return f(Rows24());
#else
  constexpr int kWide = kWidth;
  if (channels > 16 && channels <= 24) return f(Rows<float, Usual, 24 / kWidth, true>(channels));
#endif
  using Wide = RowVecTypes<float, kWide>::Vec;
  if (channels <= 16) return f(Rows<float, Wide, 16 / kWide, true>(channels));
  if (channels <= 32) return f(Rows<float, Wide, 32 / kWide, true>(channels));
  return f(Rows<float, Wide, 32 / kWide, false>(channels));
}

template <typename V>
struct HalfOf;
#if defined(__AVX2__)
template <>
struct HalfOf<RowVecTypes<float, 8>::Vec> {
  typedef RowVecTypes<float, 4>::Vec type;
};
#endif
#if defined(__AVX512F__)
template <>
struct HalfOf<RowVecTypes<float, 16>::Vec> {
  typedef RowVecTypes<float, 8>::Vec type;
};
#endif

// f of the lower and the upper half of the lanes.
template <typename V, typename F>
inline auto reduce_halves(V v, const F& f) {
  typedef typename HalfOf<V>::type Half;
  Half low, high;
  __builtin_memcpy(&low, &v, sizeof(Half));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
  return f(low, high);
}

// Combines all lanes with f(a, b) of vectors or numbers, in a fixed order.
template <typename V, typename F>
inline auto reduce(V v, const F& f) {
  constexpr int kWidth = sizeof(V) / sizeof(v[0]);
  if constexpr (kWidth == 2) {
    return f(v[0], v[1]);
  } else if constexpr (kWidth == 4) {
    return f(f(v[0], v[2]), f(v[1], v[3]));
  } else {
    return reduce(reduce_halves(v, f), f);
  }
}

constexpr auto kSum = [](auto a, auto b) { return a + b; };
constexpr auto kMin = [](auto a, auto b) { return b < a ? b : a; };

template <typename V>
inline auto reduce_sum(V v) {
  return reduce(v, kSum);
}
template <typename V>
inline auto reduce_min(V v) {
  return reduce(v, kMin);
}
template <typename V>
inline V row_min(V a, V b) {
  return kMin(a, b);
}

template <typename V>
inline V row_exp(V x) {
  if constexpr (sizeof(x[0]) == sizeof(float)) {
    return exp_nonpositive_float(x);
  } else {
    for (size_t i = 0; i < sizeof(V) / sizeof(double); ++i) x[i] = ::exp(x[i]);
    return x;
  }
}

#if defined(__AVX512F__)
inline float reduce_sum(Vec24 v) { return reduce(reduce_halves(v.low, kSum) + v.high, kSum); }
inline float reduce_min(Vec24 v) { return reduce(kMin(reduce_halves(v.low, kMin), v.high), kMin); }
inline Vec24 row_min(Vec24 a, Vec24 b) { return {kMin(a.low, b.low), kMin(a.high, b.high)}; }
inline Vec24 row_exp(Vec24 x) { return {exp_nonpositive_float(x.low), exp_nonpositive_float(x.high)}; }
#endif

// to[j * rows.stride() + c] = from[c * points + j] for j < count and c < channels, zero for other c.
template <typename R, typename T>
inline void pack_rows(const R& rows, const T* from, int64_t points, int64_t channels, int64_t count, T* to, T pad) {
  const int64_t stride = rows.stride();
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < count; ++j) to[j * stride + c] = from[c * points + j];
  for (int64_t c = channels; c < stride; ++c)
    for (int64_t j = 0; j < count; ++j) to[j * stride + c] = pad;
}

template <typename R, typename T>
inline void unpack_rows(const R& rows, const T* from, int64_t points, int64_t channels, int64_t count, T* to) {
  const int64_t stride = rows.stride();
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < count; ++j) to[c * points + j] = from[j * stride + c];
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
