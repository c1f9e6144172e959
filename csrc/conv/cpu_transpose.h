// Copies between NCHW and channels_last.
#pragma once

#include <utility>

#include "common/cpu_workers.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kTransposeBlock = 16;  // a square of 16 x 16 floats: whole cache lines on both sides

// The first (HIGH 0) or second half of a0 b0 a1 b1 ...
template <int HIGH, typename V, size_t... I>
inline V interleaved(V a, V b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (int(I) / 2 + HIGH * n / 2 + int(I) % 2 * n)...);
}

// Transposes a square of vectors. One step interleaves line i with line i + half: it moves the lowest bit of the line's
// number below the bits of the lane's. After log2(lanes) steps the two numbers have changed places.
template <typename T>
inline void transpose_square(Vec<T> (&lines)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  constexpr auto lanes = std::make_index_sequence<n>{};
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleaved<0>(lines[i], lines[i + n / 2], lanes);
      next[2 * i + 1] = interleaved<1>(lines[i], lines[i + n / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) lines[i] = next[i];
  }
}

// to[c][r] = from[r][c] of a block of 16 x 16.
template <typename T>
inline void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int n = kLanes<T>;
  for (int c = 0; c < kTransposeBlock; c += n)
    for (int r = 0; r < kTransposeBlock; r += n) {
      Vec<T> lines[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) lines[i] = load(from + (r + i) * from_stride + c);
      transpose_square<T>(lines);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(to + (c + i) * to_stride + r, lines[i]);
    }
}

// to[i][c][r] = from[i][r][c] for n matrices of rows x columns.
template <typename T>
inline void transpose(const T* from, T* to, int64_t n, int64_t rows, int64_t columns, const Workers& workers) {
  const int64_t strips = (columns + kTransposeBlock - 1) / kTransposeBlock;
  for_each_part(workers, n * strips, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const T* src = from + s / strips * rows * columns;
      T* dst = to + s / strips * rows * columns;
      const int64_t c0 = s % strips * kTransposeBlock, c1 = smaller(c0 + kTransposeBlock, columns);
      for (int64_t r0 = 0; r0 < rows; r0 += kTransposeBlock) {
        const int64_t r1 = smaller(r0 + kTransposeBlock, rows);
        if (c1 - c0 == kTransposeBlock && r1 - r0 == kTransposeBlock) {
          transpose_block(src + r0 * columns + c0, columns, dst + c0 * rows + r0, rows);
        } else {
          for (int64_t c = c0; c < c1; ++c)
            for (int64_t r = r0; r < r1; ++r) dst[c * rows + r] = src[r * columns + c];
        }
      }
    }
  });
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
