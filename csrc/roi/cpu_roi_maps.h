// Maps as the kernels read and write them: the channels of an element side by side. channels_last maps are that
// already; of others, blocks of channels are rearranged, only those rows and runs of elements that some box reads.
#pragma once

#include <string.h>

#include "common/cpu_channel_blocks.h"
#include "roi/cpu_roi_plan.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kRun = kTransposeBlock;  // elements along x that are rearranged together
// A block of channels: 4 cache lines of an element; fewer where a map is so large that the block would leave the cache.
constexpr int64_t kMostChannels = 64;
constexpr int64_t kBlockBytes = int64_t{24} << 20;

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

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
