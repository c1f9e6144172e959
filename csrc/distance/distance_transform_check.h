// Checks of the distance transforms' arguments, the same on every device. Messages name operator, argument, expected,
// got.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor_arguments.h"
#include "distance/distance_transform_math.h"

namespace pyseg::distance {

constexpr const char* kTransform = "distance_transform";
constexpr const char* kTwoNearest = "distance_to_two_nearest_objects";

// What the kernels look at: N maps of D x H x W (D is 1 in two dimensions).
struct Grid {
  int dims;
  int64_t n, sizes[3];
  double spacing[3];  // 1 where there is no such axis
};

inline Grid check_grid(const char* op, const char* name, const torch::stable::Tensor& t,
                       const std::vector<double>& spacing, bool float64) {
  PYSEG_CHECK(spacing.size() == 2 || spacing.size() == 3, op,
              ": spacing must have an element for each of 2 or 3 axes, got ", spacing);
  for (const double s : spacing)
    PYSEG_CHECK(s > 0 && std::isfinite(s), op, ": spacing must be positive and finite, got ", spacing);
  const int dims = static_cast<int>(spacing.size());
  PYSEG_CHECK(t.dim() >= dims, op, ": ", name, " must be [*, ", dims == 3 ? "D, " : "", "H, W] for ", dims,
              " axes, got ", t.sizes());
  Grid grid{.dims = dims, .n = 1, .sizes = {1, 1, 1}, .spacing = {1, 1, 1}};
  for (int64_t i = 0; i < t.dim() - dims; ++i) grid.n *= t.size(i);
  for (int i = 0; i < dims; ++i) {
    grid.sizes[3 - dims + i] = t.size(t.dim() - dims + i);
    grid.spacing[3 - dims + i] = spacing[i];
  }
  // Squares are computed in the type of the distances: none may vanish, none overflow.
  const double least = float64 ? DBL_MIN : FLT_MIN, most = float64 ? DBL_MAX : FLT_MAX;
  double farthest = 0;
  bool fits = true;
  for (int axis = 3 - dims; axis < 3; ++axis) {
    const double step = grid.spacing[axis], extent = step * static_cast<double>(grid.sizes[axis]);
    fits &= step * step >= least;
    farthest += extent * extent;
  }
  PYSEG_CHECK(fits && farthest <= most, op, ": spacing must give squared distances in the range of ",
              float64 ? "float64" : "float32", ", got ", spacing, " for sizes ", t.sizes());
  for (const int64_t size : grid.sizes)  // positions along an axis are 32-bit numbers in places
    PYSEG_CHECK(size < int64_t{1} << 30, op, ": sizes must be below 2^30, got ", t.sizes());
  return grid;
}

inline Mode check_mode(const std::string& mode) {
  if (mode == "mask") return Mode::kMask;
  if (mode == "signed") return Mode::kSigned;
  if (mode == "labels") return Mode::kLabels;
  PYSEG_CHECK(mode == "objects", kTransform, ": mode must be mask, signed, labels or objects, got ", mode);
  return Mode::kObjects;
}

struct Element {
  int bytes;
  bool floating;
};

inline Element check_element(const char* op, const char* name, const torch::stable::Tensor& t, bool labels) {
  using torch::headeronly::ScalarType;
  const auto type = t.scalar_type();
  const char* got = torch::headeronly::toString(type);
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: return {1, false};
    case ScalarType::Short:
    case ScalarType::UInt16: return {2, false};
    case ScalarType::Int:
    case ScalarType::UInt32: return {4, false};
    case ScalarType::Long:
    case ScalarType::UInt64: return {8, false};
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Float:
    case ScalarType::Double:
      PYSEG_CHECK(!labels, op, ": ", name, " must be integers as labels, got torch.", got);
      return {type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2, true};
    default: throw_error(op, ": ", name, " must be bool, integers or real numbers, got torch.", got);
  }
}

// [*, dims, ...]: where the components of the indices of a tensor of these sizes lie.
inline Ints index_sizes(const torch::stable::Tensor& t, int dims) {
  Ints sizes = sizes_of(t);
  sizes.insert(sizes.end() - dims, dims);
  return sizes;
}

}  // namespace pyseg::distance
