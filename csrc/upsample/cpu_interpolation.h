// Rows of interpolated maps and their gradients, for one CPU target.
//
// A row of scratch has W pixels of `block` elements: a block of channels in channels_last, otherwise one element. Source
// rows are interpolated along x once, each kept while the output walks down between it and the next; what is left for a
// row of the output is one blend of two such rows, in vectors. The gradient goes the same way back: rows of gradients
// are added to the two source rows that they came from, and a source row that is complete is reduced along x. So the
// sums of an element have one order, whatever the number of threads.
#pragma once

#include <string.h>

#include "common/cpu_convert.h"
#include "common/cpu_workers.h"
#include "upsample/upsample_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kCacheLine = 16;  // elements, of floats

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Channels first_channel + c0 .. + n - 1 of one image of one map: what is worked on in one go.
struct UpsampleUnit {
  int64_t image, map, c0, n;
};

// Cuts the maps into such parts of at most `block` channels.
class UpsampleUnits {
 public:
  UpsampleUnits(const UpsampleArgs& a, int64_t block) : a_(a), block_(block) {
    for (int64_t l = 0; l < a.maps; ++l) blocks_ += blocks_of(l);
  }
  int64_t count() const { return a_.images * blocks_; }
  UpsampleUnit operator[](int64_t i) const {
    int64_t b = i % blocks_, l = 0;
    for (; b >= blocks_of(l); ++l) b -= blocks_of(l);
    return {i / blocks_, l, b * block_, smaller(block_, a_.map[l].channels - b * block_)};
  }

 private:
  int64_t blocks_of(int64_t l) const { return (a_.map[l].channels + block_ - 1) / block_; }
  const UpsampleArgs& a_;
  const int64_t block_;
  int64_t blocks_ = 0;
};

// Pixels of a row, `step` elements from one to the next.
template <typename A>
struct RowView {
  const A* data;
  int64_t step;
};

// to[i] = (1 - w) * a[i] + w * b[i], i < n.
template <bool kStream, typename A>
inline void blend_run(const A* a, const A* b, A w, int64_t n, A* to) {
  const Vec<A> high = broadcast<A>(w), low = broadcast<A>(A(1) - w);
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    const Vec<A> y = low * load(a + i) + high * load(b + i);
    if constexpr (kStream) {
      stream(to + i, y);
    } else {
      store(to + i, y);
    }
  }
  for (; i < n; ++i) to[i] = (A(1) - w) * a[i] + w * b[i];
}

template <bool kStream, typename A>
inline void copy_run(const A* from, int64_t n, A* to) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    if constexpr (kStream) {
      stream(to + i, load(from + i));
    } else {
      store(to + i, load(from + i));
    }
  }
  for (; i < n; ++i) to[i] = from[i];
}

// to[i] += w * from[i].
template <typename A>
inline void add_run(const A* from, A w, int64_t n, A* to) {
  const Vec<A> weight = broadcast<A>(w);
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(to + i, load(to + i) + weight * load(from + i));
  for (; i < n; ++i) to[i] += w * from[i];
}

// Calls f(first element, elements) for the runs of a row: one where pixels lie side by side on all sides.
template <typename F>
inline void each_run(bool dense, int64_t pixels, int64_t n, const F& f) {
  if (dense) return f(0, pixels * n);
  for (int64_t x = 0; x < pixels; ++x) f(x, n);
}

// ---- forward ----

template <typename T, typename A>
class RowInterpolator {
 public:
  static int64_t scratch(const UpsampleArgs& a, int64_t block) {
    int64_t widest = 0;
    for (int64_t l = 0; l < a.maps; ++l) widest = larger(widest, a.map[l].width);
    return rounded_up(widest * block, kCacheLine) + 2 * rounded_up(a.width * block, kCacheLine);
  }

  RowInterpolator(const UpsampleArgs& a, int64_t block, A* scratch)
      : a_(a), block_(block), slot_size_(rounded_up(a.width * block, kCacheLine)), slots_(scratch) {
    staged_ = scratch + 2 * slot_size_;
  }

  void start(const UpsampleUnit& unit) {
    map_ = &a_.map[unit.map];
    n_ = unit.n;
    from_ = static_cast<const T*>(map_->input) + unit.image * map_->image_stride + unit.c0 * map_->channel_stride;
    held_[0] = held_[1] = -1;
    if (n_ < block_) memset(staged_, 0, map_->width * block_ * sizeof(A));  // channels that are not there
  }

  // Row y of the output: n elements of each pixel.
  template <bool kStream>
  void row(int64_t y, int64_t n, A* to, int64_t to_step) {
    const upsample::Tap& tap = map_->rows[y];
    const RowView<A> low = source_row(tap.low);
    if (map_->copied_rows) {
      each_run(low.step == n && to_step == n, a_.width, n,
               [&](int64_t x, int64_t m) { copy_run<kStream>(low.data + x * low.step, m, to + x * to_step); });
      return;
    }
    const RowView<A> high = source_row(tap.high);
    const A w = A(tap.weight);
    each_run(low.step == n && high.step == n && to_step == n, a_.width, n, [&](int64_t x, int64_t m) {
      blend_run<kStream>(low.data + x * low.step, high.data + x * high.step, w, m, to + x * to_step);
    });
  }

