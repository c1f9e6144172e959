// Checks of the RoI operators' arguments, the same on every device. Messages name operator, argument, expected, got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/element.h"
#include "common/tensor_arguments.h"
#include "roi/paste_masks_math.h"
#include "roi/roi_align_math.h"

namespace pyseg::roi {

using Floats = std::vector<double>;
using Tensors = std::vector<torch::stable::Tensor>;

constexpr const char* kAlign = "roi_align";
constexpr const char* kMultiscale = "multiscale_roi_align";
constexpr const char* kAlignBackward = "_roi_align_backward";
constexpr const char* kCrop = "crop_masks";
constexpr const char* kPaste = "paste_masks";
constexpr const char* kPasteRle = "paste_masks_rle";
constexpr const char* kPasteBackward = "_paste_masks_backward";
constexpr const char* kNms = "nms";

inline Element check_floats(const char* op, const char* name, const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::BFloat16: return Element::kBFloat16;
    default:
      throw_error(op, ": ", name, " must be float32, float64, float16 or bfloat16, got torch.",
                  torch::headeronly::toString(t.scalar_type()));
  }
}

inline void check_same_device(const char* op, const char* name, const torch::stable::Tensor& t,
                              const torch::stable::Tensor& like) {
  PYSEG_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
              " must be on the device of the maps");
}

inline bool check_mode(const char* op, const std::string& mode) {
  PYSEG_CHECK(mode == "avg" || mode == "max", op, ": mode must be avg or max, got ", mode);
  return mode == "max";
}

// boxes [K, 5 or 6] for maps of two, [K, 7] for maps of three dimensions.
inline BoxKind check_boxes(const char* op, const torch::stable::Tensor& boxes, int64_t dims) {
  check_floats(op, "boxes", boxes);
  const bool fits = boxes.dim() == 2 && (dims == 3 ? boxes.size(1) == 7 : boxes.size(1) == 5 || boxes.size(1) == 6);
  PYSEG_CHECK(fits, op, ": boxes must be ", dims == 3 ? "[K, 7]" : "[K, 5] or [K, 6]", ", got ", boxes.sizes());
  return dims == 3 ? BoxKind::kAligned3d : boxes.size(1) == 6 ? BoxKind::kRotated : BoxKind::kAligned2d;
}

inline Sampling check_sampling(const char* op, BoxKind kind, const Ints& output_size, int64_t ratio, bool aligned) {
  const size_t dims = kind == BoxKind::kAligned3d ? 3 : 2;
  bool positive = output_size.size() == dims;
  for (const int64_t size : output_size) positive = positive && size > 0 && size < int64_t{1} << 20;
  PYSEG_CHECK(positive, op, ": output_size must be ", dims, " positive integers, got ", output_size);
  PYSEG_CHECK(ratio < kMostSamples, op, ": sampling_ratio must be below 2^30, got ", ratio);
  Sampling sampling{kind, aligned, ratio, {1, 1, 1}};
  for (size_t i = 0; i < dims; ++i) sampling.bins[kAxes - dims + i] = output_size[i];
  return sampling;
}

// Sizes [N, C, H, W] or [N, C, D, H, W] of one map.
inline void check_map_size(const char* op, const char* name, const Ints& size) {
  PYSEG_CHECK(size.size() == 4 || size.size() == 5, op, ": ", name, " must be [N, C, H, W] or [N, C, D, H, W], got ",
              size);
}

inline void check_scale(const char* op, const char* name, double scale) {
  PYSEG_CHECK(scale > 0 && std::isfinite(scale), op, ": ", name, " must be positive and finite, got ", scale);
}

inline Element check_maps(const char* op, const char* name, const Tensors& maps, const torch::stable::Tensor& boxes) {
  PYSEG_CHECK(!maps.empty(), op, ": ", name, " must not be empty");
  const Element type = check_floats(op, name, maps[0]);
  const Ints first = sizes_of(maps[0]);
  check_map_size(op, name, first);
  for (const torch::stable::Tensor& map : maps) {
    const Ints size = sizes_of(map);
    PYSEG_CHECK(size.size() == first.size() && size[0] == first[0] && size[1] == first[1], op, ": ", name,
                " must have the same images and channels, got ", size, " beside ", first);
    PYSEG_CHECK(map.scalar_type() == maps[0].scalar_type(), op, ": ", name, " must have one dtype");
    check_same_device(op, name, map, maps[0]);
  }
  check_same_device(op, "boxes", boxes, maps[0]);
  return type;
}

