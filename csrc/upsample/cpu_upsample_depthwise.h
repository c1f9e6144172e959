// upsample_concat_depthwise for one CPU target.
//
// Nine multiply-adds for each output, of which R are computed for each element that is interpolated, so the stores set
// the pace: the output is R times as large as the interpolated maps, which never leave the cache. A worker takes a block
// of channels (a cache line in channels_last, one plane otherwise) down through a map. A ring of interpolated rows, as
// many as the largest dilation reaches, has a margin of zeros on both sides, and a row of zeros stands for what is above
// and below: no tap needs a test. The nine weights of a filter stay in registers along a row.
#pragma once

#include "upsample/cpu_upsample_concat.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kDepthwiseBlock = 32;  // channels_last: channels of a block
constexpr int64_t kVectorSlack = 16;     // elements behind a row that vectors may touch

constexpr int64_t kTaps = 9;
using upsample::kMostRates;

// Rows that are filtered together.
constexpr int64_t kMostChunk = 16;
constexpr int64_t chunk_rows(int64_t width, int64_t block) {
  return block > 1 ? 1 : larger<int64_t>(1, smaller(kMostChunk, 1024 / larger<int64_t>(1, width)));
}

// The rows that the taps of one output row read: above, at and below it.
template <typename A>
struct TapRows {
  const A *top, *middle, *bottom;
};

// Interpolated rows, or rows of gradients, with margins of zeros.
template <typename A>
class PaddedRows {
 public:
  // reach: how far the taps of a chunk's rows look up and down, margin: how far to the sides.
  PaddedRows() = default;
  PaddedRows(int64_t width, int64_t block, int64_t reach, int64_t margin, A* scratch)
      : slots_(2 * reach + chunk_rows(width, block)),
        lead_(rounded_up(margin * block, kCacheLine)),
        size_(row_size(width, block, margin)),
        storage_(scratch) {
    clear();
  }
  void clear() { memset(storage_, 0, (slots_ + 1) * size_ * sizeof(A)); }

  static int64_t size(int64_t width, int64_t block, int64_t reach, int64_t margin) {
    return (2 * reach + chunk_rows(width, block) + 1) * row_size(width, block, margin);
  }

  // Before rows around `y` are asked for. Divisions for each row would take as long as filtering a short one.
  void move_to(int64_t y) { first_ = y / slots_ * slots_; }
  // Pixel 0 of a row: begins a cache line.
  A* at(int64_t y) {
    const int64_t i = y - first_;
    return storage_ + (i < 0 ? i + slots_ : i < slots_ ? i : i - slots_) * size_ + lead_;
  }
  // For output row y and taps d rows apart; rows outside the map are zeros.
  TapRows<A> taps(int64_t y, int64_t d, int64_t height) {
    const A* const zeros = storage_ + slots_ * size_ + lead_;
    return {y < d ? zeros : at(y - d), at(y), y + d < height ? at(y + d) : zeros};
  }

 private:
  static int64_t row_size(int64_t width, int64_t block, int64_t margin) {
    return rounded_up(margin * block, kCacheLine) + rounded_up((width + margin) * block + kVectorSlack, kCacheLine);
  }

  int64_t slots_ = 0, lead_ = 0, size_ = 0, first_ = 0;
  A* storage_ = nullptr;
};

// What all units of a call share: the filters' reach.
struct FilterReach {
  explicit FilterReach(const UpsampleDepthwiseArgs& a) {
    for (int64_t r = 0; r < a.rates; ++r) {
      rows = larger(rows, rows_of(a, r));
      columns = larger(columns, columns_of(a, r));
    }
  }
  // A tap that is farther away than the map is large sees zeros wherever it is.
  static int64_t rows_of(const UpsampleDepthwiseArgs& a, int64_t r) {
    return smaller(a.dilation[r], a.upsample.height);
  }
  static int64_t columns_of(const UpsampleDepthwiseArgs& a, int64_t r) {
    return smaller(a.dilation[r], a.upsample.width);
  }
  int64_t rows = 0, columns = 0;
};

// Elements of a weight of one tap: of the channels of a block, or one weight in every lane.
template <typename A>
constexpr int64_t weight_lanes(int64_t block) {
  return block == 1 ? kLanes<A> : block;
}

