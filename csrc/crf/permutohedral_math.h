// Arithmetic of the permutohedral lattice (Adams, Baek, Davis 2010, sections 3 and 4) that host and device share.
// Torch-free. Functions are static: units for different instruction sets must not share one. V is a number, or a vector
// of numbers T of which each lane is a point of its own.
//
// The lattice lives on the hyperplane of R^(d+1) on which coordinates sum to zero. Its vertices are the integer points
// there whose coordinates all have one remainder modulo d + 1. A point lies in a simplex of d + 1 vertices, one of each
// remainder.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PYSEG_HOST_DEVICE __host__ __device__
#else
#define PYSEG_HOST_DEVICE
#endif

namespace pyseg::crf {

constexpr int kMostFeatures = 8;

// Coordinates of vertices are 16-bit numbers. Those of a point differ from its vertices' and their neighbours' by less.
static PYSEG_HOST_DEVICE constexpr int key_margin(int d) { return 3 * (d + 1); }
static PYSEG_HOST_DEVICE constexpr int most_coordinate(int d) { return 32767 - key_margin(d); }

// What feature i is multiplied by before `embed`: the basis vectors of the hyperplane get length one, and the blur
// [1/2 1 1/2] along the lattice's directions the standard deviation 1 / scale in units of the features.
static inline double feature_scale(int d, int i, double scale) {
  return scale * (d + 1) * std::sqrt(2.0 / 3.0) / std::sqrt(double(i + 1) * double(i + 2));
}

// The point on the hyperplane for scaled features [d]: elevated[j] = sum of features j.. - j * feature j - 1.
template <int kD, typename T, typename V>
static PYSEG_HOST_DEVICE inline void embed(const V* scaled, V* elevated) {
  V sum = scaled[kD - 1];
  elevated[kD] = scaled[kD - 1] * T(-kD);
  for (int j = kD - 1; j > 0; --j) {
    elevated[j] = sum - scaled[j - 1] * T(j);
    sum = sum + scaled[j - 1];
  }
  elevated[0] = sum;
}

// The transpose of `embed`.
template <int kD, typename T, typename V>
static PYSEG_HOST_DEVICE inline void embed_transpose(const V* grad_elevated, V* grad_scaled) {
  V sum = grad_elevated[0];
  for (int i = 0; i < kD; ++i) {
    grad_scaled[i] = sum - grad_elevated[i + 1] * T(i + 1);
    sum = sum + grad_elevated[i + 1];
  }
}

// The nearest integer, for |x| below 2^22 (float) or 2^51 (double).
static PYSEG_HOST_DEVICE constexpr float rounding_shift(float) { return 12582912.f; }
static PYSEG_HOST_DEVICE constexpr double rounding_shift(double) { return 6755399441055744.0; }

// The simplex that encloses a point. base: its vertex of remainder zero. rank: a permutation of 0..d by which the other
// vertices follow (`corner_coordinate`).
template <int kD, typename T, typename V>
static PYSEG_HOST_DEVICE inline void enclosing_simplex(const V* elevated, V* base, V* rank) {
  constexpr T kPeriod = kD + 1;
  const V zero = elevated[0] - elevated[0];
  V sum = zero;  // of the rounded coordinates, in periods
  for (int i = 0; i <= kD; ++i) {
    const V shifted = elevated[i] * (T(1) / kPeriod) + rounding_shift(T());
    const V rounded = shifted - rounding_shift(T());
    sum = sum + rounded;
    base[i] = rounded * kPeriod;
    rank[i] = zero;
  }
  for (int i = 0; i < kD; ++i) {
    const V offset = elevated[i] - base[i];
    for (int j = i + 1; j <= kD; ++j) {
      const auto less = offset < elevated[j] - base[j];
      rank[i] = less ? rank[i] + T(1) : rank[i];
      rank[j] = less ? rank[j] : rank[j] + T(1);
    }
  }
  for (int i = 0; i <= kD; ++i) {  // back onto the hyperplane: those that were rounded the farthest step one period
    const V moved = rank[i] + sum;
    const auto below = moved < zero;
    const auto above = moved > zero + T(kD);
    rank[i] = below ? moved + kPeriod : above ? moved - kPeriod : moved;
    base[i] = below ? base[i] + kPeriod : above ? base[i] - kPeriod : base[i];
  }
}

// weight[r] of the vertex with remainder r. With s[k] = (elevated - base) / (d + 1) of the coordinate with rank k:
// weight[r] = s[d - r] - s[d - r + 1], where s[d + 1] stands for s[0] - 1.
template <int kD, typename T, typename V>
static PYSEG_HOST_DEVICE inline void barycentric_weights(const V* elevated, const V* base, const V* rank, V* weight) {
  const V zero = elevated[0] - elevated[0];
  V sorted[kD + 1];
  for (int k = 0; k <= kD; ++k) sorted[k] = zero;
  for (int i = 0; i <= kD; ++i) {
    const V offset = (elevated[i] - base[i]) * (T(1) / T(kD + 1));
    for (int k = 0; k <= kD; ++k) sorted[k] = rank[i] == zero + T(k) ? offset : sorted[k];
  }
  weight[0] = sorted[kD] - sorted[0] + T(1);
  for (int r = 1; r <= kD; ++r) weight[r] = sorted[kD - r] - sorted[kD - r + 1];
}

// Coordinate i of the vertex with remainder r.
template <int kD, typename T, typename V>
static PYSEG_HOST_DEVICE inline V corner_coordinate(const V& base, const V& rank, int r) {
  return rank > rank - rank + T(kD - r) ? base + T(r - (kD + 1)) : base + T(r);
}

// The gradient of the elevated coordinates from that of the weights.
template <int kD, typename T, typename V>
static PYSEG_HOST_DEVICE inline void barycentric_weights_vjp(const V* grad_weight, const V* rank, V* grad_elevated) {
  const V zero = rank[0] - rank[0];
  for (int i = 0; i <= kD; ++i) {
    V grad = zero;
    for (int k = 0; k <= kD; ++k) {
      const int r = kD - k;
      grad = rank[i] == zero + T(k) ? grad_weight[r] - grad_weight[r == kD ? 0 : r + 1] : grad;
    }
    grad_elevated[i] = grad * (T(1) / T(kD + 1));
  }
}

// The standard deviation of the blur is that of a kernel with this peak (Adams et al. 2010's implementation): by it the
// filter of a single point gives it back about once.
static inline double blur_scale(int d) { return 1 / (1 + std::pow(2.0, -d)); }

}  // namespace pyseg::crf
