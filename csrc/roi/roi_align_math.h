// Geometry of RoIAlign (He et al. 2017, section 3) that host and device share: bins of a box along each axis, sampling
// points within them, linear interpolation. Torch-free. Functions are static: units for different instruction sets must
// not share one.
//
// Axes are ordered z, y, x; in two dimensions z has size 1, one bin and one point. A is float or double.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define PYSEG_ROI_INLINE static __host__ __device__ inline
#else
#define PYSEG_ROI_INLINE static inline
#endif

namespace pyseg::roi {

constexpr int kAxes = 3, kZ = 0, kY = 1, kX = 2;
// More columns than a box of any kind has: batch index, then [x1, y1, x2, y2], [cx, cy, w, h, angle] or
// [x1, y1, z1, x2, y2, z2].
constexpr int kMostColumns = 7;
constexpr int64_t kMostSamples = int64_t{1} << 30;

enum class BoxKind : uint8_t { kAligned2d, kRotated, kAligned3d };

PYSEG_ROI_INLINE float floor_of(float x) { return ::floorf(x); }
PYSEG_ROI_INLINE double floor_of(double x) { return ::floor(x); }
PYSEG_ROI_INLINE float ceil_of(float x) { return ::ceilf(x); }
PYSEG_ROI_INLINE double ceil_of(double x) { return ::ceil(x); }
PYSEG_ROI_INLINE float sqrt_of(float x) { return ::sqrtf(x); }
PYSEG_ROI_INLINE double sqrt_of(double x) { return ::sqrt(x); }
PYSEG_ROI_INLINE float log2_of(float x) { return ::log2f(x); }
PYSEG_ROI_INLINE double log2_of(double x) { return ::log2(x); }

// How a box is sampled, the same for all boxes of a call.
struct Sampling {
  BoxKind kind;
  bool aligned;     // half a pixel is taken off the coordinates, and boxes may be smaller than a pixel
  int64_t ratio;    // points of a bin along each axis; <= 0: ceil(length of the bin)
  int64_t bins[3];  // of the output
};

template <typename A>
struct Axis {
  A start, bin;     // where the first bin starts, and the length of each; negative in an inverted box
  int64_t samples;  // <= 0: no points
  int64_t bins, size;
  bool clamped;  // the length has been raised to one pixel
};

template <typename A>
struct Box {
  Axis<A> axis[kAxes];
  A scale;
  int dims;
  bool rotated;
  A centre_x, centre_y, cosine, sine;  // of rotated boxes, whose axes start at minus half their length
  A least[kAxes], most[kAxes];         // along the box's own axes, no point beyond lies on the map
};

template <typename A>
PYSEG_ROI_INLINE Axis<A> make_axis(A start, A length, const Sampling& sampling, int axis, int64_t size) {
  Axis<A> result;
  result.clamped = !sampling.aligned && length < A(1);
  if (result.clamped) length = A(1);
  result.start = start;
  result.bins = sampling.bins[axis];
  result.size = size;
  result.bin = length / A(result.bins);
  const A wanted = ceil_of(result.bin);
  result.samples = sampling.ratio > 0         ? sampling.ratio
                   : wanted < A(kMostSamples) ? int64_t(wanted < A(0) ? A(0) : wanted)
                                              : kMostSamples;
  return result;
}

// row: [columns], the batch index first.
template <typename A>
PYSEG_ROI_INLINE Box<A> make_box(const A* row, A scale, const Sampling& sampling, const int64_t (&sizes)[kAxes]) {
  const A offset = sampling.aligned ? A(0.5) : A(0);
  Box<A> box;
  box.scale = scale;
  box.rotated = sampling.kind == BoxKind::kRotated;
  box.dims = sampling.kind == BoxKind::kAligned3d ? 3 : 2;
  box.axis[kZ] = {A(0), A(1), 1, 1, 1, false};
  box.least[kZ] = A(-1);
  box.most[kZ] = A(1);
  if (box.rotated) {
    const A angle = row[5] * A(3.14159265358979323846 / 180);
    box.centre_x = row[1] * scale - offset;
    box.centre_y = row[2] * scale - offset;
    box.cosine = A(::cos(double(angle)));
    box.sine = A(::sin(double(angle)));
    for (int axis = kY; axis <= kX; ++axis) {
      box.axis[axis] = make_axis(A(0), (axis == kX ? row[3] : row[4]) * scale, sampling, axis, sizes[axis]);
      box.axis[axis].start = box.axis[axis].bin * A(box.axis[axis].bins) * A(-0.5);
    }
    for (int corner = 0; corner < 4; ++corner) {  // of the map
      const A x = (corner & 1 ? A(sizes[kX]) : A(-1)) - box.centre_x;
      const A y = (corner & 2 ? A(sizes[kY]) : A(-1)) - box.centre_y;
      const A own_x = x * box.cosine - y * box.sine, own_y = x * box.sine + y * box.cosine;
      box.least[kX] = corner == 0 || own_x < box.least[kX] ? own_x : box.least[kX];
      box.most[kX] = corner == 0 || own_x > box.most[kX] ? own_x : box.most[kX];
      box.least[kY] = corner == 0 || own_y < box.least[kY] ? own_y : box.least[kY];
      box.most[kY] = corner == 0 || own_y > box.most[kY] ? own_y : box.most[kY];
    }
    return box;
  }
  for (int i = 0; i < box.dims; ++i) {  // x, y, z
    const A first = row[1 + i] * scale - offset, last = row[1 + i + box.dims] * scale - offset;
    box.axis[kX - i] = make_axis(first, last - first, sampling, kX - i, sizes[kX - i]);
    box.least[kX - i] = A(-1);
    box.most[kX - i] = A(sizes[kX - i]);
  }
  return box;
}

// The coordinate of sample i of bin p.
template <typename A>
PYSEG_ROI_INLINE A position(const Axis<A>& axis, int64_t p, int64_t i) {
  return axis.start + A(p) * axis.bin + (A(i) + A(0.5)) * axis.bin / A(axis.samples);
}

// Where it lies between the ends of the box, 0 to 1.
template <typename A>
PYSEG_ROI_INLINE A share(const Axis<A>& axis, int64_t p, int64_t i) {
  return (A(p) + (A(i) + A(0.5)) / A(axis.samples)) / A(axis.bins);
}

// The samples of bin p that can lie on the map: first <= i < last. Boxes far larger than the map have many that cannot.
template <typename A>
PYSEG_ROI_INLINE void samples_on_map(const Box<A>& box, int number, int64_t p, int64_t* first, int64_t* last) {
  constexpr int64_t kFew = 16;
  const Axis<A>& axis = box.axis[number];
  *first = 0;
  *last = axis.samples;
  const double step = double(axis.bin) / double(axis.samples);
  if (axis.samples <= kFew || step == 0) return;
  const double base = double(axis.start) + double(p) * double(axis.bin);
  const double at_least = (double(box.least[number]) - base) / step, at_most = (double(box.most[number]) - base) / step;
  const double slack = 2 + 5e-7 * (at_least < 0 ? -at_least : at_least) + 5e-7 * (at_most < 0 ? -at_most : at_most);
  const double low = (at_least < at_most ? at_least : at_most) - slack;
  const double high = (at_least < at_most ? at_most : at_least) + slack;
  const double most = double(axis.samples);
  *first = int64_t(low > 0 ? (low < most ? low : most) : 0);
  *last = int64_t(high > 0 ? (high < most ? high : most) : 0);
}

// A coordinate between two elements of an axis. The value is w_low * v[low] + w_high * v[high], its derivative
// slope * (v[high] - v[low]).
template <typename A>
struct Point {
  bool inside;  // outside the value is 0
  int64_t low, high;
  A w_low, w_high, slope;
};

template <typename A>
PYSEG_ROI_INLINE Point<A> make_point(A at, int64_t size) {
  Point<A> point{false, 0, 0, A(0), A(0), A(0)};
  if (!(at >= A(-1) && at <= A(size)) || size == 0) return point;
  point.inside = true;
  point.slope = A(at < A(0) ? 0 : 1);
  if (at <= A(0)) at = A(0);
  point.low = int64_t(at);
  if (point.low >= size - 1) {
    point.low = point.high = size - 1;
    at = A(point.low);
  } else {
    point.high = point.low + 1;
  }
  point.w_high = at - A(point.low);
  point.w_low = A(1) - point.w_high;
  return point;
}

// One sampling point of a bin.
template <typename A>
struct Sample {
  Point<A> point[kAxes];
  A share[kAxes];  // of the box, along its own axes
  bool inside;
};

template <typename A>
PYSEG_ROI_INLINE Sample<A> make_sample(const Box<A>& box, const int64_t (&p)[kAxes], const int64_t (&i)[kAxes]) {
  A at[kAxes];
  Sample<A> sample;
  for (int axis = 0; axis < kAxes; ++axis) {
    at[axis] = position(box.axis[axis], p[axis], i[axis]);
    sample.share[axis] = share(box.axis[axis], p[axis], i[axis]);
  }
  if (box.rotated) {
    const A x = at[kX], y = at[kY];
    at[kX] = y * box.sine + x * box.cosine + box.centre_x;
    at[kY] = y * box.cosine - x * box.sine + box.centre_y;
  }
  sample.point[kZ] = {true, 0, 0, A(1), A(0), A(0)};
  for (int axis = kAxes - box.dims; axis < kAxes; ++axis)
    sample.point[axis] = make_point(at[axis], box.axis[axis].size);
  sample.inside = sample.point[kZ].inside && sample.point[kY].inside && sample.point[kX].inside;
  return sample;
}

// Adds to row [columns] what a point contributes to the box's gradient: by_point[axis] is the derivative of the loss by
// the point's coordinate, which is linear in the box's columns but for the angle.
template <typename A>
PYSEG_ROI_INLINE void add_box_gradient(const Box<A>& box, const Sample<A>& sample, const A (&by_point)[kAxes], A* row) {
  const A gx = by_point[kX] * box.scale, gy = by_point[kY] * box.scale;
  if (box.rotated) {
    const A half = A(0.5), share_x = sample.share[kX] - half, share_y = sample.share[kY] - half;
    const A x = share_x * box.axis[kX].bin * A(box.axis[kX].bins),
            y = share_y * box.axis[kY].bin * A(box.axis[kY].bins);
    row[1] += gx;
    row[2] += gy;
    if (!box.axis[kX].clamped) row[3] += share_x * (gx * box.cosine - gy * box.sine);
    if (!box.axis[kY].clamped) row[4] += share_y * (gx * box.sine + gy * box.cosine);
    row[5] += A(3.14159265358979323846 / 180) *
              (by_point[kX] * (y * box.cosine - x * box.sine) - by_point[kY] * (y * box.sine + x * box.cosine));
    return;
  }
  for (int i = 0; i < box.dims; ++i) {
    const A g = by_point[kX - i] * box.scale, share = box.axis[kX - i].clamped ? A(0) : sample.share[kX - i];
    row[1 + i] += g * (A(1) - share);
    row[1 + i + box.dims] += g * share;
  }
}

// How boxes are given their levels. Small terms keep areas that are powers of two from falling one level.
struct Pyramid {
  int least, most;
  double canonical_size, canonical_level;
  double epsilon[2];  // within the logarithm, and behind it
};

// The level of a pyramid that a box belongs to (Lin et al. 2017, Feature Pyramid Networks, equation 1): floor(level0 +
// log2(sqrt(area) / size0)), within [least, most], counted from `least`; -1 for a box of negative area.
template <typename A>
PYSEG_ROI_INLINE int pyramid_level(const A* row, bool rotated, const Pyramid& p) {
  const A area = rotated ? row[3] * row[4] : (row[3] - row[1]) * (row[4] - row[2]);
  if (!(area >= A(0))) return -1;
  const A ratio = sqrt_of(area) / A(p.canonical_size) + A(p.epsilon[0]);
  const A level = floor_of(A(p.canonical_level) + log2_of(ratio) + A(p.epsilon[1]));
  return (level < A(p.least) ? p.least : level > A(p.most) ? p.most : int(level)) - p.least;
}

}  // namespace pyseg::roi
