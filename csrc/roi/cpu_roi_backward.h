// The gradients of RoIAlign for one CPU target. Of the maps: each worker owns rows of a channels_last map or channels of
// another one, and adds up the boxes in their order, so that no sum depends on the number of threads. Of the boxes: each
// box belongs to one worker.
#pragma once

#include "roi/cpu_roi_forward.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// Offsets into a map from `first` on, before `last`.
struct Span {
  int64_t first, last;
};
constexpr Span kWhole{0, INT64_MAX};

// to[offset + c] += weight * g[c] for all taps within the span.
template <typename A, typename Taps>
inline void spread(A* to, const Taps& taps, const A* g, int64_t n, Span span) {
  constexpr int64_t lanes = kLanes<A>;
  taps.each([&](int64_t offset, A weight) {
    if (offset < span.first || offset >= span.last) return;
    A* p = to + offset;
    const Vec<A> w = broadcast<A>(weight);
    int64_t c = 0;
    for (; c + lanes <= n; c += lanes) store(p + c, load(p + c) + w * load(g + c));
    for (; c < n; ++c) p[c] += weight * g[c];
  });
}

template <typename T, typename A>
class RoiBackward {
 public:
  RoiBackward(const RoiArgs& a, const Workers& workers)
      : a_(a),
        workers_(workers),
        bins_(a.sampling.bins[kZ] * a.sampling.bins[kY] * a.sampling.bins[kX]),
        plans_(a, a.group[a.levels * a.images], workers),
        stage_(static_cast<A*>(a.allocate(a.context, workers.count * bins_ * kMostChannels * int64_t(sizeof(A))))) {}

  void run() {
    for (int64_t l = 0; l < a_.levels; ++l)
      for (int64_t image = 0; image < a_.images; ++image) {
        Group group(a_, l, image);
        const RoiLevel& level = a_.level[l];
        if (level.grad != nullptr) {
          if (kSame<T, A> && level.grad_last && !a_.maximum) {
            add_in_place(group);
          } else {
            add_in_blocks(group);
          }
        }
        if (a_.grad_boxes != nullptr && group.begin < group.end) box_gradients(group);
      }
  }

 private:
  // The boxes of one image of one level.
  struct Group {
    Group(const RoiArgs& a, int64_t l, int64_t image)
        : level(a.level[l]),
          image(image),
          begin(a.group[l * a.images + image]),
          end(a.group[l * a.images + image + 1]),
          rows(level.size[kZ] * level.size[kY]),
          width(level.size[kX]) {}
    const RoiLevel& level;
    int64_t image, begin, end, rows, width;

    // An image of `channels` channels side by side.
    template <typename S>
    View<S> view(S* data, int64_t channels) const {
      return {data, {level.size[kY] * width * channels, width * channels, channels}};
    }
  };

  // g[bin][c] of channels c0 .. c0 + n - 1, n <= kMostChannels, zero up to `padded` channels.
  const A* gradients(int64_t k, int64_t c0, int64_t n, int64_t padded, int64_t worker, int64_t* stride) const {
    const T* from = static_cast<const T*>(a_.grad_output) + k * a_.channels * bins_;
    if constexpr (kSame<T, A>) {
      if (a_.last && n == padded) {
        *stride = a_.channels;
        return from + c0;
      }
    }
    *stride = kMostChannels;
    A* const g = stage_ + worker * bins_ * kMostChannels;
    if (padded > n)
      for (int64_t bin = 0; bin < bins_; ++bin) memset(g + bin * kMostChannels + n, 0, (padded - n) * sizeof(A));
    if (a_.last) {
      for (int64_t bin = 0; bin < bins_; ++bin) convert_run(from + bin * a_.channels + c0, g + bin * kMostChannels, n);
    } else {
      transpose_to(from + c0 * bins_, bins_, g, kMostChannels, n, bins_);
    }
    return g;
  }

