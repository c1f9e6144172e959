// Where a warp reads, for host and device. Torch-free.
//
// Every operation rounds by itself: this family is compiled without fused multiply-adds on all targets, so that places,
// and with them labels and interpolated values, have the same bits on every processor and on CUDA devices.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYSEG_WARP_INLINE static __host__ __device__ inline
#else
#define PYSEG_WARP_INLINE static inline
#endif

namespace pyseg::warp {

constexpr int kMostDims = 3;

enum class Border : uint8_t { kReflect, kReplicate, kConstant };

// ---- the displacement: Keys' cubic convolution (1981) along each axis of the grid of control points ----

// c0 + t (c1 + t (c2 + t c3)), 0 <= t <= 1, between the second and the third of four control points. cubic is Keys' a:
// the slope at a control point is -a times the difference of its neighbours.
template <typename A>
struct Cubic {
  A c0, c1, c2, c3;
};

template <typename A>
PYSEG_WARP_INLINE Cubic<A> cubic_between(A before, A left, A right, A after, A cubic) {
  const A left_slope = cubic * (before - right), right_slope = cubic * (left - after), rise = right - left;
  return {left, left_slope, A(3) * rise - (A(2) * left_slope + right_slope), (left_slope + right_slope) - A(2) * rise};
}

template <typename A>
PYSEG_WARP_INLINE A cubic_at(const Cubic<A>& k, A t) {
  return k.c0 + t * (k.c1 + t * (k.c2 + t * k.c3));
}

// The control points `count` of one axis lie evenly over the output, the first and last on its first and last element.
template <typename A>
struct GridAxis {
  int32_t count;
  A scale;  // control points from one element of the output to the next
};

template <typename A>
PYSEG_WARP_INLINE GridAxis<A> grid_axis(int64_t count, int64_t out) {
  return {int32_t(count), out > 1 ? A(double(count - 1) / double(out - 1)) : A(0)};
}

// The control point left of element i of the output, and how far from it.
template <typename A>
PYSEG_WARP_INLINE int32_t grid_cell(const GridAxis<A>& axis, int64_t i) {
  const int32_t cell = int32_t(A(i) * axis.scale), last = axis.count > 2 ? axis.count - 2 : 0;
  return cell < last ? cell : last;
}
template <typename A>
PYSEG_WARP_INLINE A grid_rest(const GridAxis<A>& axis, int64_t i, int32_t cell) {
  return A(i) * axis.scale - A(cell);
}

// Control point i, the outermost repeated outside.
PYSEG_WARP_INLINE int32_t grid_index(int32_t i, int32_t count) { return i < 0 ? 0 : i < count ? i : count - 1; }

// ---- one axis of the image ----

// Places are brought to low .. high: the elements 0 .. last, and one more on each side where what lies outside counts.
template <typename A>
struct ImageAxis {
  A low, high, last;
  A period, inverse;  // of reflection about the first and last element; 0 where there is none
  A reach;            // 1, or -1 where there is only one element
  int32_t last_tap;   // where the first of two taps may be
};

template <typename A>
PYSEG_WARP_INLINE ImageAxis<A> image_axis(int64_t size, Border border) {
  const A last = A(size - 1), beyond = border == Border::kConstant ? A(1) : A(0);
  const bool reflects = border == Border::kReflect && size > 1;
  return {-beyond,
          last + beyond,
          last,
          reflects ? A(2) * last : A(0),
          reflects ? A(1 / (2 * double(size - 1))) : A(0),
          size > 1 ? A(1) : A(-1),
          int32_t(size > 1 ? size - 2 : 0)};
}

// NaN becomes the lowest place.
template <typename A>
PYSEG_WARP_INLINE A clamped(const ImageAxis<A>& axis, A at) {
  at = at > axis.low ? at : axis.low;
  return at < axis.high ? at : axis.high;
}

template <typename A>
PYSEG_WARP_INLINE A reflected(const ImageAxis<A>& axis, A at) {
  constexpr A kFar = A(1 << 30);
  A distance = at < A(0) ? -at : at;
  distance = at == at ? distance : A(0);
  distance = distance < kFar ? distance : kFar;
  const A rest = distance - A(int32_t(distance * axis.inverse)) * axis.period, back = axis.period - rest;
  return clamped(axis, rest < back ? rest : back);
}

// The first of the two elements that a place lies between.
template <typename A>
PYSEG_WARP_INLINE int32_t first_tap(const ImageAxis<A>& axis, A at) {
  const int32_t tap = int32_t(at);
  const int32_t most = tap < axis.last_tap ? tap : axis.last_tap;
  return most > 0 ? most : 0;
}

// max(0, reach - |distance|): the weight of an element, 0 for one that is not there.
template <typename A>
PYSEG_WARP_INLINE A hat(A distance, A reach) {
  const A weight = reach - (distance < A(0) ? -distance : distance);
  return weight > A(0) ? weight : A(0);
}

// The nearest element, of two as near the higher one; outside where there is none within half an element. Nothing is
// added to a place, which would round: above 2^23 a float has no halves, and 0.49999997f + 0.5f is 1.
template <typename A>
PYSEG_WARP_INLINE bool is_inside(const ImageAxis<A>& axis, A at) {
  return at >= A(-0.5) && at - axis.last < A(0.5);
}
template <typename A>
PYSEG_WARP_INLINE int32_t nearest_element(const ImageAxis<A>& axis, A at) {
  const int32_t tap = int32_t(at), last = int32_t(axis.last);
  const int32_t element = tap + int32_t(at - A(tap) >= A(0.5));
  const int32_t most = element < last ? element : last;
  return most > 0 ? most : 0;
}

}  // namespace pyseg::warp
