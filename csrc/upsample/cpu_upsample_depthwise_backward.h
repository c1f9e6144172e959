// The gradients of upsample_concat_depthwise for one CPU target.
//
// A worker takes a block of channels of an image down through the map once. Rows of the R gradients pass through rings
// like the forward kernel's, interpolated rows through another. For each row of the output: the gradient of the
// interpolated map is the sum of the flipped filters over the gradients' rows, and goes straight on into the source
// rows; nine sums of products of a gradient's row with the interpolated rows, and the sum of the row, are the gradients
// of weight and shift. Sums of an image's channel are kept apart and added up at the end in the order of the images.
// Gradients are read once, and no tensor of the output's size is made.
#pragma once

#include "upsample/cpu_upsample_depthwise.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// sums[t] += products of a row of gradients with what tap t reads, sums[9] += the row. Vectors of channels, or of pixels,
// whose sums are then spread over lanes. `rest`: pixels of a last vector, of which the other lanes are left out: they
// hold zeros in the gradients, but maybe infinity in what taps of other pixels read.
template <typename A>
__attribute__((noinline)) void add_products(const A* grad, const TapRows<A>& from, int64_t offset, int64_t vectors,
                                            int64_t step, int64_t rest, A* sums, int64_t sums_step) {
  Vec<A> s[kTaps + 1] = {};
  const A *top = from.top, *middle = from.middle, *bottom = from.bottom;
  const auto add = [&](const auto& read) __attribute__((always_inline)) {
    const Vec<A> g = load(grad);
    s[0] += g * read(top - offset);
    s[1] += g * read(top);
    s[2] += g * read(top + offset);
    s[3] += g * read(middle - offset);
    s[4] += g * read(middle);
    s[5] += g * read(middle + offset);
    s[6] += g * read(bottom - offset);
    s[7] += g * read(bottom);
    s[8] += g * read(bottom + offset);
    s[9] += g;
  };
  for (int64_t i = 0; i < vectors; ++i, grad += step, top += step, middle += step, bottom += step)
    add([](const A* p) { return load(p); });
  if (rest > 0) {
    Vec<A> lane;
    for (int i = 0; i < kLanes<A>; ++i) lane[i] = A(i);
    const auto kept = lane < broadcast(A(rest));
    add([&](const A* p) { return kept ? load(p) : Vec<A>{}; });
  }
#pragma GCC unroll 10
  for (int t = 0; t <= kTaps; ++t) store(sums + t * sums_step, load(sums + t * sums_step) + s[t]);
}

template <typename T, typename A>
class UpsampleDepthwiseBackward {
 public:
  static int64_t scratch(const UpsampleDepthwiseArgs& a, int64_t workers) {
    return workers * scratch_of_worker(a) * int64_t(sizeof(A));
  }

  UpsampleDepthwiseBackward(const UpsampleDepthwiseArgs& d, void* scratch)
      : d_(d),
        a_(d.upsample),
        reach_(d),
        block_(a_.last ? kDepthwiseBlock : 1),
        lanes_(weight_lanes<A>(block_)),
        scratch_(static_cast<A*>(scratch)) {}

  void run(const Workers& workers) {
    const UpsampleUnits units(a_, block_);
    for_each_part(workers, units.count(), [&](int64_t worker, int64_t first, int64_t last) {
      A* scratch = scratch_ + worker * scratch_of_worker(d_);
      const auto take = [&](int64_t size) {
        A* const taken = scratch;
        scratch += size;
        return taken;
      };
      const int64_t rows = RowInterpolator<T, A>::scratch(a_, block_);
      Worker w{{a_, block_, take(rows)},
               {a_, block_, take(rows)},
               {a_.width, block_, reach_.rows, reach_.columns, take(ring_size(d_, reach_.rows, block_))},
               {},
               take(d_.rates * (kTaps + 1) * lanes_),
               take(d_.rates * (kTaps + 1) * lanes_),
               take(row_size(a_, block_))};
      for (int64_t r = 0; r < d_.rates; ++r) {
        const int64_t reach = FilterReach::rows_of(d_, r);
        w.grads[r] = PaddedRows<A>(a_.width, block_, reach, reach_.columns, take(ring_size(d_, reach, block_)));
      }
      for (int64_t i = first; i < last; ++i) unit(w, units[i]);
    });
    if (d_.sums) add_images(workers);
  }

 private:
  struct Worker {
    RowInterpolator<T, A> source;
    RowGradient<T, A> gradient;
    PaddedRows<A> ring;
    PaddedRows<A> grads[kMostRates];
    A *weights, *sums, *row;
  };

  static int64_t row_size(const UpsampleArgs& a, int64_t block) {
    return rounded_up(a.width * block + kVectorSlack, kCacheLine);
  }
  static int64_t ring_size(const UpsampleDepthwiseArgs& d, int64_t reach, int64_t block) {
    return PaddedRows<A>::size(d.upsample.width, block, reach, FilterReach(d).columns);
  }
  static int64_t scratch_of_worker(const UpsampleDepthwiseArgs& d) {
    const UpsampleArgs& a = d.upsample;
    const int64_t block = a.last ? kDepthwiseBlock : 1;
    int64_t size = 2 * RowInterpolator<T, A>::scratch(a, block) + ring_size(d, FilterReach(d).rows, block) +
                   2 * d.rates * (kTaps + 1) * weight_lanes<A>(block) + row_size(a, block);
    for (int64_t r = 0; r < d.rates; ++r) size += ring_size(d, FilterReach::rows_of(d, r), block);
    return rounded_up(size, kCacheLine);
  }

