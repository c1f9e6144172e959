// Checks of atrous_conv2d's arguments, the same on every device. Messages name operator, argument, expected and got.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/tensor_arguments.h"

namespace pyseg::atrous {

using OptTensor = std::optional<torch::stable::Tensor>;

constexpr const char* kForward = "atrous_conv2d";
constexpr const char* kBackward = "_atrous_conv2d_backward";
constexpr const char* kPack = "_atrous_conv2d_pack";
constexpr const char* kToChannelsLast = "_to_channels_last";

constexpr int64_t kMaxCoordinate = int64_t{1} << 29;

inline void check_dtype(const char* op, const char* name, const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  PYSEG_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                  type == ScalarType::BFloat16,
              op, ": ", name, " must be float32, float64, float16 or bfloat16, got torch.",
              torch::headeronly::toString(type));
}

inline void check_like(const char* op, const char* name, const torch::stable::Tensor& t,
                       const torch::stable::Tensor& input) {
  PYSEG_CHECK(t.scalar_type() == input.scalar_type(), op, ": ", name, " must have the dtype of input, torch.",
              torch::headeronly::toString(input.scalar_type()), ", got torch.",
              torch::headeronly::toString(t.scalar_type()));
  PYSEG_CHECK(t.is_cuda() == input.is_cuda() && t.get_device_index() == input.get_device_index(), op, ": ", name,
              " must be on the device of input");
}

inline void check_weight(const char* op, const torch::stable::Tensor& weight) {
  // 1x1 products on CUDA are torch's.
  const bool fits = weight.dim() == 4 && weight.size(2) == weight.size(3) &&
                    (weight.size(2) == 3 || (weight.size(2) == 1 && !weight.is_cuda()));
  PYSEG_CHECK(fits, op, ": weight must be [C_out, C_in / groups, 3, 3]",
              weight.is_cuda() ? "" : " or [C_out, C_in, 1, 1]", ", got ", weight.sizes());
}

inline void check_vector(const char* name, const OptTensor& t, const torch::stable::Tensor& input, int64_t channels) {
  if (!t) return;
  check_like(kForward, name, *t, input);
  PYSEG_CHECK(t->dim() == 1 && t->size(0) == channels, kForward, ": ", name, " must be [C_out] = [", channels,
              "], got ", t->sizes());
}

// `name` must be a tensor like input, of these sizes.
inline void check_map(const char* op, const char* name, const torch::stable::Tensor& t,
                      const torch::stable::Tensor& input, const Ints& sizes) {
  check_like(op, name, t, input);
  PYSEG_CHECK(t.dim() == 4 && sizes_of(t) == sizes, op, ": ", name, " must be ", sizes, ", got ", t.sizes());
}

inline void check_out(const torch::stable::Tensor& out, const torch::stable::Tensor& input, const Ints& sizes) {
  check_map(kForward, "out", out, input, sizes);
  PYSEG_CHECK(out.numel() == 0 || out.data_ptr() != input.data_ptr(), kForward, ": out must not be the input");
  // Each dimension, from the shortest stride, must step over all that lies before it.
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int d = 0; d < 4; ++d)
    if (out.size(d) > 1) steps.emplace_back(out.stride(d), out.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : steps) {
    PYSEG_CHECK(out.numel() == 0 || stride >= extent, kForward, ": out must not overlap itself, got sizes ",
                out.sizes(), " and strides ", out.strides());
    extent = stride * (size - 1) + extent;
  }
}

// Checks input, weight, padding, dilation and groups; returns the output's [N, C_out, H, W].
inline Ints check_convolution(const char* op, const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                              const Ints& padding, const Ints& dilation, int64_t groups) {
  PYSEG_CHECK(input.dim() == 4, op, ": input must be [N, C_in, H, W], got ", input.sizes());
  check_weight(op, weight);
  check_dtype(op, "input", input);
  check_like(op, "weight", weight, input);
  PYSEG_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, op,
              ": padding must be two integers that are not negative, got ", padding);
  PYSEG_CHECK(dilation.size() == 2 && dilation[0] >= 1 && dilation[1] >= 1, op,
              ": dilation must be two positive integers, got ", dilation);
  // Coordinates are 32-bit numbers in places; so they cannot overflow.
  for (const int64_t n : {padding[0], padding[1], dilation[0], dilation[1], input.size(2), input.size(3)})
    PYSEG_CHECK(n < kMaxCoordinate, op, ": padding, dilation, H and W must be below 2^29, got padding ", padding,
                ", dilation ", dilation, " and input ", input.sizes());
  const int64_t in = input.size(1), out = weight.size(0);
  PYSEG_CHECK(groups == 1 || (groups > 1 && groups == in && groups == out), op,
              ": groups must be 1 or C_in = C_out, got ", groups, " with C_in = ", in, " and C_out = ", out);
  const int64_t kernel = weight.size(2);
  PYSEG_CHECK(weight.size(1) * groups == in, op, ": weight must be [C_out, C_in / groups, ", kernel, ", ", kernel,
              "] with C_in = ", in, " and groups = ", groups, ", got ", weight.sizes());
  PYSEG_CHECK(groups == 1 || kernel == 3, op, ": weight must be [C_out, 1, 3, 3] for groups = ", groups, ", got ",
              weight.sizes());
  const int64_t h = input.size(2) + 2 * padding[0] - (kernel - 1) * dilation[0];
  const int64_t w = input.size(3) + 2 * padding[1] - (kernel - 1) * dilation[1];
  PYSEG_CHECK(h >= 0 && w >= 0, op, ": output size would be [", h, ", ", w, "]: input [", input.size(2), ", ",
              input.size(3), "] is too small for dilation ", dilation, " and padding ", padding);
  return {input.size(0), out, h, w};
}

}  // namespace pyseg::atrous