 private:
  // Row i of the map, interpolated along x.
  RowView<A> source_row(int64_t i) {
    const T* const from = from_ + i * map_->row_stride;
    if constexpr (kSame<T, A>)
      if (map_->copied_columns && n_ == block_) return {from, map_->column_stride};
    A* const slot = slots_ + (i & 1) * slot_size_;
    if (held_[i & 1] == i) return {slot, block_};
    held_[i & 1] = i;
    RowView<A> source{staged_, block_};
    if constexpr (kSame<T, A>) {
      if (n_ == block_) {
        source = {from, map_->column_stride};
      } else {
        for (int64_t x = 0; x < map_->width; ++x) convert_run(from + x * map_->column_stride, staged_ + x * block_, n_);
      }
    } else {
      each_run(map_->column_stride == block_ && n_ == block_, map_->width, n_,
               [&](int64_t x, int64_t m) { convert_run(from + x * map_->column_stride, staged_ + x * block_, m); });
    }
    if (map_->copied_columns) {
      copy_run<false>(source.data, a_.width * block_, slot);  // staged
    } else if (block_ == 1) {
      for (int64_t x = 0; x < a_.width; ++x) {
        const upsample::Tap& tap = map_->columns[x];
        const A w = A(tap.weight);
        slot[x] = (A(1) - w) * source.data[tap.low * source.step] + w * source.data[tap.high * source.step];
      }
    } else {
      for (int64_t x = 0; x < a_.width; ++x) {
        const upsample::Tap& tap = map_->columns[x];
        blend_run<false>(source.data + tap.low * source.step, source.data + tap.high * source.step, A(tap.weight),
                         block_, slot + x * block_);
      }
    }
    return {slot, block_};
  }

  const UpsampleArgs& a_;
  const int64_t block_, slot_size_;
  A* const slots_;  // rows of even and of odd number
  A* staged_;       // a source row, where it is not yet in order
  const UpsampleMap* map_ = nullptr;
  const T* from_ = nullptr;
  int64_t n_ = 0, held_[2] = {-1, -1};
};

// ---- backward ----

template <typename T, typename A>
class RowGradient {
 public:
  static int64_t scratch(const UpsampleArgs& a, int64_t block) { return RowInterpolator<T, A>::scratch(a, block); }

  RowGradient(const UpsampleArgs& a, int64_t block, A* scratch)
      : a_(a), block_(block), slot_size_(rounded_up(a.width * block, kCacheLine)), slots_(scratch) {
    reduced_ = scratch + 2 * slot_size_;
  }

  // Source rows first .. last - 1 are written.
  void start(const UpsampleUnit& unit, int64_t first, int64_t last) {
    map_ = &a_.map[unit.map];
    n_ = unit.n;
    next_ = first;
    last_ = last;
    held_[0] = held_[1] = -1;
    step_ = a_.last ? map_->channels : 1;
    const int64_t size = map_->channels * map_->height * map_->width;
    to_ = static_cast<T*>(map_->grad) + unit.image * size + (a_.last ? unit.c0 : unit.c0 * map_->height * map_->width);
  }

  // The gradient of row y of the output; rows come in order.
  void add(int64_t y, RowView<A> grad) {
    const upsample::Tap& tap = map_->rows[y];
    while (next_ < smaller<int64_t>(tap.low, last_)) finish_row();
    if (map_->copied_rows) {
      write_row(next_++, grad);
      return;
    }
    const A w = A(tap.weight);
    add_to_row(tap.low, A(1) - w, grad);
    add_to_row(tap.high, w, grad);
  }

  void finish() {
    while (next_ < last_) finish_row();
  }

 private:
  void add_to_row(int64_t i, A w, RowView<A> grad) {
    if (i < next_ || i >= last_) return;
    A* const slot = slots_ + (i & 1) * slot_size_;
    if (held_[i & 1] != i) {
      held_[i & 1] = i;
      memset(slot, 0, a_.width * block_ * sizeof(A));
    }
    each_run(grad.step == n_ && block_ == n_, a_.width, n_,
             [&](int64_t x, int64_t m) { add_run(grad.data + x * grad.step, w, m, slot + x * block_); });
  }

  void finish_row() {
    const int64_t i = next_++;
    if (held_[i & 1] == i) return write_row(i, {slots_ + (i & 1) * slot_size_, block_});
    T* const to = to_ + i * map_->width * step_;  // no row of the output has read it
    for (int64_t x = 0; x < map_->width; ++x) memset(to + x * step_, 0, n_ * sizeof(T));
  }

  void write_row(int64_t i, RowView<A> grad) {
    T* const to = to_ + i * map_->width * step_;
    RowView<A> reduced = grad;
    if (!map_->copied_columns) {
      memset(reduced_, 0, map_->width * block_ * sizeof(A));
      for (int64_t x = 0; x < a_.width; ++x) {
        const upsample::Tap& tap = map_->columns[x];
        const A w = A(tap.weight);
        if (block_ == 1) {
          reduced_[tap.low] += (A(1) - w) * grad.data[x * grad.step];
          reduced_[tap.high] += w * grad.data[x * grad.step];
        } else {
          add_run(grad.data + x * grad.step, A(1) - w, n_, reduced_ + tap.low * block_);
          add_run(grad.data + x * grad.step, w, n_, reduced_ + tap.high * block_);
        }
      }
      reduced = {reduced_, block_};
    }
    each_run(reduced.step == n_ && step_ == n_, map_->width, n_,
             [&](int64_t x, int64_t m) { narrow_run(reduced.data + x * reduced.step, to + x * step_, m); });
  }

  const UpsampleArgs& a_;
  const int64_t block_, slot_size_;
  A* const slots_;  // source rows of even and of odd number, as wide as the output
  A* reduced_;      // a source row
  const UpsampleMap* map_ = nullptr;
  T* to_ = nullptr;
  int64_t step_ = 0, n_ = 0, next_ = 0, last_ = 0, held_[2] = {-1, -1};
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
