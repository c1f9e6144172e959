// Where a mask lies in its image, as torchvision pastes it: the mask gets a frame of `padding` zeros, its box grows in
// proportion about its centre and is cut to whole pixels, and the framed mask is resized to the box, last pixel
// included, with bilinear interpolation. Torch-free; shared by host and device.
#pragma once

#include "roi/roi_align_math.h"

namespace pyseg::roi {

enum class PasteOutput : uint8_t { kValues, kBool, kPacked };

// One axis: the box covers pixels first .. first + length - 1 of the image, of which `begin` .. `end` - 1 are in it.
struct PasteAxis {
  int64_t first, length, begin, end;
};

// A product that is not fused with what follows. (Where boxes are placed, the CPU's code is compiled without fused
// operations.)
PYSEG_ROI_INLINE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
PYSEG_ROI_INLINE double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Each operation rounds by itself, as in torch. Along both axes a box grows by the share that the frame adds to the
// mask's width: so torchvision takes it for masks that are not square.
template <typename A>
PYSEG_ROI_INLINE PasteAxis paste_axis(A low, A high, int64_t mask_width, int64_t padding, int64_t image_size) {
  constexpr double kFar = double(int64_t{1} << 60);
  const A scale = A(double(mask_width + 2 * padding) / double(mask_width));
  const A half = rounded_product(high - low, A(0.5)), centre = rounded_product(high + low, A(0.5));
  const A reach = rounded_product(half, scale);
  const double from = double(centre - reach), to = double(centre + reach);
  const int64_t first = int64_t(from < -kFar ? -kFar : from > kFar ? kFar : from);
  const int64_t last = int64_t(to < -kFar ? -kFar : to > kFar ? kFar : to);
  PasteAxis axis;
  axis.first = first;
  axis.length = last - first + 1 > 1 ? last - first + 1 : 1;
  axis.begin = first > 0 ? first : 0;
  axis.end = last + 1 < image_size ? last + 1 : image_size;
  if (axis.end < axis.begin) axis.end = axis.begin;
  return axis;
}

// The two elements of the framed mask (0 .. size - 1) between which pixel `at` of the image lies.
template <typename A>
struct PastePoint {
  int64_t low, high;
  A w_low, w_high;
};

template <typename A>
PYSEG_ROI_INLINE PastePoint<A> paste_point(const PasteAxis& axis, int64_t at, int64_t size) {
  const A step = A(size) / A(axis.length);
  A source = rounded_product(step, A(at - axis.first) + A(0.5)) - A(0.5);
  if (source < A(0)) source = A(0);
  PastePoint<A> point;
  point.low = int64_t(source) < size - 1 ? int64_t(source) : size - 1;
  point.high = point.low + (point.low < size - 1 ? 1 : 0);
  point.w_high = source - A(point.low);
  point.w_low = A(1) - point.w_high;
  return point;
}

}  // namespace pyseg::roi