// Weights of a unit's filters: [R][9 and the shift][weight_lanes].
template <typename A>
inline void gather_weights(const UpsampleDepthwiseArgs& a, const UpsampleUnit& unit, int64_t block, bool flipped,
                           A* to) {
  const int64_t c0 = a.upsample.map[unit.map].first_channel + unit.c0;
  const int64_t lanes = weight_lanes<A>(block);
  for (int64_t r = 0; r < a.rates; ++r, to += (kTaps + 1) * lanes) {
    const int64_t first = r * a.upsample.channels + c0;
    const A* const weight = static_cast<const A*>(a.weight) + first * kTaps;
    const A* const scale = a.scale ? static_cast<const A*>(a.scale) + first : nullptr;
    const A* const shift = a.shift ? static_cast<const A*>(a.shift) + first : nullptr;
    if (block == 1) {
      for (int64_t t = 0; t < kTaps; ++t)
        store(to + (flipped ? kTaps - 1 - t : t) * lanes, broadcast(weight[t] * (scale ? *scale : A(1))));
      store(to + kTaps * lanes, broadcast(shift ? *shift : A(0)));
      continue;
    }
    memset(to, 0, (kTaps + 1) * lanes * sizeof(A));
    for (int64_t c = 0; c < unit.n; ++c) {
      for (int64_t t = 0; t < kTaps; ++t)
        to[(flipped ? kTaps - 1 - t : t) * lanes + c] = weight[c * kTaps + t] * (scale ? scale[c] : A(1));
      if (shift) to[kTaps * lanes + c] = shift[c];
    }
  }
}

// `count` rows of `vectors` vectors of outputs: row[i * to_step] = w[9] + sum over taps of w * from[i * step + tap]. kAdd:
// to what is there instead. w: 10 vectors, w_step apart.
template <bool kStream, bool kAdd, typename A>
__attribute__((noinline)) void filter_vectors(const TapRows<A>* from, int64_t count, int64_t c, int64_t offset,
                                              const A* w, int64_t w_step, int64_t vectors, int64_t step, A* to,
                                              int64_t to_row, int64_t to_step) {
  const Vec<A> w0 = load(w), w1 = load(w + w_step), w2 = load(w + 2 * w_step), w3 = load(w + 3 * w_step),
               w4 = load(w + 4 * w_step), w5 = load(w + 5 * w_step), w6 = load(w + 6 * w_step),
               w7 = load(w + 7 * w_step), w8 = load(w + 8 * w_step), start = load(w + 9 * w_step);
  for (int64_t row = 0; row < count; ++row, to += to_row) {
    const A *top = from[row].top + c, *middle = from[row].middle + c, *bottom = from[row].bottom + c;
    A* out = to;
    for (int64_t i = 0; i < vectors; ++i, top += step, middle += step, bottom += step, out += to_step) {
      Vec<A> p = kAdd ? load(out) : start, q = w3 * load(middle - offset), r = w6 * load(bottom - offset);
      p += w0 * load(top - offset);
      q += w4 * load(middle);
      r += w7 * load(bottom);
      p += w1 * load(top);
      q += w5 * load(middle + offset);
      r += w8 * load(bottom + offset);
      p += w2 * load(top + offset);
      const Vec<A> sum = p + q + r;
      if constexpr (kStream) {
        stream(out, sum);
      } else {
        store(out, sum);
      }
    }
  }
}

// Rows of one filter. channels_last: W pixels of `block` channels, `to_step` apart; otherwise W pixels, and vectors reach
// up to kVectorSlack elements beyond. weight: [10][block], or [10] vectors of equal elements.
template <bool kStream, bool kAdd, typename A>
inline void filter_rows(const TapRows<A>* from, int64_t count, int64_t dilation, const A* weight, int64_t block,
                        int64_t width, A* to, int64_t to_row, int64_t to_step) {
  if (block == 1) {
    filter_vectors<kStream, kAdd>(from, count, 0, dilation, weight, kLanes<A>, (width + kLanes<A> - 1) / kLanes<A>,
                                  kLanes<A>, to, to_row, kLanes<A>);
    return;
  }
  for (int64_t c = 0; c < block; c += kLanes<A>)
    filter_vectors<kStream, kAdd>(from, count, c, dilation * block, weight + c, block, width, block, to + c, to_row,
                                  to_step);
}

