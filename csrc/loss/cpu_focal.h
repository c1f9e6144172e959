// The focal factor and its derivatives, for the exponents that need no power and for any other.
#pragma once

#include "common/cpu_math.h"
#include "loss/segmentation_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

enum class Gamma { kZero, kOne, kTwo, kAny };

// Calls f with the exponent as a constant.
template <Gamma kGamma>
struct GammaTag {
  static constexpr Gamma value = kGamma;
};
template <typename F>
inline void with_gamma(double gamma, const F& f) {
  if (gamma == 0) return f(GammaTag<Gamma::kZero>{});
  if (gamma == 1) return f(GammaTag<Gamma::kOne>{});
  if (gamma == 2) return f(GammaTag<Gamma::kTwo>{});
  f(GammaTag<Gamma::kAny>{});
}

// x^gamma, 0^0 = 1.
template <Gamma kGamma, typename A>
inline Vec<A> power(Vec<A> x, Vec<A> gamma) {
  if constexpr (kGamma == Gamma::kZero) return broadcast<A>(A(1));
  if constexpr (kGamma == Gamma::kOne) return x;
  if constexpr (kGamma == Gamma::kTwo) return x * x;
  return exp_nonpositive(gamma * log(x));
}

// x * y with 0 * inf = 0: a probability that vanished times its logarithm.
template <typename A>
inline Vec<A> product(Vec<A> x, Vec<A> y) {
  return x == Vec<A>{} ? Vec<A>{} : x * y;
}

// q = (1 - p)^gamma + gamma p (1 - p)^(gamma - 1) (-log p), from p, 1 - p and -log p.
template <Gamma kGamma, typename A>
inline Vec<A> focal_slope(Vec<A> p, Vec<A> rest, Vec<A> minus_log, Vec<A> gamma) {
  if constexpr (kGamma == Gamma::kZero) return broadcast<A>(A(1));
  const Vec<A> pl = product<A>(p, minus_log);
  if constexpr (kGamma == Gamma::kOne) return rest + pl;
  if constexpr (kGamma == Gamma::kTwo) return rest * (rest + (pl + pl));
  // For gamma < 1 the second term's power has no limit at p = 1, though the term has: (1 - p)^gamma <= ... -> 0.
  constexpr A kTiny = A(1e-30);
  const Vec<A> base = rest < kTiny ? broadcast<A>(kTiny) : rest;
  const Vec<A> raised = power<kGamma, A>(base, gamma);
  return raised + gamma * pl * raised / base;
}

// 1 - p of a softmax's p. Where p is so near 1 that the difference is rounding, its lower bound p (-log p) is nearer.
template <typename A>
inline Vec<A> one_minus(Vec<A> p, Vec<A> minus_log) {
  const Vec<A> rest = A(1) - p, bound = product<A>(p, minus_log);
  return rest < bound ? bound : rest;
}

// What a row of probabilities is reduced from.
template <typename A>
struct Probability {
  Vec<A> p, rest;          // p, 1 - p
  Vec<A> log_p, log_rest;  // -log p, -log(1 - p)
};

// z -> sigmoid(z). With e = exp(-|z|), u = 1 + e: log(1 + e) = log u + (e - (u - 1)) / u, exact though u is rounded.
template <typename A>
inline Probability<A> sigmoid_of(Vec<A> z) {
  const Vec<A> zero{};
  const Vec<A> magnitude = z < zero ? -z : z;
  const Vec<A> e = exp_nonpositive(-magnitude);
  const Vec<A> u = A(1) + e, r = A(1) / u;
  const Vec<A> l = log(u) + (e - (u - A(1))) * r;
  const Vec<A> large = r, small = e * r;
  const auto negative = z < zero;
  return {negative ? small : large, negative ? large : small, negative ? l - z : l, negative ? l : l + z};
}

// The same for those who need no logarithms.
template <typename A>
inline Probability<A> sigmoid_without_logs(Vec<A> z) {
  const auto negative = z < Vec<A>{};
  const Vec<A> e = exp_nonpositive(negative ? z : -z), large = A(1) / (A(1) + e), small = e * large;
  return {negative ? small : large, negative ? large : small, Vec<A>{}, Vec<A>{}};
}

// Probabilities as they are.
template <typename A>
inline Probability<A> probability_of(Vec<A> p) {
  const Vec<A> rest = A(1) - p, most = broadcast<A>(A(-kLeastLog));
  const Vec<A> log_p = -log(p), log_rest = -log(rest);
  return {p, rest, log_p > most ? most : log_p, log_rest > most ? most : log_rest};
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
