// Checks of expectation_labels' arguments, the same on every device. Messages name operator, argument, expected and got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>

#include "common/pixel_stride.h"
#include "loss/expectation_labels_math.h"
#include "loss/segmentation_check.h"

namespace pyseg::loss {

constexpr const char* kExpectation = "expectation_labels";

// The arguments without the results. `logits`, `present` and `valid` are replaced by contiguous copies where the kernels
// cannot read them in place.
inline ExpectationArgs check_expectation(torch::stable::Tensor& logits, torch::stable::Tensor& present,
                                         OptTensor& valid, double background_bias, double foreground_bias,
                                         double background_share, double foreground_share, bool exclude_absent,
                                         int64_t sweeps, int64_t ignore_index) {
  using torch::headeronly::ScalarType;
  const char* op = kExpectation;
  check_logits(op, logits);
  PYSEG_CHECK(logits.size(1) <= kMostExpectationClasses, op, ": logits must have 1 to ", kMostExpectationClasses,
              " classes, got ", logits.sizes());
  const auto check_mask = [&](const char* name, const torch::stable::Tensor& mask, const Ints& sizes) {
    PYSEG_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": ", name, " must be bool, got ", dtype_name(mask));
    check_same_device(op, name, mask, logits);
    PYSEG_CHECK(sizes_of(mask) == sizes, op, ": ", name, " must be ", sizes, ", got ", mask.sizes());
  };
  check_mask("present", present, {logits.size(0), logits.size(1)});
  if (valid) check_mask("valid", *valid, sizes_of_pixels(logits));
  const auto check_number = [&](const char* name, double value, double most) {
    PYSEG_CHECK(value >= 0 && value <= most, op, ": ", name, " must be from 0 to ", most, ", got ", value);
  };
  constexpr double kMostBias = 1e30;
  check_number("background_bias", background_bias, kMostBias);
  check_number("foreground_bias", foreground_bias, kMostBias);
  check_number("background_share", background_share, 1);
  check_number("foreground_share", foreground_share, 1);
  PYSEG_CHECK(sweeps >= 0, op, ": sweeps must be at least 0, got ", sweeps);

  ExpectationArgs a{};
  a.images = logits.size(0);
  a.classes = static_cast<int>(logits.size(1));
  a.pixels = pixels_of(logits);
  a.logits_type = *element_of(logits);
  if (!pixel_stride(logits)) logits = torch::stable::contiguous(logits);
  present = torch::stable::contiguous(present);
  a.logits = logits.data_ptr();
  a.image_stride = logits.stride(0);
  a.class_stride = logits.stride(1);
  a.pixel_stride = *pixel_stride(logits);
  a.present = static_cast<const uint8_t*>(present.data_ptr());
  if (valid) {
    valid = torch::stable::contiguous(*valid);
    a.valid = static_cast<const uint8_t*>(valid->data_ptr());
  }
  a.background_bias = background_bias;
  a.foreground_bias = foreground_bias;
  a.background_share = background_share;
  a.foreground_share = foreground_share;
  a.exclude_absent = exclude_absent;
  a.sweeps = sweeps;
  a.ignore_index = ignore_index;
  return a;
}

}  // namespace pyseg::loss