// Rows that come one after the other in memory, on their way there: `stage` gathers them until they fill vectors.
template <typename T, typename A>
class RowWriter {
 public:
  static constexpr int64_t kStaged = 2048;  // elements
  static int64_t size(int64_t width) {
    return rounded_up(kStaged + chunk_rows(width, 1) * width + kVectorSlack, kCacheLine);
  }

  void start(T* to, A* stage, bool streams) {
    to_ = to;
    stage_ = stage;
    filled_ = 0;
    streams_ = streams;
  }
  A* next() { return stage_ + filled_; }
  void wrote(int64_t n) {
    filled_ += n;
    if (filled_ >= kStaged) flush(false);
  }
  void finish() { flush(true); }

 private:
  void flush(bool all) {
    int64_t i = 0;
    if constexpr (kSame<T, A>) {
      if (streams_) {
        for (; i < filled_ && !is_aligned(to_ + i); ++i) to_[i] = stage_[i];
        for (; i + kLanes<A> <= filled_; i += kLanes<A>) stream(to_ + i, load(stage_ + i));
        if (!all) {
          memmove(stage_, stage_ + i, (filled_ - i) * sizeof(A));
          to_ += i;
          filled_ -= i;
          return;
        }
      }
    }
    narrow_run(stage_ + i, to_ + i, filled_ - i);
    to_ += filled_;
    filled_ = 0;
  }

  T* to_ = nullptr;
  A* stage_ = nullptr;
  int64_t filled_ = 0;
  bool streams_ = false;
};

template <typename T, typename A>
class UpsampleDepthwise {
 public:
  static int64_t scratch(const UpsampleDepthwiseArgs& a, int64_t workers) {
    return workers * scratch_of_worker(a) * int64_t(sizeof(A));
  }

  UpsampleDepthwise(const UpsampleDepthwiseArgs& d, void* scratch)
      : d_(d), a_(d.upsample), reach_(d), block_(block_of(a_)), scratch_(static_cast<A*>(scratch)) {}

