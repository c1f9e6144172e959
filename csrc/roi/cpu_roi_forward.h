// RoIAlign for one CPU target: the channels of a map's element are lanes, threads take boxes.
//
// The least for an output element is its own store and a fused multiply-add for each element of the map that it
// depends on: 16 for 2 x 2 points, and for adaptive sampling about (length + 1)^2 instead of 4 * ceil(length)^2.
#pragma once

#include "roi/cpu_roi_maps.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// out[c] = sum over taps of weight * from[offset + c] for kVectors vectors of channels.
template <int kVectors, typename T, typename A, typename Taps>
inline void add_taps(const T* from, const Taps& taps, A* out) {
  Vec<A> sum[kVectors] = {};
  taps.each([&](int64_t offset, A weight) {
    const T* p = from + offset;
    const Vec<A> w = broadcast<A>(weight);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[i] += w * load_as<A>(p + i * kLanes<A>);
  });
  for (int i = 0; i < kVectors; ++i) store(out + i * kLanes<A>, sum[i]);
}

// Calls f(tag<number of vectors>, first channel) until n >= kLanes channels are done; the last vector may overlap the
// one before it.
template <int kVectors>
struct VectorCount {
  static constexpr int value = kVectors;
};
template <typename A, typename F>
inline void each_vectors(int64_t n, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + 8 * lanes <= n; c += 8 * lanes) f(VectorCount<8>{}, c);
  if (c + 4 * lanes <= n) f(VectorCount<4>{}, c), c += 4 * lanes;
  if (c + 2 * lanes <= n) f(VectorCount<2>{}, c), c += 2 * lanes;
  if (c + lanes <= n) f(VectorCount<1>{}, c), c += lanes;
  if (c < n) f(VectorCount<1>{}, n - lanes);
}

template <typename T, typename A, typename Taps>
inline void average(const T* from, const Taps& taps, A* out, int64_t n) {
  if (n >= kLanes<A>) {
    each_vectors<A>(n, [&](auto vectors, int64_t c) { add_taps<vectors.value>(from + c, taps, out + c); });
  } else {
    for (int64_t c = 0; c < n; ++c) out[c] = A(0);
    taps.each([&](int64_t offset, A weight) {
      for (int64_t c = 0; c < n; ++c) out[c] += weight * A(widen(from[offset + c]));
    });
  }
}

// Values of n <= kMostChannels channels at one point.
template <typename T, typename A>
inline void interpolate(const View<const T>& from, const roi::Sample<A>& s, int dims, int64_t n, A* value) {
  for (int64_t c = 0; c < n; ++c) value[c] = A(0);
  each_corner(s, dims, from.stride, [&](int64_t offset, A weight, const A*) {
    const T* p = from.data + offset;
    for (int64_t c = 0; c < n; ++c) value[c] += weight * A(widen(p[c]));
  });
}

// Points of a bin are counted in integers as wide as A, so that vectors of both have the same lanes.
template <typename A>
using PointNumber = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// best[c] = the largest value among a bin's points, which[c] the number of the first point on the map that has it, or
// -1: none, as points off the map have the value 0. A NaN is larger than all. n <= kMostChannels.
template <typename T, typename A>
inline void maximum(const View<const T>& from, const BoxPlan<A>& plan, int64_t z, int64_t y, int64_t x, int64_t n,
                    A* best, PointNumber<A>* which) {
  A value[kMostChannels];
  PointNumber<A> number = 0, on_map = 0;
  for (int64_t c = 0; c < n; ++c) best[c] = A(0), which[c] = -1;
  each_sample(plan.box, z, y, x, [&](const roi::Sample<A>& s) {
    if (s.inside) {
      interpolate(from, s, plan.box.dims, n, value);
      const bool none = on_map++ == 0;
      for (int64_t c = 0; c < n; ++c) {
        const A v = value[c], b = best[c];
        const bool better = none | (v > b) | ((v != v) & (b == b));
        best[c] = better ? v : b;
        which[c] = better ? number : which[c];
      }
    }
    ++number;
  });
  if (double(on_map) == point_count(plan.box)) return;
  for (int64_t c = 0; c < n; ++c) {
    which[c] = best[c] < A(0) ? -1 : which[c];
    best[c] = best[c] < A(0) ? A(0) : best[c];
  }
}

template <typename T, typename A>
class RoiForward {
 public:
  RoiForward(const RoiArgs& a, const Workers& workers)
      : a_(a),
        workers_(workers),
        bins_(a.sampling.bins[kZ] * a.sampling.bins[kY] * a.sampling.bins[kX]),
        plans_(a, a.group[a.levels * a.images], workers) {}

