// Where bilinear interpolation reads along one axis, for host and device, as torch.nn.functional.interpolate has it.
// Torch-free. Coordinates are in double precision on every device and for every dtype.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYSEG_UPSAMPLE_INLINE static __host__ __device__ inline
#else
#define PYSEG_UPSAMPLE_INLINE static inline
#endif

namespace pyseg::upsample {

constexpr int kMostRates = 16;  // filters of upsample_concat_depthwise

// One axis of a map and of the output.
struct Axis {
  int64_t in, out;
  double scale;    // elements of the map from one element of the output to the next
  double inverse;  // or 0
  bool align;      // the centres of the first elements coincide, and of the last; otherwise the maps' borders do
};

// Element i of the output is (1 - weight) * x[low] + weight * x[high].
struct Tap {
  int32_t low, high;
  double weight;
};

// `factor` is how many times larger the output is, where the user gave that and not a size; otherwise 0.
PYSEG_UPSAMPLE_INLINE Axis axis_of(int64_t in, int64_t out, bool align, double factor) {
  double scale = 0;
  if (align) {
    if (out > 1) scale = double(in - 1) / double(out - 1);
  } else {
    scale = factor > 0 ? 1 / factor : double(in) / double(out);
  }
  return {in, out, scale, scale > 0 ? 1 / scale : 0, align};
}

// An axis that keeps its size is copied, whatever the factor was.
PYSEG_UPSAMPLE_INLINE bool is_copied(const Axis& axis) { return axis.in == axis.out; }

PYSEG_UPSAMPLE_INLINE Tap tap_of(const Axis& axis, int64_t i) {
  if (is_copied(axis)) return {int32_t(i), int32_t(i), 0};
  double at = axis.align ? axis.scale * double(i) : axis.scale * (double(i) + 0.5) - 0.5;
  at = at > 0 ? at : 0;
  const int64_t whole = at < double(axis.in) ? int64_t(at) : axis.in - 1, low = whole < axis.in ? whole : axis.in - 1;
  const double rest = at - double(low);
  return {int32_t(low), int32_t(low + 1 < axis.in ? low + 1 : low), rest < 1 ? rest : 1};
}

}  // namespace pyseg::upsample
