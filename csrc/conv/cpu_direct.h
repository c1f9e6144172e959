// Direct path of the dense atrous convolution, 3x3 and 1x1, on channels_last maps: one multiply-add per tap inside the map.
//
// The map is cut into rectangles whose outputs have the same taps inside, so no product with a zero outside the map is ever
// computed. Tiles of a rectangle's pixels go to the matrix product with the pixels that each tap reads as rows. The
// reduction is cut into steps of at most kDirectTerms terms (taps x channels); between steps the sums rest in y.
#pragma once

#include "common/cpu_workers.h"
#include "conv/atrous_conv2d_cpu_kernel.h"
#include "conv/cpu_gemm.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kDirectRows = 96;  // pixels that share a step's weights while they are in L2
constexpr int kMaxIntervals = 7;     // three taps give at most six cuts inside an axis
constexpr int kMaxKernel = 3;

// Intervals of one axis in which every output has the same taps inside the map.
struct TapIntervals {
  int count = 0;
  int64_t first[kMaxIntervals], end[kMaxIntervals];
  bool inside[kMaxIntervals][kMaxKernel];

  TapIntervals(int64_t size, int64_t out, int64_t padding, int64_t dilation, int kernel) {
    int64_t at = 0;
    while (at < out) {
      int64_t next = out;
      for (int k = 0; k < kernel; ++k) {
        const int64_t lo = padding - k * dilation, hi = lo + size;
        if (at < lo) next = smaller(next, lo);
        if (at < hi) next = smaller(next, hi);
        inside[count][k] = lo <= at && at < hi;
      }
      first[count] = at;
      end[count] = next;
      ++count;
      at = next;
    }
  }
  int64_t length(int i) const { return end[i] - first[i]; }
};

template <typename T>
class Direct {
 public:
  Direct(const DenseArgs<T>& args, const Workers& workers)
      : a_(args),
        g_(args.g),
        ys_(g_.h, g_.h_out, g_.pad_h, g_.dil_h, g_.kernel),
        xs_(g_.w, g_.w_out, g_.pad_w, g_.dil_w, g_.kernel),
        workers_(workers) {}

  void run() {
    workers_.run(workers_.count, [](void* self, int64_t worker) { static_cast<Direct*>(self)->work(worker); }, this);
  }

 private:
  // Workers take the blocks in turn, since blocks differ in their number of taps.
  void work(int64_t worker) const {
    int64_t block = 0;
    for (int i = 0; i < ys_.count; ++i) {
      for (int j = 0; j < xs_.count; ++j) {
        const int64_t pixels = g_.n * ys_.length(i) * xs_.length(j);
        for (int64_t first = 0; first < pixels; first += kDirectRows, ++block) {
          if (block % workers_.count == worker) run_block(i, j, first, smaller(first + kDirectRows, pixels));
        }
      }
    }
  }

  // Pixels first..last-1 of rectangle (i, j), counted over the images.
  void run_block(int i, int j, int64_t first, int64_t last) const {
    const T* x[kDirectRows];
    T* y[kDirectRows];
    for (int64_t p = first; p < last; ++p) {
      const int64_t xx = xs_.first[j] + p % xs_.length(j), rest = p / xs_.length(j);
      const int64_t yy = ys_.first[i] + rest % ys_.length(i), image = rest / ys_.length(i);
      y[p - first] = a_.y.data + image * a_.y.image + yy * a_.y.row + xx * a_.y.pixel;
      x[p - first] = a_.x.data + image * a_.x.image + (yy - g_.pad_h) * a_.x.row + (xx - g_.pad_w) * a_.x.pixel;
    }
    int taps = 0, tap_index[kMaxTaps];
    int64_t tap_offset[kMaxTaps];
    for (int ky = 0; ky < g_.kernel; ++ky)
      for (int kx = 0; kx < g_.kernel; ++kx)
        if (ys_.inside[i][ky] && xs_.inside[j][kx]) {
          tap_index[taps] = ky * g_.kernel + kx;
          tap_offset[taps++] = ky * g_.dil_h * a_.x.row + kx * g_.dil_w * a_.x.pixel;
        }

    const int64_t panel = g_.kernel * g_.kernel * g_.c_in;  // rows of a panel of packed weights
    const int64_t k_step = smaller(g_.c_in, kDirectTerms);
    const int64_t tap_step = larger<int64_t>(kDirectTerms / larger<int64_t>(k_step, 1), 1);
    int tap = 0;
    int64_t k0 = 0;
    do {
      const int step_taps = int(smaller<int64_t>(tap_step, taps - tap));
      const int64_t k = smaller(k_step, g_.c_in - k0);
      const bool is_first = tap == 0 && k0 == 0;
      const bool is_last = taps == 0 || (tap + step_taps >= taps && k0 + k >= g_.c_in);
      TileOperands<T> op;
      op.taps = step_taps;
      op.panel_step = panel * kPanel;
      for (int64_t column = 0; column < g_.c_out; column += kTileColumns<T>) {
        const Finish<T> finish{!is_first, is_last && a_.scale ? a_.scale + column : nullptr,
                               is_last && a_.shift ? a_.shift + column : nullptr, is_last && a_.relu};
        for (int t = 0; t < step_taps; ++t)
          op.panels[t] = a_.weight.packed + column * panel + (tap_index[tap + t] * g_.c_in + k0) * kPanel;
        for (int64_t r = 0; r < last - first; r += kRows) {
          const int rows = int(smaller<int64_t>(kRows, last - first - r));
          for (int t = 0; t < step_taps; ++t)
            for (int l = 0; l < rows; ++l) op.a_rows[t][l] = x[r + l] + tap_offset[tap + t] + k0;
          for (int l = 0; l < rows; ++l) op.c_rows[l] = y[r + l] + column;
          gemm_tile<T>(op, rows, k, int(smaller<int64_t>(kTileColumns<T>, g_.c_out - column)), finish);
        }
      }
      k0 += k;
      if (k0 >= g_.c_in) {
        k0 = 0;
        tap += step_taps;
      }
    } while (tap < taps);
  }

  const DenseArgs<T>& a_;
  const ConvGeometry& g_;
  const TapIntervals ys_, xs_;
  const Workers& workers_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