  void run() {
    for_each_part(workers_, a_.boxes, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k)
        if (a_.box_level[k] < 0) memset(output(k), 0, a_.channels * bins_ * sizeof(T));
    });
    staged_ = !a_.last || !kSame<T, A>;
    if (staged_) stage_ = static_cast<A*>(a_.allocate(a_.context, workers_.count * stage_size() * int64_t(sizeof(A))));
    for (int64_t l = 0; l < a_.levels; ++l) {
      const RoiLevel& level = a_.level[l];
      if (level.stride[1] == 1) {
        const int64_t begin = a_.group[l * a_.images], end = a_.group[(l + 1) * a_.images];
        for_each_part(workers_, end - begin, [&](int64_t worker, int64_t first, int64_t last) {
          for (int64_t i = begin + first; i < begin + last; ++i) {
            const T* image = static_cast<const T*>(level.input) + image_of(plans_[i].index) * level.stride[0];
            for (int64_t c = 0; c < a_.channels; c += step())
              box(View<const T>{image + c, {level.stride[2], level.stride[3], level.stride[4]}}, plans_[i], worker, c,
                  smaller(step(), a_.channels - c), false);
          }
        });
      } else {
        for (int64_t image = 0; image < a_.images; ++image) rearranged(l, image);
      }
    }
  }

 private:
  // Channels that go through a box together: all, where they are stored as they are computed.
  int64_t step() const { return staged_ || a_.maximum ? kMostChannels : a_.channels; }
  int64_t stage_size() const { return bins_ * kMostChannels; }
  T* output(int64_t k) const { return static_cast<T*>(a_.output) + k * a_.channels * bins_; }
  int64_t image_of(int64_t k) const { return int64_t(static_cast<const A*>(a_.box)[k * a_.columns]); }

  void rearranged(int64_t l, int64_t image) {
    const int64_t begin = a_.group[l * a_.images + image], end = a_.group[l * a_.images + image + 1];
    if (begin == end) return;
    const RoiLevel& level = a_.level[l];
    Marks marks(a_, level.size);
    for (int64_t i = begin; i < end; ++i) marks.add(plans_[i].region);
    const int64_t width = block_channels(a_, level, sizeof(A), 1);
    if (block_ == nullptr || block_size_ < marks.rows() * level.size[kX] * width) {
      block_size_ = marks.rows() * level.size[kX] * width;
      block_ = static_cast<A*>(a_.allocate(a_.context, block_size_ * int64_t(sizeof(A))));
    }
    const T* from = static_cast<const T*>(level.input) + image * level.stride[0];
    const View<const A> view{block_, {level.size[kY] * level.size[kX] * width, level.size[kX] * width, width}};
    for (int64_t c = 0; c < a_.channels; c += width) {
      const int64_t n = smaller(width, a_.channels - c);
      for_each_part(workers_, marks.rows(), [&](int64_t, int64_t first, int64_t last) {
        marks.each_run(first, last, [&](int64_t row, int64_t x, int64_t count, bool marked) {
          if (!marked) return;
          const T* source = from + c * level.stride[1] + row / level.size[kY] * level.stride[2] +
                            row % level.size[kY] * level.stride[3];
          gather_run(source, level.stride[1], level.stride[4], n, block_ + row * level.size[kX] * width, width, x,
                     count);
        });
      });
      for_each_part(workers_, end - begin, [&](int64_t worker, int64_t first, int64_t last) {
        for (int64_t i = begin + first; i < begin + last; ++i) box(view, plans_[i], worker, c, n, true);
      });
    }
  }

  // Channels c0 .. c0 + n - 1 of one box, from a view that starts at channel c0. A block has whole vectors of channels.
  template <typename S>
  void box(const View<const S>& from, const BoxPlan<A>& plan, int64_t worker, int64_t c0, int64_t n,
           bool padded) const {
    const int64_t computed = padded && staged_ ? round_up(n, kTransposeBlock) : n;
    A* const stage = staged_ ? stage_ + worker * stage_size() : nullptr;
    T* const out = output(plan.index);
    int64_t bin = 0;
    for (int64_t z = 0; z < a_.sampling.bins[kZ]; ++z)
      for (int64_t y = 0; y < a_.sampling.bins[kY]; ++y)
        for (int64_t x = 0; x < a_.sampling.bins[kX]; ++x, ++bin) {
          A* to;
          if constexpr (kSame<T, A>) {
            to = staged_ ? stage + bin * kMostChannels : out + bin * a_.channels + c0;
          } else {
            to = stage + bin * kMostChannels;
          }
          if (a_.maximum) {
            PointNumber<A> which[kMostChannels];
            maximum(from, plan, z, y, x, computed, to, which);
          } else if (plan.box.rotated) {
            average(from.data, SampledTaps<A>{plan, from.stride, z, y, x}, to, computed);
          } else {
            average(from.data, SeparableTaps<A>{plan, from.stride, z, y, x}, to, computed);
          }
        }
    if (!staged_) return;
    if (a_.last) {
      for (bin = 0; bin < bins_; ++bin) narrow_run(stage + bin * kMostChannels, out + bin * a_.channels + c0, n);
    } else {
      transpose_to(stage, kMostChannels, out + c0 * bins_, bins_, bins_, n);
    }
  }

  const RoiArgs& a_;
  const Workers& workers_;
  const int64_t bins_;
  Plans<A> plans_;
  bool staged_ = false;
  A* stage_ = nullptr;  // [workers][bins, kMostChannels]
  A* block_ = nullptr;  // [D, H, W, channels of a block]
  int64_t block_size_ = 0;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