  void run(const Workers& workers) {
    const UpsampleUnits units(a_, block_);
    const int64_t bands = bands_of(units.count(), a_.height, larger<int64_t>(8, 2 * reach_.rows), workers.count);
    const bool streams = streams_output();
    for_each_part(workers, units.count() * bands, [&](int64_t worker, int64_t first, int64_t last) {
      A* const scratch = scratch_ + worker * scratch_of_worker(d_);
      RowInterpolator<T, A> source(a_, block_, scratch);
      A* const rest = scratch + RowInterpolator<T, A>::scratch(a_, block_);
      PaddedRows<A> ring(a_.width, block_, reach_.rows, reach_.columns, rest);
      A* const weights = rest + PaddedRows<A>::size(a_.width, block_, reach_.rows, reach_.columns);
      A* const stage = weights + d_.rates * (kTaps + 1) * weight_lanes<A>(block_);
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = a_.height * (i % bands) / bands, end = a_.height * (i % bands + 1) / bands;
        const UpsampleUnit unit = units[i / bands];
        source.start(unit);
        gather_weights(d_, unit, block_, false, weights);
        if (a_.last) {
          if (streams && unit.n == block_) {
            band<true>(source, ring, weights, unit, begin, end, stage);
          } else {
            band<false>(source, ring, weights, unit, begin, end, stage);
          }
        } else {
          plane(source, ring, weights, unit, begin, end, stage, streams);
        }
      }
      stream_fence();
    });
  }

 private:
  static int64_t block_of(const UpsampleArgs& a) { return a.last ? kDepthwiseBlock : 1; }

  static int64_t scratch_of_worker(const UpsampleDepthwiseArgs& a) {
    const FilterReach reach(a);
    const int64_t block = block_of(a.upsample), width = a.upsample.width;
    const int64_t stage =
        a.upsample.last ? chunk_rows(width, block) * width * block : a.rates * RowWriter<T, A>::size(width);
    return RowInterpolator<T, A>::scratch(a.upsample, block) +
           PaddedRows<A>::size(width, block, reach.rows, reach.columns) +
           rounded_up(a.rates * (kTaps + 1) * weight_lanes<A>(block) + stage + kVectorSlack, kCacheLine);
  }

  bool streams_output() const {
    if (!kSame<T, A>) return false;
    const int64_t elements = d_.rates * a_.images * a_.channels * a_.height * a_.width;
    if (elements * int64_t(sizeof(T)) <= kStreamBytes) return false;
    if (!a_.last) return true;
    bool whole = a_.channels % kLanes<A> == 0 && is_aligned(a_.output);
    for (int64_t l = 0; l < a_.maps; ++l) whole = whole && a_.map[l].first_channel % kLanes<A> == 0;
    return whole;
  }

  // Calls f(y, r, rows, count) for chunks of rows begin .. end - 1 and all filters.
  template <typename F>
  void each_chunk(RowInterpolator<T, A>& source, PaddedRows<A>& ring, int64_t begin, int64_t end, const F& f) {
    const int64_t chunk = chunk_rows(a_.width, block_);
    int64_t next = larger<int64_t>(0, begin - reach_.rows);
    for (int64_t y = begin; y < end; y += chunk) {
      const int64_t count = smaller(chunk, end - y);
      ring.move_to(y);
      for (; next < a_.height && next < y + count + reach_.rows; ++next)
        source.template row<false>(next, block_, ring.at(next), block_);
      for (int64_t r = 0; r < d_.rates; ++r) {
        TapRows<A> rows[kMostChunk];
        for (int64_t i = 0; i < count; ++i) rows[i] = ring.taps(y + i, FilterReach::rows_of(d_, r), a_.height);
        f(y, r, rows, count);
      }
    }
  }

  T* output(int64_t r, const UpsampleUnit& unit) const {
    const int64_t c = a_.map[unit.map].first_channel + unit.c0, pixels = a_.height * a_.width;
    return static_cast<T*>(a_.output) + (r * a_.images + unit.image) * a_.channels * pixels +
           (a_.last ? c : c * pixels);
  }

  template <bool kStream>
  void band(RowInterpolator<T, A>& source, PaddedRows<A>& ring, const A* weights, const UpsampleUnit& unit,
            int64_t begin, int64_t end, A* stage) {
    each_chunk(source, ring, begin, end, [&](int64_t y, int64_t r, const TapRows<A>* rows, int64_t count) {
      T* const to = output(r, unit) + y * a_.width * a_.channels;
      const A* const weight = weights + r * (kTaps + 1) * block_;
      const int64_t dilation = FilterReach::columns_of(d_, r);
      if constexpr (kSame<T, A>) {
        if (unit.n == block_) {
          filter_rows<kStream, false>(rows, count, dilation, weight, block_, a_.width, to, a_.width * a_.channels,
                                      a_.channels);
          return;
        }
      }
      filter_rows<false, false>(rows, count, dilation, weight, block_, a_.width, stage, a_.width * block_, block_);
      for (int64_t x = 0; x < count * a_.width; ++x) narrow_run(stage + x * block_, to + x * a_.channels, unit.n);
    });
  }

  void plane(RowInterpolator<T, A>& source, PaddedRows<A>& ring, const A* weights, const UpsampleUnit& unit,
             int64_t begin, int64_t end, A* stage, bool streams) {
    RowWriter<T, A> writers[kMostRates];
    for (int64_t r = 0; r < d_.rates; ++r)
      writers[r].start(output(r, unit) + begin * a_.width, stage + r * RowWriter<T, A>::size(a_.width), streams);
    each_chunk(source, ring, begin, end, [&](int64_t, int64_t r, const TapRows<A>* rows, int64_t count) {
      filter_rows<false, false>(rows, count, FilterReach::columns_of(d_, r),
                                weights + r * (kTaps + 1) * weight_lanes<A>(1), 1, a_.width, writers[r].next(),
                                a_.width, 1);
      writers[r].wrote(count * a_.width);
    });
    for (int64_t r = 0; r < d_.rates; ++r) writers[r].finish();
  }

  const UpsampleDepthwiseArgs& d_;
  const UpsampleArgs& a_;
  const FilterReach reach_;
  const int64_t block_;
  A* const scratch_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
