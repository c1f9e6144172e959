// Copies between NCHW and channels_last.
#pragma once

#include "common/cpu_workers.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kTransposeBlock = 16;  // a square of 16 x 16 floats: whole cache lines on both sides

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
        T square[kTransposeBlock][kTransposeBlock];
        if (c1 - c0 == kTransposeBlock && r1 - r0 == kTransposeBlock) {
          for (int64_t r = 0; r < kTransposeBlock; ++r)
            for (int64_t c = 0; c < kTransposeBlock; ++c) square[c][r] = src[(r0 + r) * columns + c0 + c];
          for (int64_t c = 0; c < kTransposeBlock; ++c)
            for (int64_t r = 0; r < kTransposeBlock; ++r) dst[(c0 + c) * rows + r0 + r] = square[c][r];
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
