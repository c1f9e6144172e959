// Checks of the arguments of point_supervision_loss, the same on every device.
#pragma once

#include "loss/point_supervision_math.h"
#include "loss/segmentation_check.h"

namespace pyseg::loss {

inline void check_point_supervision(const char* op, const torch::stable::Tensor& logits,
                                    const torch::stable::Tensor& target, const OptTensor& point_weight,
                                    const OptTensor& objectness) {
  check_logits(op, logits);
  PYSEG_CHECK(logits.size(1) >= 2 && logits.size(1) <= kMostPointClasses, op, ": logits must have 2 to ",
              kMostPointClasses, " classes, got ", logits.sizes());
  PYSEG_CHECK(target.dim() == logits.dim() - 1, op, ": target must be labels ", sizes_of_pixels(logits), ", got ",
              target.sizes());
  check_weight(op, "point_weight", point_weight, logits, sizes_of_pixels(logits));
  check_weight(op, "objectness", objectness, logits, sizes_of_pixels(logits));
}

// 1 for each class that is not one of the background, 0 else: [C].
inline std::vector<uint8_t> objects_of(const char* op, const Ints& background, int64_t classes) {
  std::vector<uint8_t> objects(classes, 1);
  int64_t left = classes;
  for (const int64_t c : background) {
    PYSEG_CHECK(c >= 0 && c < classes, op, ": background must name some of the classes 0 to ", classes - 1, ", got ",
                background);
    left -= objects[c];
    objects[c] = 0;
  }
  PYSEG_CHECK(left > 0 && left < classes, op, ": background must name some of the classes 0 to ", classes - 1,
              " and not all, got ", background);
  return objects;
}

// Contiguous int64 [N, C].
inline torch::stable::Tensor checked_image_labels(const char* op, const torch::stable::Tensor& labels,
                                                  const torch::stable::Tensor& logits) {
  const auto type = element_of(labels);
  PYSEG_CHECK(type && !is_float(*type), op, ": image_labels must be of integers or bool, got ", dtype_name(labels));
  check_same_device(op, "image_labels", labels, logits);
  const Ints expected{logits.size(0), logits.size(1)};
  PYSEG_CHECK(sizes_of(labels) == expected, op, ": image_labels must be ", expected, ", got ", labels.sizes());
  return torch::stable::contiguous(torch::stable::to(labels, torch::headeronly::ScalarType::Long));
}

inline void check_doubles(const char* op, const char* name, const torch::stable::Tensor& t,
                          const torch::stable::Tensor& logits, const Ints& sizes) {
  PYSEG_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Double, op, ": ", name, " must be float64, got ",
              dtype_name(t));
  check_same_device(op, name, t, logits);
  PYSEG_CHECK(sizes_of(t) == sizes, op, ": ", name, " must be ", sizes, ", got ", t.sizes());
}

}  // namespace pyseg::loss