inline Sampling check_crop(const torch::stable::Tensor& masks, const torch::stable::Tensor& boxes, const Ints& size,
                           int64_t ratio, bool aligned) {
  using torch::headeronly::ScalarType;
  const auto type = masks.scalar_type();
  PYSEG_CHECK(type == ScalarType::Bool || type == ScalarType::Byte, kCrop, ": masks must be bool or uint8, got torch.",
              torch::headeronly::toString(type));
  PYSEG_CHECK(masks.dim() == 3, kCrop, ": masks must be [N, H, W], got ", masks.sizes());
  PYSEG_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, kCrop, ": boxes must be [K, 5], got ", boxes.sizes());
  check_same_device(kCrop, "boxes", boxes, masks);
  return check_sampling(kCrop, check_boxes(kCrop, boxes, 2), size, ratio, aligned);
}

// Without a pyramid all boxes belong to the first map.
inline Pyramid check_pyramid(const char* op, int64_t least, int64_t most, double size, double level,
                             const Floats& epsilon) {
  constexpr int64_t kMost = 64;
  PYSEG_CHECK(least > -kMost && least <= most && most < kMost, op, ": least_level must be at most most_level, got ",
              least, " and ", most);
  PYSEG_CHECK(size > 0 && std::isfinite(size) && std::isfinite(level), op,
              ": canonical_size must be positive and finite, got ", size);
  PYSEG_CHECK(epsilon.size() == 2 && epsilon[0] >= 0 && std::isfinite(epsilon[0]) && std::isfinite(epsilon[1]), op,
              ": epsilon must be two finite numbers, the first not negative, got ", epsilon);
  return {int(least), int(most), size, level, {epsilon[0], epsilon[1]}};
}

// The arguments of _roi_align_backward, looked at.
struct BackwardArguments {
  Element type;
  std::vector<Ints> sizes;  // of each map
  BoxKind kind;
  Sampling sampling;
  bool maximum;
  std::optional<Pyramid> pyramid;
};

inline BackwardArguments check_backward(const torch::stable::Tensor& grad, const Tensors& features,
                                        const torch::stable::Tensor& boxes, const Ints& sizes, size_t levels,
                                        int64_t sampling_ratio, bool aligned, const std::string& mode,
                                        const Floats& pyramid, bool need_boxes) {
  const char* op = kAlignBackward;
  BackwardArguments checked{};
  checked.type = check_floats(op, "grad", grad);
  PYSEG_CHECK(grad.dim() == 4 || grad.dim() == 5, op, ": grad must be [K, C, *output_size], got ", grad.sizes());
  const size_t rank = grad.dim();
  PYSEG_CHECK(levels > 0 && sizes.size() == rank * levels, op, ": sizes must have ", rank, " numbers for each of ",
              levels, " maps, got ", sizes);
  std::vector<Ints>& each = checked.sizes;
  for (size_t l = 0; l < levels; ++l) {
    each.emplace_back(sizes.begin() + l * rank, sizes.begin() + (l + 1) * rank);
    PYSEG_CHECK(each[l][0] == each[0][0] && each[l][1] == grad.size(1), op,
                ": sizes must have the same images and channels, got ", sizes);
    if (features.empty()) continue;
    PYSEG_CHECK(features.size() == levels && sizes_of(features[l]) == each[l] &&
                    features[l].scalar_type() == grad.scalar_type(),
                op, ": features must be of the sizes and dtype of grad's maps");
  }
  checked.kind = check_boxes(op, boxes, grad.dim() - 2);
  const Ints output_size(grad.sizes().begin() + 2, grad.sizes().end());
  PYSEG_CHECK(boxes.size(0) == grad.size(0), op, ": boxes must have ", grad.size(0), " rows like grad, got ",
              boxes.size(0));
  checked.sampling = check_sampling(op, checked.kind, output_size, sampling_ratio, aligned);
  checked.maximum = check_mode(op, mode);
  PYSEG_CHECK(!features.empty() || !(checked.maximum || need_boxes), op,
              ": features must be given for max and for the boxes");
  if (!pyramid.empty()) {
    PYSEG_CHECK(pyramid.size() == 6, op, ": pyramid must have no elements or 6, got ", pyramid);
    checked.pyramid =
        check_pyramid(op, int64_t(pyramid[0]), int64_t(pyramid[1]), pyramid[2], pyramid[3], {pyramid[4], pyramid[5]});
  }
  return checked;
}

