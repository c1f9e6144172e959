// Checks of warp_to_view's arguments, the same on every device, and what the kernels need to know of them. Messages name
// operator, argument, expected, got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/element.h"
#include "common/memory_format.h"
#include "common/tensor_arguments.h"
#include "warp/warp_to_view_math.h"

namespace pyseg::view {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kWarp = "warp_to_view";
constexpr const char* kWarpBackward = "_warp_to_view_backward";
constexpr int64_t kMostViews = 255;  // of a keyframe: they are counted in bytes

inline Element check_floats(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::BFloat16: return Element::kBFloat16;
    default: throw_error(op, ": ", name, " must be float32, float64, float16 or bfloat16, got ", dtype_name(t));
  }
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  PYSEG_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
              " must be on the device of the others");
}

inline void check_sides(const char* op, const char* name, int64_t height, int64_t width) {
  PYSEG_CHECK(height > 0 && width > 0, op, ": ", name, " must have positive H and W, got ", Ints{height, width});
  PYSEG_CHECK(height < INT32_MAX && width < INT32_MAX && height * width < INT32_MAX, op, ": ", name,
              " must have fewer than 2^31 pixels, got ", Ints{height, width});
}

// A depth map as the kernels read it: of float32 or float64, each image dense.
inline Tensor check_depth(const char* op, const char* name, const Tensor& t, const Ints& expected, const Tensor& like) {
  check_floats(op, name, t);
  PYSEG_CHECK(sizes_of(t) == expected, op, ": ", name, " must be ", expected, ", got ", t.sizes());
  check_device(op, name, t, like);
  const bool wide = t.scalar_type() == ScalarType::Double;
  const Tensor depth = torch::stable::to(t, wide ? ScalarType::Double : ScalarType::Float);
  const bool dense =
      (depth.stride(2) == 1 || depth.size(2) == 1) && (depth.stride(1) == depth.size(2) || depth.size(1) == 1);
  return dense ? depth : torch::stable::contiguous(depth);
}

// Matrices of a camera, dense.
inline Tensor check_matrices(const char* op, const char* name, const Tensor& t, const Ints& expected,
                             const Tensor& like) {
  PYSEG_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op, ": ", name,
              " must be float32 or float64, got ", dtype_name(t));
  PYSEG_CHECK(sizes_of(t) == expected, op, ": ", name, " must be ", expected, ", got ", t.sizes());
  check_device(op, name, t, like);
  return torch::stable::contiguous(t);
}

// What both operators take but for the maps themselves.
struct Geometry {
  int64_t keys, views;  // views of each keyframe
  int64_t key_height, key_width;
  Visibility visibility;
  Tensor depth, key_intrinsics, source_intrinsics, pose, source_depth;  // the last one may be without elements
};

// n views of height x width pixels; `like` is the map whose device all are on.
inline Geometry check_geometry(const char* op, const Tensor& like, int64_t n, int64_t height, int64_t width,
                               const Tensor& depth, const Tensor& key_intrinsics, const Tensor& source_intrinsics,
                               const Tensor& pose, const std::optional<Tensor>& source_depth, double absolute,
                               double relative) {
  PYSEG_CHECK(depth.dim() == 3, op, ": depth must be [K, H, W], got ", depth.sizes());
  const int64_t keys = depth.size(0);
  PYSEG_CHECK(keys == 0 ? n == 0 : n % keys == 0, op, ": scores must have as many views of each of ", keys,
              " keyframes, got ", n);
  const int64_t views = keys == 0 ? 0 : n / keys;
  PYSEG_CHECK(views <= kMostViews, op, ": scores must have at most ", kMostViews, " views of a keyframe, got ", views);
  check_sides(op, "depth", depth.size(1), depth.size(2));
  check_sides(op, "scores", height, width);
  PYSEG_CHECK(absolute >= 0, op, ": absolute_tolerance must be at least 0, got ", absolute);
  PYSEG_CHECK(relative >= 0, op, ": relative_tolerance must be at least 0, got ", relative);
  return {.keys = keys,
          .views = views,
          .key_height = depth.size(1),
          .key_width = depth.size(2),
          .visibility = {.height = int32_t(height),
                         .width = int32_t(width),
                         .tested = source_depth.has_value(),
                         .absolute = absolute,
                         .relative = relative},
          .depth = check_depth(op, "depth", depth, sizes_of(depth), like),
          .key_intrinsics = check_matrices(op, "key_intrinsics", key_intrinsics, {keys, 3, 3}, like),
          .source_intrinsics = check_matrices(op, "source_intrinsics", source_intrinsics, {n, 3, 3}, like),
          .pose = check_matrices(op, "pose", pose, {n, 4, 4}, like),
          .source_depth = source_depth ? check_depth(op, "source_depth", *source_depth, {n, height, width}, like)
                                       : torch::stable::new_empty(depth, {0, 0, 0})};
}

inline void check_grad(const Tensor& grad, const Geometry& g) {
  PYSEG_CHECK(grad.dim() == 4 && grad.size(0) == g.keys && grad.size(2) == g.key_height && grad.size(3) == g.key_width,
              kWarpBackward, ": grad must be [", g.keys, ", C, ", g.key_height, ", ", g.key_width, "], got ",
              grad.sizes());
}

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

inline MemoryFormat format_of(bool last) { return last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }

// [N, C, H, W] of the dtype and device of `like`.
inline Tensor new_map(const Tensor& like, const Ints& size, bool last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format_of(last));
}

inline Tensor dense(const Tensor& t, bool last) { return torch::stable::contiguous(t, format_of(last)); }

// Scores as the kernels read them: the channels of a channels_last map side by side, which those of a slice
// [:, ::2] are not.
inline Tensor readable(const Tensor& scores, bool last) {
  return last && scores.stride(1) != 1 ? dense(scores, true) : scores;
}

}  // namespace pyseg::view
