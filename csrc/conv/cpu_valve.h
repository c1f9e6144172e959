// valve_conv2d and region_gate on the CPU, for one instruction set (formula in valve_conv2d_math.h).
//
// A unit is a block of an image's pixels. Its columns (one for each tap, one of ones for the bias) are written once, and
// serve all channels: strides, dilations and padding exist in that stage only. All products of small matrices are tiles
// of kRows x kTileVectors vectors, by one function. The side that lies side by side in memory is the vectors': pixels,
// or in channels_last channels. Bytes at the least: features read and outputs written once; neither the region's
// convolution nor features that are convolved here leave the cache.
#pragma once

#include <string.h>

#include "common/cpu_convert.h"
#include "common/cpu_workers.h"
#include "conv/valve_conv2d_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

using valve::Lines;
using valve::Maps;
using valve::Window;

constexpr int kRows = 6;  // with two vectors, as many sums as hide the latency of multiply-adds
constexpr int kTileVectors = 2;
template <typename A>
constexpr int64_t kTileWidth = kTileVectors * kLanes<A>;
constexpr int64_t kLine = 16;  // floats of a cache line

// tile[i][..] = sum over j < count of a[i * a_row + j * a_step] * b[j * b_step ..]. Reads kRows and kTileWidth whole.
template <typename A>
__attribute__((noinline)) void multiply_tile(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step,
                                             int64_t count, A* tile) {
  Vec<A> sums[kRows][kTileVectors] = {};
  for (int64_t j = 0; j < count; ++j, a += a_step, b += b_step) {
    Vec<A> right[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) right[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> left = broadcast(a[i * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) store(tile + i * kTileWidth<A> + v * kLanes<A>, sums[i][v]);
}

// Calls f(i, j, rows, columns, tile) for the tiles of the product of a and b, [m, n].
template <typename A, typename F>
inline void multiply(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, int64_t count, int64_t m,
                     int64_t n, A* tile, const F& f) {
  for (int64_t i = 0; i < m; i += kRows)
    for (int64_t j = 0; j < n; j += kTileWidth<A>) {
      multiply_tile(a + i * a_row, a_row, a_step, b + j, b_step, count, tile);
      f(i, j, smaller<int64_t>(kRows, m - i), smaller<int64_t>(kTileWidth<A>, n - j), tile);
    }
}

// The steps of an axis for which first + i * step lies in [0, size): i in [begin, end).
struct Inside {
  int64_t begin, end;
};
inline Inside inside(int64_t first, int64_t step, int64_t size, int64_t count) {
  const int64_t begin = first < 0 ? (-first + step - 1) / step : 0;
  const int64_t end = first < size ? (size - 1 - first) / step + 1 : 0;
  return {smaller(begin, count), smaller(larger(end, begin), count)};
}

template <typename T, typename A>
class Valve {
 public:
  Valve(const Maps& m, bool backward, void* scratch)
      : m_(m),
        pixels_(m.height * m.width),
        fused_(m.image.map != nullptr),
        region_columns_(m.region.taps + 1),
        image_columns_(fused_ ? m.image.taps + 1 : 0),
        backward_(backward),
        block_(block_of(m, backward)),
        blocks_((pixels_ + block_ - 1) / block_),
        block_step_(round_up(block_, kLine) + kLine),
        channel_step_(round_up(m.channels, kTileWidth<A>) + kLine),
        scratch_(static_cast<A*>(scratch)) {}

  // Elements.
  int64_t scratch_of_weights() const {
    return (region_columns_ + image_columns_) * channel_step_ + m_.channels * tap_step(m_.region) + kSlack;
  }
  int64_t scratch_of_worker() const {
    int64_t size = (region_columns_ + image_columns_) * block_step_ + 4 * kTile;
    if (backward_) {
      size += block_ * (tap_step(m_.region) + tap_step(m_.image)) + 2 * gradients_size();
    }
    return round_up(size + kSlack, kLine);
  }
  int64_t scratch(int64_t workers) const {
    return (round_up(scratch_of_weights(), kLine) + workers * scratch_of_worker()) * int64_t(sizeof(A));
  }

  void forward(const Workers& workers) {
    prepare_weights();
    const bool streams = streams_output();
    for_each_part(workers, m_.images * blocks_, [&](int64_t worker, int64_t first, int64_t last) {
      const Scratch s(*this, worker);
      for (int64_t i = first; i < last; ++i) {
        const Block block = block_at(i);
        fill_columns(m_.region, block, s.region);
        if (fused_) fill_columns(m_.image, block, s.image);
        if (streams) {
          forward_block<true>(block, s);
        } else {
          forward_block<false>(block, s);
        }
      }
      stream_fence();
    });
  }

  void backward(const Workers& workers) {
    prepare_weights();
    const int64_t size = valve::columns_of(m_) * m_.channels;
    A* const sums = static_cast<A*>(m_.sums);
    for_each_part(workers, m_.parts, [&](int64_t worker, int64_t first, int64_t last) {
      const Scratch s(*this, worker);
      for (int64_t part = first; part < last; ++part) {
        A* const own = sums ? sums + part * size : nullptr;
        if (own) memset(own, 0, size * sizeof(A));
        const int64_t all = m_.images * blocks_;
        for (int64_t i = all * part / m_.parts; i < all * (part + 1) / m_.parts; ++i)
          backward_block(block_at(i), s, own);
      }
    });
    for (int64_t part = 1; sums && part < m_.parts; ++part)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  }

 private:
  static constexpr int64_t kTile = kRows * kTileWidth<A>;
  // What tiles may read behind the last row of a matrix.
  static constexpr int64_t kSlack = 8 * kLine;
  // Elements that a block's columns, and backward its gradients, may take: half of a small second-level cache.
  static constexpr int64_t kBlockElements = 16384;
  static constexpr int64_t kLeastBlock = 96, kMostBlock = 768;
  static_assert(kLeastBlock % kRows == 0, "a block's columns are read by whole tiles");
  static_assert(kLeastBlock % kTileWidth<A> == 0, "and none behind them are computed with");

  struct Block {
    int64_t image, first, count;  // pixels
  };
  struct Scratch {
    Scratch(const Valve& v, int64_t worker) {
      A* at = v.scratch_ + round_up(v.scratch_of_weights(), kLine) + worker * v.scratch_of_worker();
      // Tiles reach beyond what is written. What they make of it is never used, but denormal numbers would be slow.
      memset(at, 0, v.scratch_of_worker() * sizeof(A));
      const auto take = [&](int64_t n) {
        A* const taken = at;
        at += n;
        return taken;
      };
      region = take(v.region_columns_ * v.block_step_);
      image = take(v.image_columns_ * v.block_step_);
      gate = take(kTile);
      features = take(kTile);
      result = take(kTile);
      grad = take(kTile);
      if (!v.backward_) return;
      of_gate = take(v.gradients_size());
      of_features = take(v.gradients_size());
      region_taps = take(v.block_ * tap_step(v.m_.region));
      image_taps = take(v.block_ * tap_step(v.m_.image));
    }
    A *region, *image;                   // [columns][block_step]
    A *gate, *features, *result, *grad;  // tiles
    A *of_gate, *of_features;            // gradients: [lines][line_step]
    A *region_taps, *image_taps;         // columns, transposed: [block][tap_step]
  };

  static int64_t block_of(const Maps& m, bool backward) {
    const int64_t columns = valve::columns_of(m) * (backward ? 2 : 1) + (backward ? 2 * m.channels : 0);
    const int64_t most = smaller(round_up(m.height * m.width, kLeastBlock), kMostBlock);
    return larger(smaller(kBlockElements / columns / kLeastBlock * kLeastBlock, most), kLeastBlock);
  }
  static int64_t tap_step(const Window& w) { return w.map ? round_up(w.taps + 1, kTileWidth<A>) : 0; }
  // Lines of a block: of channels, or in channels_last of pixels. Elements from one to the next.
  int64_t line_step() const { return m_.last ? channel_step_ : block_step_; }
  int64_t gradients_size() const {
    return round_up((m_.last ? round_up(block_, kRows) : round_up(m_.channels, kRows)) * line_step(), kLine);
  }
  Block block_at(int64_t i) const {
    const int64_t first = i % blocks_ * block_;
    return {i / blocks_, first, smaller(block_, pixels_ - first)};
  }

  bool streams_output() const {
    constexpr int64_t kStreamBytes = 16 << 20;  // results that the caches would not hold
    if (!kSame<T, A> || m_.output.data == m_.features.data) return false;
    if (m_.images * m_.channels * pixels_ * int64_t(sizeof(T)) < kStreamBytes) return false;
    const int64_t line = m_.output.line_stride, image = m_.output.image_stride;
    return line % kLanes<A> == 0 && image % kLanes<A> == 0 &&
           reinterpret_cast<uintptr_t>(m_.output.data) % kVectorBytes == 0;
  }

  // [taps, bias][channel_step], and region_weights_ as [channels][tap_step].
  void prepare_weights() {
    A* at = scratch_;
    memset(at, 0, scratch_of_weights() * sizeof(A));
    const auto transpose = [&](const Window& w) {
      const T *const weight = static_cast<const T*>(w.weight), *const bias = static_cast<const T*>(w.bias);
      A* const to = at;
      for (int64_t k = 0; k < m_.channels; ++k) {
        for (int64_t t = 0; t < w.taps; ++t) to[t * channel_step_ + k] = A(widen(weight[k * w.taps + t]));
        if (bias) to[w.taps * channel_step_ + k] = A(widen(bias[k]));
      }
      at += (w.taps + 1) * channel_step_;
      return to;
    };
    gate_weights_ = transpose(m_.region);
    if (fused_) image_weights_ = transpose(m_.image);
    region_weights_ = at;
    const T* const weight = static_cast<const T*>(m_.region.weight);
    for (int64_t k = 0; k < m_.channels; ++k)
      convert_run(weight + k * m_.region.taps, at + k * tap_step(m_.region), m_.region.taps);
  }

  // [taps, ones][block_step]; zeros behind the block's pixels.
  void fill_columns(const Window& w, const Block& block, A* to) {
    const T* const map = static_cast<const T*>(w.map) + block.image * w.image_stride;
    A* column = to;
    for (int64_t c = 0; c < w.channels; ++c)
      for (int64_t u = 0; u < w.kernel_height; ++u)
        for (int64_t v = 0; v < w.kernel_width; ++v, column += block_step_)
          fill_column(w, map + c * w.channel_stride, u * w.dilation_y - w.padding_y, v * w.dilation_x - w.padding_x,
                      block, column);
    for (int64_t i = 0; i < block_; ++i) column[i] = A(i < block.count);
  }

  // u, v: where the tap of output (0, 0) lies.
  void fill_column(const Window& w, const T* map, int64_t u, int64_t v, const Block& block, A* to) {
    int64_t y = block.first / m_.width, x = block.first % m_.width;
    for (int64_t i = 0; i < block.count;) {
      const int64_t n = smaller(m_.width - x, block.count - i), row = y * w.stride_y + u;
      A* const part = to + i;
      if (row < 0 || row >= w.height) {
        memset(part, 0, n * sizeof(A));
      } else {
        const int64_t first = x * w.stride_x + v, step = w.stride_x * w.column_stride;
        const Inside in = inside(first, w.stride_x, w.width, n);
        const T* const from = map + row * w.row_stride + first * w.column_stride;
        memset(part, 0, in.begin * sizeof(A));
        if (step == 1) {
          convert_run(from + in.begin, part + in.begin, in.end - in.begin);
        } else {
          for (int64_t j = in.begin; j < in.end; ++j) part[j] = A(widen(from[j * step]));
        }
        memset(part + in.end, 0, (n - in.end) * sizeof(A));
      }
      i += n;
      x = 0;
      ++y;
    }
    memset(to + block.count, 0, (block_ - block.count) * sizeof(A));
  }

  // One tile of a convolution: of lines from `line` on, elements from `at` on.
  void convolve(const A* columns, const A* weights, int64_t count, int64_t line, int64_t at, A* tile) const {
    const A *const a = m_.last ? columns : weights, *const b = m_.last ? weights : columns;
    const int64_t a_step = m_.last ? block_step_ : channel_step_, b_step = m_.last ? channel_step_ : block_step_;
    multiply_tile(a + line, 1, a_step, b + at, b_step, count, tile);
  }

  static T* element(const Lines& lines, const Maps& m, const Block& block, int64_t line, int64_t at) {
    return static_cast<T*>(lines.data) + block.image * lines.image_stride +
           (m.last ? (block.first + line) * lines.line_stride + at : line * lines.line_stride + block.first + at);
  }

  // Calls f(line, at, rows, n) for the tiles of a block.
  template <typename F>
  void each_tile(const Block& block, const F& f) const {
    const int64_t lines = m_.last ? block.count : m_.channels, length = m_.last ? m_.channels : block.count;
    for (int64_t line = 0; line < lines; line += kRows)
      for (int64_t at = 0; at < length; at += kTileWidth<A>)
        f(line, at, smaller<int64_t>(kRows, lines - line), smaller<int64_t>(kTileWidth<A>, length - at));
  }

  // A tile of features: convolved, or a row at a time of those that are given.
  void features_tile(const Block& block, const Scratch& s, int64_t line, int64_t at, int64_t rows, int64_t n) const {
    if (fused_) return convolve(s.image, image_weights_, image_columns_, line, at, s.features);
    for (int64_t i = 0; i < rows; ++i)
      convert_run(element(m_.features, m_, block, line + i, at), s.features + i * kTileWidth<A>, n);
  }

  Vec<A> combined(Vec<A> f, Vec<A> r) const { return m_.additive ? f + r : f * r; }

  template <bool kStream>
  void forward_block(const Block& block, const Scratch& s) {
    each_tile(block, [&](int64_t line, int64_t at, int64_t rows, int64_t n) {
      convolve(s.region, gate_weights_, region_columns_, line, at, s.gate);
      if (!kSame<T, A> || fused_ || n < kTileWidth<A>) features_tile(block, s, line, at, rows, n);
      for (int64_t i = 0; i < rows; ++i) {
        T* const to = element(m_.output, m_, block, line + i, at);
        const A* from = s.features + i * kTileWidth<A>;
        if constexpr (kSame<T, A>)
          if (!fused_ && n == kTileWidth<A>) from = element(m_.features, m_, block, line + i, at);
        const bool whole = kSame<T, A> && n == kTileWidth<A>;
        for (int64_t v = 0; v < kTileWidth<A>; v += kLanes<A>) {
          Vec<A> y = combined(load(from + v), load(s.gate + i * kTileWidth<A> + v));
          if (m_.relu) y = relu<A>(y);
          if constexpr (kSame<T, A>) {
            if (whole) {
              if constexpr (kStream) {
                stream(to + v, y);
              } else {
                store(to + v, y);
              }
              continue;
            }
          }
          store(s.result + v, y);
        }
        if (!whole) narrow_run(s.result, to, n);
      }
    });
  }

  // sums: [columns][K] of this part, or null.
  void backward_block(const Block& block, const Scratch& s, A* sums) {
    fill_columns(m_.region, block, s.region);
    if (fused_) fill_columns(m_.image, block, s.image);
    const int64_t step = line_step();
    // 1. Gradients of both factors.
    each_tile(block, [&](int64_t line, int64_t at, int64_t rows, int64_t n) {
      convolve(s.region, gate_weights_, region_columns_, line, at, s.gate);
      features_tile(block, s, line, at, rows, n);
      for (int64_t i = 0; i < rows; ++i) {
        convert_run(element(m_.grad, m_, block, line + i, at), s.grad, n);
        A *const of_gate = s.of_gate + (line + i) * step + at, *const of_features =
                                                                   s.of_features + (line + i) * step + at;
        for (int64_t v = 0; v < kTileWidth<A>; v += kLanes<A>) {
          const Vec<A> f = load(s.features + i * kTileWidth<A> + v), r = load(s.gate + i * kTileWidth<A> + v);
          Vec<A> g = load(s.grad + v);
          if (m_.relu) g = combined(f, r) <= Vec<A>{} ? Vec<A>{} : g;
          store(of_gate + v, m_.additive ? g : g * f);
          store(of_features + v, m_.additive ? g : g * r);
        }
        if (m_.features_grad.data) narrow_run(of_features, element(m_.features_grad, m_, block, line + i, at), n);
      }
    });
    // 2. Sums over the block's pixels.
    if (sums) {
      add_weight_gradient(m_.region, block, s.region, s.region_taps, s.of_gate, sums);
      if (fused_)
        add_weight_gradient(m_.image, block, s.image, s.image_taps, s.of_features,
                            sums + region_columns_ * m_.channels);
    }
    // 3. Sums over the channels.
    if (m_.scattered) scatter(block, s);
  }

  // sums [columns][K] += columns of a window times gradients.
  void add_weight_gradient(const Window& w, const Block& block, const A* columns, A* taps, const A* grads, A* sums) {
    const int64_t step = tap_step(w);
    for (int64_t i = 0; i < block.count; ++i)
      for (int64_t t = 0; t < step; ++t) taps[i * step + t] = t <= w.taps ? columns[t * block_step_ + i] : A(0);
    const int64_t row = m_.last ? 1 : block_step_, along = m_.last ? channel_step_ : 1;
    A tile[kTile];
    multiply(grads, row, along, taps, step, block.count, m_.channels, w.taps + 1, tile,
             [&](int64_t k, int64_t t, int64_t rows, int64_t n, const A* product) {
               for (int64_t j = 0; j < n; ++j)
                 for (int64_t i = 0; i < rows; ++i)
                   sums[(t + j) * m_.channels + k + i] += product[i * kTileWidth<A> + j];
             });
  }

  // scattered [N, taps, H * W] = the region's weights times gradients.
  void scatter(const Block& block, const Scratch& s) {
    const int64_t taps = m_.region.taps, step = tap_step(m_.region);
    A* const to = static_cast<A*>(m_.scattered) + block.image * taps * pixels_ + block.first;
    A tile[kTile];
    if (m_.last) {
      multiply(s.of_gate, channel_step_, 1, region_weights_, step, m_.channels, block.count, taps, tile,
               [&](int64_t p, int64_t t, int64_t rows, int64_t n, const A* product) {
                 for (int64_t j = 0; j < n; ++j)
                   for (int64_t i = 0; i < rows; ++i) to[(t + j) * pixels_ + p + i] = product[i * kTileWidth<A> + j];
               });
    } else {
      multiply(region_weights_, 1, step, s.of_gate, block_step_, m_.channels, taps, block.count, tile,
               [&](int64_t t, int64_t p, int64_t rows, int64_t n, const A* product) {
                 for (int64_t i = 0; i < rows; ++i)
                   memcpy(to + (t + i) * pixels_ + p, product + i * kTileWidth<A>, n * sizeof(A));
               });
    }
  }

  const Maps& m_;
  const int64_t pixels_;
  const bool fused_;
  const int64_t region_columns_, image_columns_;
  const bool backward_;
  const int64_t block_, blocks_, block_step_, channel_step_;
  A* const scratch_;
  const A *gate_weights_ = nullptr, *image_weights_ = nullptr, *region_weights_ = nullptr;
};

// The region's gradient from that of its columns: each element adds up the taps that read it. scratch: a row for each
// worker.
template <typename T, typename A>
void gather_region(const Maps& m, T* region_grad, A* scratch, const Workers& workers) {
  const Window& w = m.region;
  const int64_t pixels = m.height * m.width;
  for_each_part(workers, m.images * w.channels * w.height, [&](int64_t worker, int64_t first, int64_t last) {
    A* const row = scratch + worker * w.width;
    for (int64_t i = first; i < last; ++i) {
      const int64_t plane = i / w.height, y = i % w.height;  // plane: image * C + channel
      memset(row, 0, w.width * sizeof(A));
      for (int64_t u = 0; u < w.kernel_height; ++u) {
        const int64_t at = y + w.padding_y - u * w.dilation_y, from_y = at / w.stride_y;
        if (at < 0 || at % w.stride_y != 0 || from_y >= m.height) continue;
        for (int64_t v = 0; v < w.kernel_width; ++v) {
          const int64_t column = (plane * w.kernel_height + u) * w.kernel_width + v, x = v * w.dilation_x - w.padding_x;
          const A* const from = static_cast<const A*>(m.scattered) + column * pixels + from_y * m.width;
          const Inside in = inside(x, w.stride_x, w.width, m.width);
          for (int64_t j = in.begin; j < in.end; ++j) row[x + j * w.stride_x] += from[j];
        }
      }
      narrow_run(row, region_grad + i * w.width, w.width);
    }
  });
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
