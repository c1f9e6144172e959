// The CPU kernels of the distance transforms for one instruction set: compiled once per target, PYSEG_TARGET is its
// name.
#include "distance/cpu_transform.h"
#include "distance/cpu_two_nearest.h"
#include "distance/distance_transform_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

using distance::Arithmetic;

// Calls f.template operator()<T, G, Out>() with the types for these arguments.
template <typename F>
inline auto with_types(const DistanceArgs& a, const F& f) {
  const int64_t sizes[3] = {a.d, a.h, a.w};
  const Arithmetic arithmetic = distance::arithmetic_for(sizes, a.spacing, a.float64);
  const bool wide = row_stride(a.w) >= kNoSource<uint16_t> - kRowUnit;  // positions along a row need 32 bits
  if (arithmetic == Arithmetic::kInt32)
    return a.float64 ? f.template operator()<int32_t, uint16_t, double>()
                     : f.template operator()<int32_t, uint16_t, float>();
  if (arithmetic == Arithmetic::kFloat)
    return wide ? f.template operator()<float, uint32_t, float>() : f.template operator()<float, uint16_t, float>();
  if (a.float64)
    return wide ? f.template operator()<double, uint32_t, double>() : f.template operator()<double, uint16_t, double>();
  return wide ? f.template operator()<double, uint32_t, float>() : f.template operator()<double, uint16_t, float>();
}

int64_t transform_workspace(const DistanceArgs& a, int64_t workers) {
  return with_types(
      a, [&]<typename T, typename G, typename Out>() { return Transform<T, G, Out>::workspace(a, workers); });
}

void transform(const DistanceArgs& a, void* workspace, const Workers& workers) {
  with_types(a, [&]<typename T, typename G, typename Out>() { Transform<T, G, Out>(a, workspace, workers).run(); });
}

// Calls f.template operator()<T, Out>() with the types for these arguments.
template <typename F>
inline auto with_types(const TwoNearestArgs& a, const F& f) {
  const int64_t sizes[3] = {a.d, a.h, a.w};
  switch (distance::arithmetic_for(sizes, a.spacing, a.float64)) {
    case Arithmetic::kInt32:
      return a.float64 ? f.template operator()<int32_t, double>() : f.template operator()<int32_t, float>();
    case Arithmetic::kFloat: return f.template operator()<float, float>();
    default: return a.float64 ? f.template operator()<double, double>() : f.template operator()<double, float>();
  }
}

int64_t two_nearest_workspace(const TwoNearestArgs& a, int64_t workers) {
  return with_types(a, [&]<typename T, typename Out>() { return TwoNearest<T, Out>::workspace(a, workers); });
}

void two_nearest(const TwoNearestArgs& a, void* workspace, const Workers& workers) {
  with_types(a, [&]<typename T, typename Out>() { TwoNearest<T, Out>(a, workspace, workers).run(); });
}

}  // namespace

extern const DistanceKernelTable distance_kernels;
const DistanceKernelTable distance_kernels = {.transform_workspace = transform_workspace,
                                              .transform = transform,
                                              .two_nearest_workspace = two_nearest_workspace,
                                              .two_nearest = two_nearest};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