  template <typename F>
  void each_bin(const F& f) const {
    int64_t bin = 0;
    for (int64_t z = 0; z < a_.sampling.bins[kZ]; ++z)
      for (int64_t y = 0; y < a_.sampling.bins[kY]; ++y)
        for (int64_t x = 0; x < a_.sampling.bins[kX]; ++x, ++bin) f(bin, z, y, x);
  }

  // Adds the gradient of one box to channels of the map, within the span.
  void add(const View<A>& to, const BoxPlan<A>& plan, const A* g, int64_t stride, int64_t n, Span span = kWhole) const {
    each_bin([&](int64_t bin, int64_t z, int64_t y, int64_t x) {
      if (plan.box.rotated) {
        spread(to.data, SampledTaps<A>{plan, to.stride, z, y, x}, g + bin * stride, n, span);
      } else {
        spread(to.data, SeparableTaps<A>{plan, to.stride, z, y, x}, g + bin * stride, n, span);
      }
    });
  }

  // The gradient of a maximum goes to the point that has it.
  template <typename S>
  void add_maximum(const View<A>& to, const View<const S>& input, const BoxPlan<A>& plan, const A* g, int64_t stride,
                   int64_t n) const {
    A best[kMostChannels], own[kMostChannels];
    PointNumber<A> which[kMostChannels];
    each_bin([&](int64_t bin, int64_t z, int64_t y, int64_t x) {
      maximum(input, plan, z, y, x, n, best, which);
      PointNumber<A> number = 0;
      each_sample(plan.box, z, y, x, [&](const roi::Sample<A>& s) {
        if (s.inside) {
          for (int64_t c = 0; c < n; ++c) own[c] = which[c] == number ? g[bin * stride + c] : A(0);
          each_corner(s, plan.box.dims, to.stride, [&](int64_t offset, A weight, const A*) {
            for (int64_t c = 0; c < n; ++c) to.data[offset + c] += weight * own[c];
          });
        }
        ++number;
      });
    });
  }

  // Calls f(row, weight) with weights whose sums from row 0 on are the group's work up to a row: how many elements of each
  // row the boxes reach.
  template <typename F>
  void each_step(const Group& group, const F& f) const {
    for (int64_t i = group.begin; i < group.end; ++i) {
      const Region& r = plans_[i].region;
      const A width = A(r.last[kX] - r.first[kX] + 1);
      if (width <= 0 || r.last[kY] < r.first[kY]) continue;
      for (int64_t z = r.first[kZ]; z <= r.last[kZ]; ++z) {
        f(z * group.level.size[kY] + r.first[kY], width);
        f(z * group.level.size[kY] + r.last[kY] + 1, -width);
      }
    }
  }

  // channels_last maps of the type that is computed in take the sums of averages themselves. Workers own rows: if they
  // shared a pixel's channels, each would fetch lines that belong to the other.
  void add_in_place(const Group& group) {
    if constexpr (kSame<T, A>) {
      const int64_t pitch = group.width * a_.channels;  // of a row
      T* const grad = static_cast<T*>(group.level.grad) + group.image * group.rows * pitch;
      A* const work = reserve(&work_, group.rows + 2);
      memset(work, 0, (group.rows + 2) * sizeof(A));
      each_step(group, [&](int64_t row, A weight) { work[row + 1] += weight; });
      for (int pass = 0; pass < 2; ++pass)  // of steps to the work of each row, and to that up to each row
        for (int64_t row = 0; row < group.rows; ++row) work[row + 1] += work[row];
      const auto border = [&](int64_t worker) {
        if (worker == workers_.count) return group.rows;
        int64_t row = group.rows * worker / workers_.count;
        if (work[group.rows] > 0)
          for (row = 0; row < group.rows && work[row] * A(workers_.count) < work[group.rows] * A(worker);) ++row;
        return row;
      };
      for_each_part(workers_, workers_.count, [&](int64_t worker, int64_t, int64_t) {
        const int64_t first = border(worker), last = border(worker + 1);
        memset(grad + first * pitch, 0, (last - first) * pitch * sizeof(T));
        for (int64_t i = group.begin; i < group.end; ++i) {
          const Region& r = plans_[i].region;
          const int64_t size = group.level.size[kY];
          if (r.first[kZ] * size + r.first[kY] >= last || r.last[kZ] * size + r.last[kY] < first) continue;
          int64_t n, stride;
          for (int64_t c = 0; c < a_.channels; c += n) {
            n = a_.last ? a_.channels : smaller(kMostChannels, a_.channels - c);
            const A* g = gradients(plans_[i].index, c, n, n, worker, &stride);
            add(group.view(grad + c, a_.channels), plans_[i], g, stride, n, {first * pitch, last * pitch});
          }
        }
      });
    }
  }

