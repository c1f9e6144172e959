// exp and log of vectors for one CPU target. float by polynomials (below), double by the C library, lane by lane.
//
// exp(x) = 2^n exp(r), n the integer nearest to x / ln 2, |r| <= ln 2 / 2, with ln 2 in two parts so that r is exact to
// rounding (Cody and Waite 1980); exp(r) = 1 + r + r^2 q(r). log(x) = k ln 2 + log(1 + f), sqrt(1/2) <= 1 + f <
// sqrt(2); log(1 + f) = f - f^2 / 2 + f^3 q(f). Each q is our own fit: minimax in relative error by Lawson's
// reweighting, rounded to float. Both are within 2 units in the last place; tests/loss/test_cpu_math.py measures it.
#pragma once

#include <math.h>

#include "common/simd.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

typedef int32_t VecInt __attribute__((vector_size(kVectorBytes)));

// exp(x) for x <= 0: exp(-0) = exp(0) = 1, exp(-inf) = 0, NaN stays; results below the least normal number become 0. V is
// a vector of any number of floats.
template <typename V>
inline V exp_nonpositive_float(V x) {
  typedef decltype(x < x) Int;
  constexpr float kLeast = -87.33654f;          // exp of less is denormal
  constexpr float kShift = 12582912.f + 127.f;  // 1.5 * 2^23: the sum's last bits are n plus the exponent's bias
  const V t = x * 1.44269504f + kShift;         // 1 / ln 2
  const V n = t - kShift;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V y = r * 0.008312522f + 0.041890156f;
  y = y * r + 0.16667114f;
  y = y * r + 0.49999231f;
  y = y * (r * r) + r + 1.f;
  const V scale = (V)((Int)t << 23);  // 2^n
  return x < kLeast ? V{} : y * scale;
}

inline Vec<float> exp_nonpositive(Vec<float> x) { return exp_nonpositive_float(x); }

// log(x): log(0) = -inf, log(inf) = inf, NaN for x < 0 and for NaN; denormal numbers count in full.
inline Vec<float> log(Vec<float> x) {
  constexpr float kLeastNormal = 1.17549435e-38f;
  const VecInt small = x < kLeastNormal;
  const Vec<float> m = small ? x * 8388608.f : x;  // 2^23
  // Exponents counted from sqrt(1/2), so that the fraction lies in [sqrt(1/2), sqrt(2)).
  const VecInt from_half = (VecInt)m - 0x3f3504f3;
  const VecInt k = (from_half >> 23) - (small & 23);
  const Vec<float> f = (Vec<float>)((from_half & 0x007fffff) + 0x3f3504f3) - 1.f;
  const Vec<float> kf = __builtin_convertvector(k, Vec<float>);
  Vec<float> q = f * 0.087003639f - 0.1427152f;
  q = q * f + 0.1491649f;
  q = q * f - 0.16577188f;
  q = q * f + 0.19962884f;
  q = q * f - 0.25001346f;
  q = q * f + 0.33333915f;
  const Vec<float> ff = f * f;
  const Vec<float> y = ((q * f - 0.5f) * ff + kf * -2.12194440e-4f) + f + kf * 0.693359375f;
  const Vec<float> infinity = broadcast<float>(__builtin_inff());
  const Vec<float> special = x == Vec<float>{} ? -infinity : x == infinity ? x : infinity - infinity;
  return x > Vec<float>{} && x < infinity ? y : special;
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

inline Vec<double> log(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::log(x[i]);
  return x;
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
