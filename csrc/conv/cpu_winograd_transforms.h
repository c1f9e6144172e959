// One-dimensional transforms of the tiles of atrous_conv2d_math.h, on vectors of channels.
// U is a vector or a scalar (for the last channels). Inputs outside the map are read from a row of zeros.
#pragma once

#include "common/simd.h"
#include "conv/atrous_conv2d_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// r = B^T d.
template <int KIND, typename U>
inline void input_transform(const U* d, U* r) {
  if constexpr (KIND == kF4) {
    const U a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
    r[0] = 4 * d[0] - 5 * d[2] + d[4];
    r[1] = a + b;
    r[2] = a - b;
    r[3] = c + e;
    r[4] = c - e;
    r[5] = 4 * d[1] - 5 * d[3] + d[5];
  } else if constexpr (KIND == kF3) {
    r[0] = 4 * (d[0] - d[2]) + 2 * (d[3] - d[1]);
    r[1] = 3 * (d[3] - d[2]) - 6 * d[1];
    r[2] = d[3] - 3 * d[2] + 2 * d[1];
    r[3] = 4 * (d[3] - d[1]);
    r[4] = d[4] - d[2] + 2 * (d[1] - d[3]);
  } else if constexpr (KIND == kF2) {
    r[0] = 4 * (d[0] - d[2]);
    r[1] = -3 * (d[1] + d[2]);
    r[2] = 3 * (d[1] - d[2]);
    r[3] = d[3] - d[1];
  } else if constexpr (KIND == kE2) {
    r[0] = d[0] + d[1];
    r[1] = d[1];
    r[2] = d[0];
  } else {
    constexpr TileSpec spec = kTileSpecs[KIND];
    for (int i = 0; i < spec.inputs; ++i) r[i] = d[i];
  }
}

// y = A^T m.
template <int KIND, typename U>
inline void output_transform(const U* m, U* y) {
  if constexpr (KIND == kF4) {
    const U s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = m[0] + s1 + s2;
    y[1] = d1 + 2 * d2;
    y[2] = s1 + 4 * s2;
    y[3] = d1 + 8 * d2 + m[5];
  } else if constexpr (KIND == kF3) {
    const U s1 = m[1] + m[2], d1 = m[1] - m[2];
    y[0] = m[0] + s1 + m[3];
    y[1] = d1 + 2 * m[3];
    y[2] = s1 + 4 * m[3] + m[4];
  } else if constexpr (KIND == kF2) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  } else if constexpr (KIND == kE2) {
    y[0] = m[0] + m[1];
    y[1] = m[0] - m[2];
  } else {
    constexpr TileSpec spec = kTileSpecs[KIND];
    y[0] = U{};
    for (int i = 0; i < spec.products; ++i) y[0] = y[0] + m[i];
  }
}

// m = A y, the adjoint of output_transform: what a gradient of the outputs means for the products.
template <int KIND, typename U>
inline void output_adjoint(const U* y, U* m) {
  if constexpr (KIND == kF4) {
    const U e = y[0] + y[2], o = y[1] + y[3], e2 = y[0] + 4 * y[2], o2 = 2 * y[1] + 8 * y[3];
    m[0] = y[0];
    m[1] = e + o;
    m[2] = e - o;
    m[3] = e2 + o2;
    m[4] = e2 - o2;
    m[5] = y[3];
  } else if constexpr (KIND == kF3) {
    const U e = y[0] + y[2];
    m[0] = y[0];
    m[1] = e + y[1];
    m[2] = e - y[1];
    m[3] = y[0] + 2 * y[1] + 4 * y[2];
    m[4] = y[2];
  } else if constexpr (KIND == kF2) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = y[1];
  } else if constexpr (KIND == kE2) {
    m[0] = y[0] + y[1];
    m[1] = y[0];
    m[2] = -y[1];
  } else {
    constexpr TileSpec spec = kTileSpecs[KIND];
    for (int i = 0; i < spec.products; ++i) m[i] = y[0];
  }
}

// Where channel c of a line lies: rows keep channels together, panels keep blocks of 16 channels `block` apart.
struct ChannelLayout {
  int64_t block;
  inline int64_t operator()(int64_t c) const { return (c >> 4) * block + (c & 15); }
};
struct RowLayout {
  inline int64_t operator()(int64_t c) const { return c; }
};

// Applies `transform` to `lines` sets of IN lines of n values: line i of set l is at in(l, i), and value r of the set at
// channel c goes to out(l, r)[layout(c)].
template <int IN, int OUT, typename T, typename In, typename Transform, typename Out, typename Layout>
inline void transform_lines(const In& in, int lines, int64_t n, const Transform& transform, const Out& out,
                            const Layout& layout) {
  for (int l = 0; l < lines; ++l) {
    // Local copies: vector stores may alias anything, so the compiler would reload the pointers after each.
    const T* src[IN > 0 ? IN : 1];
    T* dst[OUT];
#pragma GCC unroll 6
    for (int i = 0; i < IN; ++i) src[i] = in(l, i);
#pragma GCC unroll 6
    for (int i = 0; i < OUT; ++i) dst[i] = out(l, i);
    int64_t c = 0;
    for (; c + kLanes<T> <= n; c += kLanes<T>) {
      Vec<T> d[IN > 0 ? IN : 1], r[OUT];
#pragma GCC unroll 6
      for (int i = 0; i < IN; ++i) d[i] = load(src[i] + c);
      transform(d, r);
      const int64_t at = layout(c);
#pragma GCC unroll 6
      for (int i = 0; i < OUT; ++i) store(dst[i] + at, r[i]);
    }
    for (; c < n; ++c) {
      T d[IN > 0 ? IN : 1], r[OUT];
      for (int i = 0; i < IN; ++i) d[i] = src[i][c];
      transform(d, r);
      for (int i = 0; i < OUT; ++i) dst[i][layout(c)] = r[i];
    }
  }
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