  // Other maps: sums over the boxes in blocks of channels side by side, which are then written out.
  void add_in_blocks(const Group& group) {
    const RoiLevel& level = group.level;
    Marks marks(a_, level.size);
    for (int64_t i = group.begin; i < group.end; ++i) marks.add(plans_[i].region);
    const int64_t width = block_channels(a_, level, sizeof(A), workers_.count);
    const int64_t size = group.rows * group.width * width;
    A* const sums = reserve(&sums_, size * workers_.count);
    A* const inputs = a_.maximum ? reserve(&inputs_, size * workers_.count) : nullptr;
    for_each_part(workers_, (a_.channels + width - 1) / width, [&](int64_t worker, int64_t first, int64_t last) {
      const View<A> sum = group.view(sums + worker * size, width);
      for (int64_t c = first * width; c < smaller(last * width, a_.channels); c += width) {
        const int64_t n = smaller(width, a_.channels - c), padded = round_up(n, kTransposeBlock);
        marks.each_run(0, group.rows, [&](int64_t row, int64_t x, int64_t count, bool marked) {
          if (marked) memset(sum.data + (row * group.width + x) * width, 0, count * width * sizeof(A));
        });
        if (a_.maximum) gather(group, marks, 0, group.rows, c, n, inputs + worker * size, width);
        for (int64_t i = group.begin; i < group.end; ++i) {
          int64_t stride;
          const A* g = gradients(plans_[i].index, c, n, padded, worker, &stride);
          if (a_.maximum) {
            add_maximum(sum, group.template view<const A>(inputs + worker * size, width), plans_[i], g, stride, padded);
          } else {
            add(sum, plans_[i], g, stride, padded);
          }
        }
        marks.each_run(0, group.rows, [&](int64_t row, int64_t x, int64_t count, bool marked) {
          write_run(group, row, x, count, c, n, marked ? sum.data + row * group.width * width : nullptr, width);
        });
      }
    });
  }

  // block: of the row.
  void write_run(const Group& group, int64_t row, int64_t x, int64_t count, int64_t c, int64_t n, const A* block,
                 int64_t width) const {
    const RoiLevel& level = group.level;
    T* const image = static_cast<T*>(level.grad) + group.image * a_.channels * group.rows * group.width;
    if (!level.grad_last) {
      T* const to = image + c * group.rows * group.width + row * group.width;
      return scatter_run(block, width, n, to, group.rows * group.width, x, count);
    }
    for (int64_t i = x; i < x + count; ++i) {
      T* const to = image + (row * group.width + i) * a_.channels + c;
      if (block == nullptr) {
        memset(to, 0, n * sizeof(T));
      } else {
        narrow_run(block + i * width, to, n);
      }
    }
  }

