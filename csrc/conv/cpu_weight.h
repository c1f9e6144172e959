// Packing of dense weights into panels, their Winograd transform and its adjoint.
#pragma once

#include "common/simd.h"
#include "conv/atrous_conv2d_cpu_kernel.h"
#include "conv/cpu_gemm.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// to[tap * tap_stride + k * 16 + j] = weight(16 panel + j, k0 + k, tap), zero beyond C_out.
template <typename T>
inline void pack_panel(const Weight<T>& w, int64_t c_out, int64_t panel, int64_t k0, int64_t k, int taps, T* to,
                       int64_t tap_stride) {
  const int64_t columns = smaller<int64_t>(kPanel, c_out - panel * kPanel);
  for (int64_t kk = 0; kk < k; ++kk) {
    const T* from = w.data + panel * kPanel * w.stride_out + (k0 + kk) * w.stride_in;
    T* row = to + kk * kPanel;
    for (int64_t j = 0; j < kPanel; ++j) {
      for (int t = 0; t < taps; ++t)
        row[t * tap_stride + j] = j < columns ? from[j * w.stride_out + t * w.stride_tap] : T(0);
    }
  }
}

// All functionals of three taps, in the order of enum Functional.
template <typename U>
inline void functionals(const U& w0, const U& w1, const U& w2, U* f) {
  using T = decltype(w0[0] + w0[0]);
  const U s = w0 + w2, q = w0 + 4 * w2, h = 2 * w1;
  f[kAt0] = T(1. / 4) * w0;
  f[kAt1] = T(-1. / 6) * (s + w1);
  f[kAtM1] = T(-1. / 6) * (s - w1);
  f[kAt2] = T(1. / 24) * (q + h);
  f[kAtM2] = T(1. / 24) * (q - h);
  f[kAtInf] = w2;
  f[kFirst] = w0;
  f[kCentre] = w1;
  f[kLow] = w1 - w0;
  f[kHigh] = w2 - w1;
}

// u[pair * u_stride + k * 16 + j] for every pair in use, from taps[tap * tap_stride + k * 16 + j].
template <typename T>
inline void transform_weights(const T* taps, int64_t tap_stride, int64_t k, T* u, int64_t u_stride,
                              const int16_t (&pair_of)[kFunctionals][kFunctionals]) {
  T* to[kFunctionals][kFunctionals];
  bool used[kFunctionals];
  for (int i = 0; i < kFunctionals; ++i) {
    used[i] = false;
    for (int j = 0; j < kFunctionals; ++j) {
      to[i][j] = pair_of[i][j] < 0 ? nullptr : u + pair_of[i][j] * u_stride;
      used[i] |= pair_of[i][j] >= 0;
    }
  }
  for (int64_t at = 0; at < k * kPanel; at += kLanes<T>) {
    Vec<T> rows[3][kFunctionals];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x)
      functionals(load(taps + x * tap_stride + at), load(taps + (3 + x) * tap_stride + at),
                  load(taps + (6 + x) * tap_stride + at), rows[x]);
    for (int i = 0; i < kFunctionals; ++i) {
      if (!used[i]) continue;
      Vec<T> f[kFunctionals];
      functionals(rows[0][i], rows[1][i], rows[2][i], f);
#pragma GCC unroll 10
      for (int j = 0; j < kFunctionals; ++j)
        if (to[i][j]) store(to[i][j] + at, f[j]);
    }
  }
}

// The adjoint of `functionals`: what gradients of the functionals mean for the taps.
template <typename U>
inline void functionals_adjoint(const U* f, U* w) {
  using T = decltype(f[0][0] + f[0][0]);
  const U s1 = f[kAt1] + f[kAtM1], d1 = f[kAt1] - f[kAtM1], s2 = f[kAt2] + f[kAtM2], d2 = f[kAt2] - f[kAtM2];
  w[0] = T(1. / 4) * f[kAt0] - T(1. / 6) * s1 + T(1. / 24) * s2 + f[kFirst] - f[kLow];
  w[1] = T(1. / 12) * d2 - T(1. / 6) * d1 + f[kCentre] + f[kLow] - f[kHigh];
  w[2] = T(1. / 6) * (s2 - s1) + f[kAtInf] + f[kHigh];
}

// taps[tap * size + at] from u[pair * size + at], the adjoint of transform_weights; pairs not in use count as zero.
template <typename T>
inline void weights_adjoint(const T* u, int64_t size, const int16_t (&pair_of)[kFunctionals][kFunctionals], T* taps) {
  for (int64_t at = 0; at < size; at += kLanes<T>) {
    Vec<T> columns[3][kFunctionals];  // [tap x][functional y]
    for (int i = 0; i < kFunctionals; ++i) {
      Vec<T> f[kFunctionals], w[3];
      for (int j = 0; j < kFunctionals; ++j) f[j] = pair_of[i][j] < 0 ? Vec<T>{} : load(u + pair_of[i][j] * size + at);
      functionals_adjoint(f, w);
      for (int x = 0; x < 3; ++x) columns[x][i] = w[x];
    }
    for (int x = 0; x < 3; ++x) {
      Vec<T> w[3];
      functionals_adjoint(columns[x], w);
      for (int y = 0; y < 3; ++y) store(taps + (y * 3 + x) * size + at, w[y]);
    }
  }
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
