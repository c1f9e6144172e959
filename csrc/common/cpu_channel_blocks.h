// Blocks of channels: the channels of an element side by side in what is computed in, rearranged from maps of any layout
// and dtype, and back. For one CPU target.
#pragma once

#include <string.h>

#include "common/cpu_convert.h"
#include "conv/cpu_transpose.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// A vector of what is computed in, from elements of another type.
template <typename A, typename T>
inline Vec<A> load_as(const T* p) {
  if constexpr (kSame<T, A>) {
    return load(p);
  } else {
    alignas(kVectorBytes) A wide[kLanes<A>];
    convert_run(p, wide, kLanes<A>);
    return load(wide);
  }
}

// Elements first .. first + count - 1 of a row of channels c0 .. of an image: block[x][c], zero in channels beyond the
// last. from points to channel c0 of the row's first element.
template <typename T, typename A>
inline void gather_run(const T* from, int64_t c_stride, int64_t x_stride, int64_t channels, A* block,
                       int64_t block_channels, int64_t first, int64_t count) {
  constexpr int64_t n = kTransposeBlock;
  for (int64_t c = 0; c < block_channels; c += n) {
    A* to = block + first * block_channels + c;
    const T* source = from + c * c_stride + first * x_stride;
    if constexpr (kSame<T, A>) {
      if (x_stride == 1 && count == n && c + n <= channels) {
        transpose_block(source, c_stride, to, block_channels);
        continue;
      }
    }
    A square[n * n] = {}, turned[n * n];
    for (int64_t i = 0; i < n && c + i < channels; ++i) {
      if (x_stride == 1) {
        convert_run(source + i * c_stride, square + i * n, count);
      } else {
        for (int64_t x = 0; x < count; ++x) square[i * n + x] = A(widen(source[i * c_stride + x * x_stride]));
      }
    }
    transpose_block(square, n, turned, n);
    for (int64_t x = 0; x < count; ++x) memcpy(to + x * block_channels, turned + x * n, n * sizeof(A));
  }
}

// The way back, to a contiguous map; a null block means zeros.
template <typename T, typename A>
inline void scatter_run(const A* block, int64_t block_channels, int64_t channels, T* to, int64_t c_stride,
                        int64_t first, int64_t count) {
  constexpr int64_t n = kTransposeBlock;
  if (block == nullptr) {
    for (int64_t c = 0; c < channels; ++c) memset(to + c * c_stride + first, 0, count * sizeof(T));
    return;
  }
  for (int64_t c = 0; c < channels; c += n) {
    const A* from = block + first * block_channels + c;
    T* target = to + c * c_stride + first;
    if constexpr (kSame<T, A>) {
      if (count == n && c + n <= channels) {
        transpose_block(from, block_channels, target, c_stride);
        continue;
      }
    }
    A square[n * n] = {}, turned[n * n];
    for (int64_t x = 0; x < count; ++x) memcpy(square + x * n, from + x * block_channels, n * sizeof(A));
    transpose_block(square, n, turned, n);
    for (int64_t i = 0; i < n && c + i < channels; ++i) narrow_run(turned + i * n, target + i * c_stride, count);
  }
}

// rows of a matrix to columns of another, with the conversions of the two types: to[c][r] = from[r][c].
template <typename T, typename A>
inline void transpose_to(const A* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t n = kTransposeBlock;
  for (int64_t r = 0; r < rows; r += n)
    for (int64_t c = 0; c < columns; c += n) {
      const int64_t height = smaller(n, rows - r), width = smaller(n, columns - c);
      if constexpr (kSame<T, A>) {
        if (height == n && width == n) {
          transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
          continue;
        }
      }
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < height; ++i)
          to[(c + j) * to_stride + r + i] = narrowed<T>(widen(from[(r + i) * from_stride + c + j]));
    }
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