  // The marked runs of rows first .. last - 1 of the input's channels c .. c + n - 1.
  void gather(const Group& group, const Marks& marks, int64_t first, int64_t last, int64_t c, int64_t n, A* block,
              int64_t width) const {
    const RoiLevel& level = group.level;
    const T* const image = static_cast<const T*>(level.input) + group.image * level.stride[0] + c * level.stride[1];
    marks.each_run(first, last, [&](int64_t row, int64_t x, int64_t count, bool marked) {
      if (!marked) return;
      const T* from = image + row / level.size[kY] * level.stride[2] + row % level.size[kY] * level.stride[3];
      gather_run(from, level.stride[1], level.stride[4], n, block + row * group.width * width, width, x, count);
    });
  }

  // Of the boxes' columns: each point's derivative by its coordinates, summed over the channels.
  void box_gradients(const Group& group) {
    const RoiLevel& level = group.level;
    Marks marks(a_, level.size);
    for (int64_t i = group.begin; i < group.end; ++i) marks.add(plans_[i].region);
    const int64_t width = block_channels(a_, level, sizeof(A), 1);  // the sums must not depend on the workers
    A* const inputs = reserve(&inputs_, group.rows * group.width * width);
    const View<const A> input = group.template view<const A>(inputs, width);
    for (int64_t c = 0; c < a_.channels; c += width) {
      const int64_t n = smaller(width, a_.channels - c), padded = round_up(n, kTransposeBlock);
      for_each_part(workers_, group.rows, [&](int64_t, int64_t first, int64_t last) {
        gather(group, marks, first, last, c, n, inputs, width);
      });
      for_each_part(workers_, group.end - group.begin, [&](int64_t worker, int64_t first, int64_t last) {
        for (int64_t i = group.begin + first; i < group.begin + last; ++i) {
          int64_t stride;
          const A* g = gradients(plans_[i].index, c, n, padded, worker, &stride);
          add_box(input, plans_[i], g, stride, padded);
        }
      });
    }
  }

  void add_box(const View<const A>& input, const BoxPlan<A>& plan, const A* g, int64_t stride, int64_t n) const {
    A row[roi::kMostColumns] = {}, best[kMostChannels], own[kMostChannels];
    PointNumber<A> which[kMostChannels];
    const A part = a_.maximum ? A(1) : A(1) / samples_of(plan.box);
    each_bin([&](int64_t bin, int64_t z, int64_t y, int64_t x) {
      if (a_.maximum) maximum(input, plan, z, y, x, n, best, which);
      PointNumber<A> number = 0;
      each_sample(plan.box, z, y, x, [&](const roi::Sample<A>& s) {
        if (s.inside) {
          for (int64_t c = 0; c < n; ++c) own[c] = a_.maximum && which[c] != number ? A(0) : part * g[bin * stride + c];
          A by_point[kAxes] = {};
          each_corner(s, plan.box.dims, input.stride, [&](int64_t offset, A, const A* derivative) {
            Vec<A> sum{};
            for (int64_t c = 0; c < n; c += kLanes<A>) sum += load(own + c) * load(input.data + offset + c);
            A dot = 0;
            for (int lane = 0; lane < kLanes<A>; ++lane) dot += sum[lane];
            for (int axis = 0; axis < kAxes; ++axis) by_point[axis] += derivative[axis] * dot;
          });
          roi::add_box_gradient(plan.box, s, by_point, row);
        }
        ++number;
      });
    });
    A* const to = static_cast<A*>(a_.grad_boxes) + plan.index * a_.columns;
    for (int64_t i = 0; i < a_.columns; ++i) to[i] += row[i];
  }

  struct Scratch {
    A* data = nullptr;
    int64_t size = 0;
  };
  A* reserve(Scratch* scratch, int64_t size) const {
    if (scratch->size < size) {
      scratch->data = static_cast<A*>(a_.allocate(a_.context, size * int64_t(sizeof(A))));
      scratch->size = size;
    }
    return scratch->data;
  }

  const RoiArgs& a_;
  const Workers& workers_;
  const int64_t bins_;
  Plans<A> plans_;
  A* stage_;  // [workers][bins, kMostChannels]
  Scratch sums_, inputs_, work_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
