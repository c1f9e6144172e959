// Maps as the kernels read and write them: the channels of an element side by side. channels_last maps are that
// already; of others, blocks of channels are rearranged, only those rows and runs of elements that some box reads.
#pragma once

#include <string.h>

#include "common/cpu_convert.h"
#include "conv/cpu_transpose.h"
#include "roi/cpu_roi_plan.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kRun = kTransposeBlock;  // elements along x that are rearranged together
// A block of channels: 4 cache lines of an element; fewer where a map is so large that the block would leave the cache.
constexpr int64_t kMostChannels = 64;
constexpr int64_t kBlockBytes = int64_t{24} << 20;

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

// One image of a map whose channels lie side by side.
template <typename T>
struct View {
  T* data;
  int64_t stride[kAxes];  // z, y, x, in elements
};

// Which runs of an image the boxes of a group read, one byte a run: [D, H, runs].
class Marks {
 public:
  Marks(const RoiArgs& a, const int64_t (&size)[3])
      : rows_(size[kZ] * size[kY]),
        height_(size[kY]),
        width_(size[kX]),
        runs_((size[kX] + kRun - 1) / kRun),
        marks_(static_cast<uint8_t*>(a.allocate(a.context, rows_ * runs_))) {
    memset(marks_, 0, rows_ * runs_);
  }

  void add(const Region& r) {
    if (r.empty()) return;
    for (int64_t z = r.first[kZ]; z <= r.last[kZ]; ++z)
      for (int64_t y = r.first[kY]; y <= r.last[kY]; ++y)
        memset(marks_ + (z * height_ + y) * runs_ + r.first[kX] / kRun, 1, r.last[kX] / kRun - r.first[kX] / kRun + 1);
  }

  // f(row, first, count, marked) for every run of rows first_row .. last_row - 1.
  template <typename F>
  void each_run(int64_t first_row, int64_t last_row, const F& f) const {
    for (int64_t row = first_row; row < last_row; ++row)
      for (int64_t run = 0; run < runs_; ++run)
        f(row, run * kRun, smaller(kRun, width_ - run * kRun), marks_[row * runs_ + run] != 0);
  }

  int64_t rows() const { return rows_; }

 private:
  int64_t rows_, height_, width_, runs_;
  uint8_t* marks_;
};

// How many channels the blocks of an image have: whole cache lines, one for each worker at least where `shared` is not.
inline int64_t block_channels(const RoiArgs& a, const RoiLevel& level, int64_t element_bytes, int64_t workers) {
  const int64_t elements = larger<int64_t>(1, level.size[0] * level.size[1] * level.size[2]);
  const int64_t each = (a.channels + workers - 1) / workers;
  const int64_t fitting = smaller(smaller(kBlockBytes / (elements * element_bytes), kMostChannels), each);
  return larger(kTransposeBlock, round_up(fitting, kTransposeBlock));
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
