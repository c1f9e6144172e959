// What is computed once for each box, whatever the number of channels: its geometry, the part of the map that it
// reads, and for averages over boxes along the axes the weight of every row and column in every bin. The mean over a
// bin's points is separable: sum over y of w_y[y] * sum over x of w_x[x] * input[y, x], and points that share a row or
// column share a weight.
#pragma once

#include "common/cpu_workers.h"
#include "roi/roi_align_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

using roi::kAxes;
using roi::kX;
using roi::kY;
using roi::kZ;

template <typename A>
struct Tap {
  int64_t at;
  A weight;
};

// Inclusive ranges of elements along each axis; empty where last < first.
struct Region {
  int64_t first[kAxes], last[kAxes];
  bool empty() const { return last[0] < first[0] || last[1] < first[1] || last[2] < first[2]; }
};

template <typename A>
struct BoxPlan {
  int64_t index;  // of the box in the call
  roi::Box<A> box;
  Region region;
  Tap<A>* taps[kAxes];    // of all bins of an axis, one after the other
  int32_t* begin[kAxes];  // [bins + 1], in taps
};

template <typename A>
class Plans {
 public:
  // For boxes a.order[0 .. count - 1].
  Plans(const RoiArgs& a, int64_t count, const Workers& workers)
      : a_(a), plans_(static_cast<BoxPlan<A>*>(a.allocate(a.context, count * int64_t(sizeof(BoxPlan<A>))))) {
    int64_t bins = 0;
    for (int axis = 0; axis < kAxes; ++axis) bins += a.sampling.bins[axis] + 1;
    for_each_part(workers, count, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) geometry(plans_[i], a.order[i]);
    });
    if (a.maximum || a.sampling.kind == roi::BoxKind::kRotated) return;
    int64_t taps = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int axis = 0; axis < kAxes; ++axis) taps += most_taps(plans_[i].box.axis[axis]);
    auto* tap = static_cast<Tap<A>*>(a.allocate(a.context, taps * int64_t(sizeof(Tap<A>))));
    auto* begin = static_cast<int32_t*>(a.allocate(a.context, count * bins * int64_t(sizeof(int32_t))));
    for (int64_t i = 0; i < count; ++i)
      for (int axis = 0; axis < kAxes; ++axis) {
        plans_[i].taps[axis] = tap;
        plans_[i].begin[axis] = begin;
        tap += most_taps(plans_[i].box.axis[axis]);
        begin += a.sampling.bins[axis] + 1;
      }
    for_each_part(workers, count, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int axis = 0; axis < kAxes; ++axis)
          if (axis >= kAxes - plans_[i].box.dims) {
            fill_taps(plans_[i].box, axis, plans_[i].taps[axis], plans_[i].begin[axis]);
          } else {
            plans_[i].taps[axis][0] = {0, A(1)};
            plans_[i].begin[axis][0] = 0;
            plans_[i].begin[axis][1] = 1;
          }
    });
  }

  const BoxPlan<A>& operator[](int64_t i) const { return plans_[i]; }

 private:
  void geometry(BoxPlan<A>& plan, int64_t index) const {
    const RoiLevel& level = a_.level[a_.box_level[index]];
    plan.index = index;
    plan.box =
        roi::make_box(static_cast<const A*>(a_.box) + index * a_.columns, A(level.scale), a_.sampling, level.size);
    const roi::Box<A>& box = plan.box;
    A reach[kAxes] = {}, centre[kAxes] = {A(0), box.centre_y, box.centre_x};
    const A half_y = box.axis[kY].start, half_x = box.axis[kX].start;
    const auto magnitude = [](A x) { return x < A(0) ? -x : x; };
    reach[kY] = magnitude(half_y * box.cosine) + magnitude(half_x * box.sine);
    reach[kX] = magnitude(half_y * box.sine) + magnitude(half_x * box.cosine);
    for (int axis = 0; axis < kAxes; ++axis) {
      const roi::Axis<A>& x = box.axis[axis];
      A low = x.start, high = x.start + x.bin * A(x.bins);
      if (high < low) {
        const A t = low;
        low = high;
        high = t;
      }
      if (box.rotated && axis != kZ) {
        low = centre[axis] - reach[axis];
        high = centre[axis] + reach[axis];
      }
      // One pixel more on each side than interpolation needs: rounding is somebody else's.
      low -= A(2);
      high += A(2);
      const A size = A(x.size);
      plan.region.first[axis] = low > A(0) ? (low < size ? int64_t(low) : x.size) : 0;
      plan.region.last[axis] = high < size - A(1) ? (high >= A(0) ? int64_t(high) : -1) : x.size - 1;
      if (axis < kAxes - box.dims) {
        plan.region.first[axis] = 0;
        plan.region.last[axis] = 0;
      }
    }
  }

  static int64_t most_taps(const roi::Axis<A>& axis) {
    const A length = axis.bin < A(0) ? -axis.bin : axis.bin;
    const int64_t spanned = length < A(axis.size) ? int64_t(length) + 4 : axis.size;
    return axis.bins * larger<int64_t>(1, smaller(smaller(spanned, axis.size), 2 * axis.samples));
  }

  static void fill_taps(const roi::Box<A>& box, int axis_number, Tap<A>* taps, int32_t* begin) {
    const roi::Axis<A>& axis = box.axis[axis_number];
    int32_t count = 0;
    const A part = A(1) / A(larger<int64_t>(axis.samples, 1));
    for (int64_t p = 0; p < axis.bins; ++p) {
      begin[p] = count;
      int64_t first, last;
      roi::samples_on_map(box, axis_number, p, &first, &last);
      // Points advance in one direction, so a row that has been met before was among the last few.
      const auto add = [&](int64_t at, A weight) {
        for (int32_t i = count - 1; i >= begin[p] && i >= count - 4; --i)
          if (taps[i].at == at) {
            taps[i].weight += weight;
            return;
          }
        taps[count++] = {at, weight};
      };
      for (int64_t i = first; i < last; ++i) {
        const roi::Point<A> point = roi::make_point(roi::position(axis, p, i), axis.size);
        if (!point.inside) continue;
        add(point.low, point.w_low * part);
        add(point.high, point.w_high * part);
      }
    }
    begin[axis.bins] = count;
  }

  const RoiArgs& a_;
  BoxPlan<A>* plans_;
};

