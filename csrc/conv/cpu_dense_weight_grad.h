// Weight gradient of the dense atrous convolution: sums over pixels of x times the output's gradient.
//
// Both paths end in products over pixels (or tiles) of panels of 16 input channels with panels of 16 output channels,
// [rows][16] each, so that both operands are read in order. Direct: a product per tap over the pixels whose tap lies inside
// the map. Winograd: the adjoint of the forward path, dW = G^T [ sum over tiles of (B^T x) * (A dy) ] G, so it saves
// the same multiplications as the forward pass does.
#pragma once

#include "common/cpu_workers.h"
#include "conv/atrous_conv2d_cpu_kernel.h"
#include "conv/cpu_direct.h"
#include "conv/cpu_gemm.h"
#include "conv/cpu_weight.h"
#include "conv/cpu_winograd.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kPanelsPerTask = 4;  // panels of C_out that share a panel of C_in in L1
constexpr int64_t kDirectPixels = 96;  // pixels of a step of the direct path: its panels stay in L1
constexpr int kBlockElements = kPanel * kPanel;

// Rows first_a.. of panel a times rows first_b.. of panel b.
struct Segment {
  int64_t a, b, length;
};

// c[i][j] (+)= sum over the segments' rows of a[row][i] * b[row][j], for ROWS values of i from `i0`.
template <typename T, int ROWS>
__attribute__((noinline)) void outer_rows(const Segment* segments, int64_t count, const T* a, const T* b, int i0,
                                          bool accumulate, T* c) {
  constexpr int kVecs = kPanel / kLanes<T> < 2 ? kPanel / kLanes<T> : 2;
  for (int j = 0; j < kPanel; j += kVecs * kLanes<T>) {
    Vec<T> acc[ROWS][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v)
        acc[i][v] = accumulate ? load(c + (i0 + i) * kPanel + j + v * kLanes<T>) : Vec<T>{};
    for (int64_t s = 0; s < count; ++s) {
      const T* pa = a + segments[s].a * kPanel + i0;
      const T* pb = b + segments[s].b * kPanel + j;
      for (int64_t r = 0; r < segments[s].length; ++r, pa += kPanel, pb += kPanel) {
        Vec<T> bv[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) bv[v] = load(pb + v * kLanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
          const Vec<T> s = broadcast(pa[i]);
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) acc[i][v] += s * bv[v];
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) store(c + (i0 + i) * kPanel + j + v * kLanes<T>, acc[i][v]);
  }
}

// A whole 16 x 16 block.
template <typename T>
inline void outer_block(const Segment* segments, int64_t count, const T* a, const T* b, bool accumulate, T* c) {
  if constexpr (kLanes<T> == kPanel) {  // AVX-512: 16 accumulators of one vector hide the latency
    outer_rows<T, 16>(segments, count, a, b, 0, accumulate, c);
  } else {
    outer_rows<T, 6>(segments, count, a, b, 0, accumulate, c);
    outer_rows<T, 6>(segments, count, a, b, 6, accumulate, c);
    outer_rows<T, 4>(segments, count, a, b, 12, accumulate, c);
  }
}

// Adds taps[t][i][j] to grad_weight[16 np + j][16 cp + i][t], or writes it.
template <typename T>
inline void scatter_taps(const ConvGeometry& g, const T* taps, int64_t cp, int64_t np, bool accumulate,
                         T* grad_weight) {
  const int in_all = g.kernel * g.kernel;
  const int64_t rows = smaller<int64_t>(kPanel, g.c_in - cp * kPanel);
  const int64_t columns = smaller<int64_t>(kPanel, g.c_out - np * kPanel);
  for (int64_t j = 0; j < columns; ++j) {
    T* to = grad_weight + ((np * kPanel + j) * g.c_in + cp * kPanel) * in_all;
    for (int64_t i = 0; i < rows; ++i)
      for (int t = 0; t < in_all; ++t) {
        const T v = taps[t * kBlockElements + i * kPanel + j];
        to[i * in_all + t] = accumulate ? to[i * in_all + t] + v : v;
      }
  }
}

// Copies channels c0.. of a map's pixels to panels: to[(c / 16) * pixels * 16 + pixel * 16 + c % 16], zero beyond `channels`.
template <typename T>
inline void copy_to_panels(const Map<const T>& map, int64_t image, int64_t width, int64_t c0, int64_t channels,
                           int64_t first_pixel, int64_t last_pixel, int64_t pixels, T* to) {
  for (int64_t p = first_pixel; p < last_pixel; ++p) {
    const T* from = map.data + image * map.image + p / width * map.row + p % width * map.pixel + c0;
    for (int64_t c = 0; c < channels; c += kPanel) {
      T* row = to + c * pixels + p * kPanel;
      if (c + kPanel <= channels) {
#pragma GCC unroll 16
        for (int v = 0; v < kPanel; v += kLanes<T>) store(row + v, load(from + c + v));
      } else {
        for (int v = 0; v < kPanel; ++v) row[v] = c + v < channels ? from[c + v] : T(0);
      }
    }
  }
}

template <typename T>
class DirectWeightGrad {
 public:
  DirectWeightGrad(const DenseWeightGradArgs<T>& args, T* workspace, const Workers& workers)
      : a_(args), g_(args.g), ws_(workspace), workers_(workers) {}

  static int64_t workspace(const DenseWeightGradArgs<T>& args, int64_t workers) {
    const ConvGeometry& g = args.g;
    return k_block(g) * g.h * g.w + n_block(g) * g.h_out * g.w_out + workers * g.kernel * g.kernel * kBlockElements;
  }

  void run() {
    T* x = ws_;
    T* grad = x + k_block(g_) * g_.h * g_.w;
    T* scratch = grad + n_block(g_) * g_.h_out * g_.w_out;
    const int64_t in_pixels = g_.h * g_.w, out_pixels = g_.h_out * g_.w_out;
    for (int64_t image = 0; image < g_.n; ++image) {
      for (int64_t n0 = 0; n0 < g_.c_out; n0 += kChannelBlock) {
        const int64_t n = smaller(kChannelBlock, g_.c_out - n0);
        for_each_part(workers_, out_pixels, [&](int64_t, int64_t first, int64_t last) {
          copy_to_panels(a_.grad, image, g_.w_out, n0, n, first, last, out_pixels, grad);
        });
        for (int64_t k0 = 0; k0 < g_.c_in; k0 += kChannelBlock) {
          const int64_t k = smaller(kChannelBlock, g_.c_in - k0);
          for_each_part(workers_, in_pixels, [&](int64_t, int64_t first, int64_t last) {
            copy_to_panels(a_.x, image, g_.w, k0, k, first, last, in_pixels, x);
          });
          const int64_t kp = (k + kPanel - 1) / kPanel, np = (n + kPanel - 1) / kPanel;
          for_each_part(workers_, kp * np, [&](int64_t worker, int64_t first, int64_t last) {
            T* taps = scratch + worker * g_.kernel * g_.kernel * kBlockElements;
            for (int64_t task = first; task < last; ++task) {
              const int64_t cp = task / np, op = task % np;
              block(x + cp * in_pixels * kPanel, grad + op * out_pixels * kPanel, taps);
              scatter_taps(g_, taps, k0 / kPanel + cp, n0 / kPanel + op, image > 0, a_.grad_weight);
            }
          });
        }
      }
    }
  }

 private:
  static int64_t k_block(const ConvGeometry& g) { return round_up(smaller(g.c_in, kChannelBlock), kPanel); }
  static int64_t n_block(const ConvGeometry& g) { return round_up(smaller(g.c_out, kChannelBlock), kPanel); }

  // All taps of one pair of panels of one image.
  void block(const T* x, const T* grad, T* taps) const {
    for (int i = 0; i < g_.kernel * g_.kernel * kBlockElements; ++i) taps[i] = T(0);
    const int64_t lines = larger<int64_t>(kDirectPixels / larger<int64_t>(g_.w_out, 1), 1);
    Segment segments[kDirectPixels];
    for (int64_t y0 = 0; y0 < g_.h_out; y0 += lines) {
      const int64_t y1 = smaller(y0 + lines, g_.h_out);
      for (int ky = 0; ky < g_.kernel; ++ky)
        for (int kx = 0; kx < g_.kernel; ++kx) {
          const int64_t shift = kx * g_.dil_w - g_.pad_w;
          const int64_t first = larger<int64_t>(0, -shift), last = smaller(g_.w_out, g_.w - shift);
          if (first >= last) continue;
          int64_t count = 0;
          for (int64_t y = y0; y < y1; ++y) {
            const int64_t from = y - g_.pad_h + ky * g_.dil_h;
            if (from < 0 || from >= g_.h) continue;
            segments[count++] = {from * g_.w + first + shift, y * g_.w_out + first, last - first};
          }
          if (count > 0) outer_block(segments, count, x, grad, true, taps + (ky * g_.kernel + kx) * kBlockElements);
        }
    }
  }

  const DenseWeightGradArgs<T>& a_;
  const ConvGeometry& g_;
  T* const ws_;
  const Workers& workers_;
};

template <typename T>
class WinogradWeightGrad {
 public:
  WinogradWeightGrad(const DenseWeightGradArgs<T>& args, T* workspace, const Workers& workers)
      : a_(args),
        g_(args.g),
        tg_(args.tiles_y, args.tiles_x, args.g.n),
        bl_(tg_, args.g, workers.count),
        ws_(workspace),
        workers_(workers) {}

  static int64_t workspace(const DenseWeightGradArgs<T>& args, int64_t workers) {
    return Blocking(TileGroups(args.tiles_y, args.tiles_x, args.g.n), args.g, workers).total;
  }

  void run() {
    for (int64_t i = 0; i < bl_.x; ++i) ws_[i] = T(0);  // the zeros that stand for pixels outside
    T* x = ws_ + bl_.x;
    T* grad = ws_ + bl_.grad;
    for (int64_t b = 0; b < bl_.blocks; ++b) {
      const TileBlock block(tg_, b, bl_.blocks, kPanel, kPanel);
      const int64_t rows = block.pair_row[tg_.pairs] + tg_.pairs;  // one row of padding a pair
      for (int64_t n0 = 0; n0 < g_.c_out; n0 += kChannelBlock) {
        const int64_t n = smaller(kChannelBlock, g_.c_out - n0);
        gradients(block, n0, n, rows, grad);
        for (int64_t k0 = 0; k0 < g_.c_in; k0 += kChannelBlock) {
          const int64_t k = smaller(kChannelBlock, g_.c_in - k0);
          inputs(block, k0, k, rows, x);
          products(block, k0, k, n0, n, rows, b > 0);
        }
      }
    }
  }

 private:
  struct Blocking {
    int64_t blocks, x, grad, scratch, scratch_size, total;

    Blocking(const TileGroups& tg, const ConvGeometry& g, int64_t workers) {
      blocks = larger<int64_t>((tg.rows + kBlockRows - 1) / kBlockRows, 1);
      int64_t rows = 0;
      for (int64_t b = 0; b < blocks; ++b) rows = larger(rows, TileBlock::rows_in(tg, b, blocks) + tg.pairs);
      x = round_up(g.c_in + 1, kPanel);
      grad = x + rows * round_up(smaller(g.c_in, kChannelBlock), kPanel);
      scratch = grad + rows * round_up(smaller(g.c_out, kChannelBlock), kPanel);
      scratch_size = (tg.pairs * kPanelsPerTask + 9) * kBlockElements;
      total = scratch + workers * scratch_size;
    }
  };

  void inputs(const TileBlock& block, int64_t k0, int64_t k, int64_t rows, T* x) const {
    clear_tail(x, k, rows);
    for_each_part(workers_, block.tiles, [&](int64_t, int64_t first, int64_t last) {
      for_tiles(tg_, block, first, last, [&](int g, int64_t tile) {
        const int ky = tg_.kind_y[g], kx = tg_.kind_x[g];
        const auto pixels = input_pixels(g_, a_.x, ky, kx, place_of(a_.tiles_y, a_.tiles_x, ky, kx, tile), k0, ws_);
        T* to = x + (tile - block.first[g]) * kPanel;
        const int64_t* at = block.v_at[g];
        transform_tile<Side::kInput, T>(
            ky, kx, k, pixels, [&](int p) { return to + at[p]; }, ChannelLayout{rows * kPanel});
      });
    });
  }

  void gradients(const TileBlock& block, int64_t n0, int64_t n, int64_t rows, T* grad) const {
    clear_tail(grad, n, rows);
    for_each_part(workers_, block.tiles, [&](int64_t, int64_t first, int64_t last) {
      for_tiles(tg_, block, first, last, [&](int g, int64_t tile) {
        const int ky = tg_.kind_y[g], kx = tg_.kind_x[g];
        const auto pixels = gradient_pixels(g_, a_.grad, ky, kx, place_of(a_.tiles_y, a_.tiles_x, ky, kx, tile), n0);
        T* to = grad + (tile - block.first[g]) * kPanel;
        const int64_t* at = block.m_at[g];
        transform_tile<Side::kGradient, T>(
            ky, kx, n, pixels, [&](int p) { return to + at[p]; }, ChannelLayout{rows * kPanel});
      });
    });
  }

  // The last panel's channels beyond the block's own.
  void clear_tail(T* panels, int64_t channels, int64_t rows) const {
    if (channels % kPanel == 0) return;
    T* last = panels + channels / kPanel * rows * kPanel;
    for (int64_t i = 0; i < rows * kPanel; ++i) last[i] = T(0);
  }

  void products(const TileBlock& block, int64_t k0, int64_t k, int64_t n0, int64_t n, int64_t rows,
                bool accumulate) const {
    const int64_t kp = (k + kPanel - 1) / kPanel, np = (n + kPanel - 1) / kPanel;
    const int64_t groups = (np + kPanelsPerTask - 1) / kPanelsPerTask;
    for_each_part(workers_, kp * groups, [&](int64_t worker, int64_t first, int64_t last) {
      T* sums = ws_ + bl_.scratch + worker * bl_.scratch_size;
      T* taps = sums + tg_.pairs * kPanelsPerTask * kBlockElements;
      for (int64_t task = first; task < last; ++task) {
        const int64_t cp = task / groups, first_panel = task % groups * kPanelsPerTask;
        const int64_t panels = smaller(kPanelsPerTask, np - first_panel);
        const T* x = ws_ + bl_.x + cp * rows * kPanel;
        for (int p = 0; p < tg_.pairs; ++p) {
          const int64_t row = block.pair_row[p] + p;
          const Segment segment{row, row, block.pair_row[p + 1] - block.pair_row[p]};
          for (int64_t o = 0; o < panels; ++o)
            outer_block(&segment, 1, x, ws_ + bl_.grad + (first_panel + o) * rows * kPanel, false,
                        sums + (o * tg_.pairs + p) * kBlockElements);
        }
        for (int64_t o = 0; o < panels; ++o) {
          weights_adjoint(sums + o * tg_.pairs * kBlockElements, kBlockElements, tg_.pair_of, taps);
          scatter_taps(g_, taps, k0 / kPanel + cp, n0 / kPanel + first_panel + o, accumulate, a_.grad_weight);
        }
      }
    });
  }

  const DenseWeightGradArgs<T>& a_;
  const ConvGeometry& g_;
  const TileGroups tg_;
  const Blocking bl_;
  T* const ws_;
  const Workers& workers_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