inline void check_nms(const torch::stable::Tensor& boxes, const torch::stable::Tensor& scores,
                      const std::optional<torch::stable::Tensor>& idxs) {
  PYSEG_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, kNms, ": boxes must be [K, 4], got ", boxes.sizes());
  const Ints expected{boxes.size(0)};
  check_floats(kNms, "boxes", boxes);
  check_floats(kNms, "scores", scores);
  PYSEG_CHECK(sizes_of(scores) == expected, kNms, ": scores must be ", expected, ", got ", scores.sizes());
  check_same_device(kNms, "scores", scores, boxes);
  if (!idxs) return;
  PYSEG_CHECK(sizes_of(*idxs) == expected && idxs->scalar_type() == torch::headeronly::ScalarType::Long, kNms,
              ": idxs must be ", expected, " of int64, got ", idxs->sizes(), " of torch.",
              torch::headeronly::toString(idxs->scalar_type()));
  check_same_device(kNms, "idxs", *idxs, boxes);
}

// The threshold for overlaps of this type of boxes: the largest float that is not above it, so that a float is above the
// one where it is above the other, and no kernel compares in double precision.
inline double nms_threshold(const torch::stable::Tensor& boxes, double threshold) {
  if (boxes.scalar_type() == torch::headeronly::ScalarType::Double) return threshold;
  const float rounded = static_cast<float>(threshold);
  return rounded > threshold ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
}

// Shapes of masks [K, m_h, m_w], boxes [K, 4] and an image.
inline void check_paste(const char* op, const Ints& masks, const torch::stable::Tensor& boxes, int64_t height,
                        int64_t width, int64_t padding) {
  constexpr int64_t kMost = int64_t{1} << 30;
  PYSEG_CHECK(masks.size() == 3 && masks[1] > 0 && masks[2] > 0, op, ": masks must be [K, m_h, m_w], got ", masks);
  PYSEG_CHECK(boxes.dim() == 2 && boxes.size(0) == masks[0] && boxes.size(1) == 4, op, ": boxes must be [", masks[0],
              ", 4] for as many masks, got ", boxes.sizes());
  check_floats(op, "boxes", boxes);
  PYSEG_CHECK(height >= 0 && width >= 0 && height < kMost && width < kMost, op,
              ": image_size must not be negative, got ", height, " and ", width);
  PYSEG_CHECK(padding >= 0 && padding < kMost, op, ": padding must not be negative, got ", padding);
}

// As torch compares a tensor with a number: the number is rounded to the tensor's type first.
inline double paste_threshold(const torch::stable::Tensor& masks, double threshold) {
  using torch::headeronly::ScalarType;
  switch (masks.scalar_type()) {
    case ScalarType::Half: return float(torch::headeronly::Half(float(threshold)));
    case ScalarType::BFloat16: return float(torch::headeronly::BFloat16(float(threshold)));
    default: return threshold;
  }
}

inline PasteOutput check_paste_output(const std::string& output) {
  if (output == "values") return PasteOutput::kValues;
  if (output == "packed") return PasteOutput::kPacked;
  PYSEG_CHECK(output == "bool", kPaste, ": output must be values, bool or packed, got ", output);
  return PasteOutput::kBool;
}

// [K, height, width], packed in bytes of eight columns.
inline torch::stable::Tensor new_pasted(const torch::stable::Tensor& masks, int64_t height, int64_t width,
                                        PasteOutput output) {
  using torch::headeronly::ScalarType;
  const bool packed = output == PasteOutput::kPacked;
  const ScalarType type = output == PasteOutput::kValues ? masks.scalar_type()
                          : packed                       ? ScalarType::Byte
                                                         : ScalarType::Bool;
  return torch::stable::new_empty(masks, {masks.size(0), height, packed ? (width + 7) / 8 : width}, type);
}

}  // namespace pyseg::roi
