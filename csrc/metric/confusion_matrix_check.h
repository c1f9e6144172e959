// Checks of confusion_matrix's arguments, the same on every device. Messages name operator, argument, expected and got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/pixel_stride.h"
#include "common/tensor_arguments.h"
#include "metric/confusion_matrix_math.h"

namespace pyseg::metric {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kConfusionMatrix = "confusion_matrix";

inline bool is_label_type(ScalarType type) {
  return type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Char ||
         type == ScalarType::Short || type == ScalarType::Int || type == ScalarType::Long;
}

inline LabelType label_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte: return LabelType::kUInt8;
    case ScalarType::Char: return LabelType::kInt8;
    case ScalarType::Short: return LabelType::kInt16;
    case ScalarType::Int: return LabelType::kInt32;
    default: return LabelType::kInt64;
  }
}

inline std::optional<LogitType> logit_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return LogitType::kFloat;
    case ScalarType::Double: return LogitType::kDouble;
    case ScalarType::Half: return LogitType::kHalf;
    case ScalarType::BFloat16: return LogitType::kBFloat16;
    default: return std::nullopt;
  }
}

inline bool holds(LabelType type, int64_t value) {
  switch (type) {
    case LabelType::kUInt8: return value >= 0 && value <= UINT8_MAX;
    case LabelType::kInt8: return value >= INT8_MIN && value <= INT8_MAX;
    case LabelType::kInt16: return value >= INT16_MIN && value <= INT16_MAX;
    case LabelType::kInt32: return value >= INT32_MIN && value <= INT32_MAX;
    default: return true;
  }
}

// The arguments without `matrix`. `prediction` and `target` are replaced by contiguous copies where the kernels cannot
// read them in place.
inline ConfusionArgs check_arguments(Tensor& prediction, Tensor& target, int64_t num_classes,
                                     std::optional<int64_t> ignore_index, bool per_image) {
  const char* op = kConfusionMatrix;
  using torch::headeronly::toString;
  PYSEG_CHECK(num_classes >= 1 && num_classes <= kMostClasses, op, ": num_classes must be in [1, ", kMostClasses,
              "], got ", num_classes);
  PYSEG_CHECK(is_label_type(target.scalar_type()), op,
              ": target must be uint8, int8, int16, int32, int64 or bool, got torch.", toString(target.scalar_type()));
  PYSEG_CHECK(target.dim() >= 1, op, ": target must be [N, *S], got ", target.sizes());
  const auto logits = logit_type(prediction);
  PYSEG_CHECK(
      logits || is_label_type(prediction.scalar_type()), op,
      ": prediction must be logits (float32, float64, float16 or bfloat16) or labels (uint8, int8, int16, int32, "
      "int64 or bool), got torch.",
      toString(prediction.scalar_type()));
  Ints expected = sizes_of(target);
  if (logits) expected.insert(expected.begin() + 1, num_classes);
  const Ints got = sizes_of(prediction);
  PYSEG_CHECK(got == expected, op, ": prediction must be ", expected, logits ? " (logits)" : " (labels)", ", got ",
              got);
  PYSEG_CHECK(prediction.device() == target.device(), op, ": prediction must be on the device of target");

  ConfusionArgs a{};
  a.images = target.size(0);
  a.pixels = 1;
  for (int64_t d = 1; d < target.dim(); ++d) a.pixels *= target.size(d);
  a.classes = static_cast<int>(num_classes);
  a.target_type = label_type(target);
  a.has_ignore = ignore_index && holds(a.target_type, *ignore_index);
  a.ignore_index = a.has_ignore ? *ignore_index : 0;
  a.from_logits = logits.has_value();
  a.per_image = per_image;
  target = torch::stable::contiguous(target);
  if (logits) {
    a.logit_type = *logits;
    if (!pixel_stride(prediction)) prediction = torch::stable::contiguous(prediction);
    a.strides = {prediction.stride(0), prediction.stride(1), *pixel_stride(prediction)};
    if (a.pixels == 1 && !per_image) a.strides.pixel = a.strides.image;
    if (a.classes == 1) a.strides.cls = 0;
  } else {
    prediction = torch::stable::contiguous(prediction);
    a.prediction_type = label_type(prediction);
  }
  // One long image where the batch goes on in the same steps.
  if (!per_image && (!logits || a.images == 1 || a.strides.image == a.pixels * a.strides.pixel)) {
    a.pixels *= a.images;
    a.images = 1;
  }
  a.target = target.data_ptr();
  a.prediction = prediction.data_ptr();
  return a;
}

inline std::vector<int64_t> matrix_sizes(const Tensor& target, int64_t num_classes, bool per_image) {
  return per_image ? std::vector<int64_t>{target.size(0), num_classes, num_classes}
                   : std::vector<int64_t>{num_classes, num_classes};
}

}  // namespace pyseg::metric