  void unit(Worker& w, const UpsampleUnit& unit) {
    const UpsampleMap& map = a_.map[unit.map];
    const bool need_input = map.grad != nullptr, need_sums = d_.sums != nullptr;
    if (need_input) {
      gather_weights(d_, unit, block_, true, w.weights);
      w.gradient.start(unit, 0, map.height);
    }
    if (need_sums) {
      w.source.start(unit);
      memset(w.sums, 0, d_.rates * (kTaps + 1) * lanes_ * sizeof(A));
    }
    if (unit.n < block_)  // what a wider unit left in the lanes of channels that are not there
      for (int64_t r = 0; r < d_.rates; ++r) w.grads[r].clear();
    int64_t next = 0, next_grad[kMostRates] = {};
    for (int64_t y = 0; y < a_.height; ++y) {
      for (int64_t r = 0; r < d_.rates; ++r) {
        w.grads[r].move_to(y);
        const int64_t reach = FilterReach::rows_of(d_, r);
        for (int64_t& i = next_grad[r]; i < a_.height && i <= y + reach; ++i) read_grad(r, unit, i, w.grads[r].at(i));
      }
      if (need_input) {
        for (int64_t r = 0; r < d_.rates; ++r) {
          const TapRows<A> rows = w.grads[r].taps(y, FilterReach::rows_of(d_, r), a_.height);
          const A* const weight = w.weights + r * (kTaps + 1) * lanes_;
          const auto filter = r == 0 ? filter_rows<false, false, A> : filter_rows<false, true, A>;
          filter(&rows, 1, FilterReach::columns_of(d_, r), weight, block_, a_.width, w.row, 0, block_);
        }
        w.gradient.add(y, {w.row, block_});
      }
      if (!need_sums) continue;
      w.ring.move_to(y);
      for (; next < a_.height && next <= y + reach_.rows; ++next)
        w.source.template row<false>(next, block_, w.ring.at(next), block_);
      for (int64_t r = 0; r < d_.rates; ++r) add_row(w, r, y);
    }
    if (need_input) w.gradient.finish();
    if (need_sums) write_sums(w, unit);
  }

  void read_grad(int64_t r, const UpsampleUnit& unit, int64_t y, A* to) const {
    const int64_t c = a_.map[unit.map].first_channel + unit.c0, pixels = a_.height * a_.width;
    const T* const from = static_cast<const T*>(a_.grad) + (r * a_.images + unit.image) * a_.channels * pixels +
                          (a_.last ? c + y * a_.width * a_.channels : c * pixels + y * a_.width);
    const int64_t step = a_.last ? a_.channels : 1;
    each_run(step == unit.n && block_ == unit.n, a_.width, unit.n,
             [&](int64_t x, int64_t m) { convert_run(from + x * step, to + x * block_, m); });
  }

  void add_row(Worker& w, int64_t r, int64_t y) {
    const TapRows<A> rows = w.ring.taps(y, FilterReach::rows_of(d_, r), a_.height);
    const A* const grad = w.grads[r].at(y);
    const int64_t dilation = FilterReach::columns_of(d_, r);
    A* const sums = w.sums + r * (kTaps + 1) * lanes_;
    if (block_ == 1) {  // the margin behind a row is zero
      add_products(grad, rows, dilation, a_.width / kLanes<A>, kLanes<A>, a_.width % kLanes<A>, sums, lanes_);
      return;
    }
    for (int64_t c = 0; c < block_; c += kLanes<A>)
      add_products(grad + c, {rows.top + c, rows.middle + c, rows.bottom + c}, dilation * block_, a_.width, block_, 0,
                   sums + c, lanes_);
  }

  A* sums_of(int64_t image, int64_t r, int64_t c) const {
    return static_cast<A*>(d_.sums) + ((image * d_.rates + r) * a_.channels + c) * (kTaps + 1);
  }

  void write_sums(const Worker& w, const UpsampleUnit& unit) const {
    for (int64_t r = 0; r < d_.rates; ++r)
      for (int64_t c = 0; c < unit.n; ++c) {
        A* const to = sums_of(unit.image, r, a_.map[unit.map].first_channel + unit.c0 + c);
        for (int64_t t = 0; t <= kTaps; ++t) {
          const A* const from = w.sums + (r * (kTaps + 1) + t) * lanes_;
          A sum = from[c];
          for (int64_t lane = 1; block_ == 1 && lane < lanes_; ++lane) sum += from[lane];
          to[t] = sum;
        }
      }
  }

  // Into those of the first image.
  void add_images(const Workers& workers) const {
    const int64_t size = d_.rates * a_.channels * (kTaps + 1);
    A* const to = static_cast<A*>(d_.sums);
    for_each_part(workers, size, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t image = 1; image < a_.images; ++image)
        add_run(to + image * size + first, A(1), last - first, to + first);
    });
  }

  const UpsampleDepthwiseArgs& d_;
  const UpsampleArgs& a_;
  const FilterReach reach_;
  const int64_t block_, lanes_;
  A* const scratch_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