// The elements and weights that make up the mean of one bin: each(f) calls f(offset in elements, weight).
template <typename A>
struct SeparableTaps {
  const BoxPlan<A>& plan;
  const int64_t* stride;  // of z, y, x
  int64_t z, y, x;        // the bin

  template <typename F>
  void each(const F& f) const {
    const Tap<A>*zt = plan.taps[kZ] + plan.begin[kZ][z], *z_end = plan.taps[kZ] + plan.begin[kZ][z + 1];
    const Tap<A>*yt = plan.taps[kY] + plan.begin[kY][y], *y_end = plan.taps[kY] + plan.begin[kY][y + 1];
    const Tap<A>*xt = plan.taps[kX] + plan.begin[kX][x], *x_end = plan.taps[kX] + plan.begin[kX][x + 1];
    for (const Tap<A>* k = zt; k < z_end; ++k)
      for (const Tap<A>* i = yt; i < y_end; ++i) {
        const int64_t row = k->at * stride[kZ] + i->at * stride[kY];
        const A weight = k->weight * i->weight;
        for (const Tap<A>* j = xt; j < x_end; ++j) f(row + j->at * stride[kX], weight * j->weight);
      }
  }
};

// The corners of a point: each(f) calls f(offset, weight, derivatives by z, y, x).
template <typename A, typename F>
inline void each_corner(const roi::Sample<A>& s, int dims, const int64_t* stride, const F& f) {
  for (int corner = 0; corner < 1 << dims; ++corner) {
    int64_t offset = 0;
    A factor[kAxes], slope[kAxes];
    for (int axis = 0; axis < kAxes; ++axis) {
      const bool high = axis >= kAxes - dims && (corner >> (kX - axis) & 1);
      const roi::Point<A>& p = s.point[axis];
      offset += (high ? p.high : p.low) * stride[axis];
      factor[axis] = high ? p.w_high : p.w_low;
      slope[axis] = high ? p.slope : -p.slope;
    }
    const A derivative[kAxes] = {slope[kZ] * factor[kY] * factor[kX], factor[kZ] * slope[kY] * factor[kX],
                                 factor[kZ] * factor[kY] * slope[kX]};
    f(offset, factor[kZ] * factor[kY] * factor[kX], derivative);
  }
}

// All sampling points of one bin, in order; those outside the map too.
template <typename A, typename F>
inline void each_sample(const roi::Box<A>& box, int64_t z, int64_t y, int64_t x, const F& f) {
  const int64_t p[kAxes] = {z, y, x};
  int64_t first[kAxes], last[kAxes], i[kAxes];
  for (int axis = 0; axis < kAxes; ++axis) roi::samples_on_map(box, axis, p[axis], &first[axis], &last[axis]);
  for (i[kZ] = first[kZ]; i[kZ] < last[kZ]; ++i[kZ])
    for (i[kY] = first[kY]; i[kY] < last[kY]; ++i[kY])
      for (i[kX] = first[kX]; i[kX] < last[kX]; ++i[kX]) f(roi::make_sample(box, p, i));
}

template <typename A>
inline double point_count(const roi::Box<A>& box) {
  double count = 1;
  for (int axis = 0; axis < kAxes; ++axis) count *= double(box.axis[axis].samples);
  return count;
}
template <typename A>
inline A samples_of(const roi::Box<A>& box) {
  A samples = 1;
  for (int axis = 0; axis < kAxes; ++axis) samples *= A(box.axis[axis].samples);
  return samples;
}

// The same as SeparableTaps, point by point, for boxes whose axes are not the map's.
template <typename A>
struct SampledTaps {
  const BoxPlan<A>& plan;
  const int64_t* stride;
  int64_t z, y, x;

  template <typename F>
  void each(const F& f) const {
    const A part = A(1) / samples_of(plan.box);
    each_sample(plan.box, z, y, x, [&](const roi::Sample<A>& s) {
      if (s.inside)
        each_corner(s, plan.box.dims, stride, [&](int64_t offset, A weight, const A*) { f(offset, weight * part); });
    });
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
