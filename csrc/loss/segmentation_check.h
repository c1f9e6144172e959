// Checks of the arguments of the operators on segmentation maps, the same on every device, and what they have in
// common.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/element.h"
#include "common/tensor_arguments.h"
#include "loss/segmentation_math.h"

namespace pyseg::loss {

using OptTensor = std::optional<torch::stable::Tensor>;
using OptInt = std::optional<int64_t>;

inline std::optional<Element> element_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Bool:
    case ScalarType::Byte: return Element::kUInt8;
    case ScalarType::Char: return Element::kInt8;
    case ScalarType::Short: return Element::kInt16;
    case ScalarType::Int: return Element::kInt32;
    case ScalarType::Long: return Element::kInt64;
    default: return std::nullopt;
  }
}

inline bool is_float(Element e) { return e <= Element::kBFloat16; }

inline void check_same_device(const char* op, const char* name, const torch::stable::Tensor& t,
                              const torch::stable::Tensor& logits) {
  PYSEG_CHECK(t.is_cuda() == logits.is_cuda() && t.get_device_index() == logits.get_device_index(), op, ": ", name,
              " must be on the device of logits");
}

inline Activation activation_of(const char* op, const std::string& name) {
  if (name == "softmax") return Activation::kSoftmax;
  if (name == "sigmoid") return Activation::kSigmoid;
  PYSEG_CHECK(name == "none", op, ": activation must be softmax, sigmoid or none, got ", name);
  return Activation::kNone;
}

inline void check_logits(const char* op, const torch::stable::Tensor& logits) {
  PYSEG_CHECK(logits.dim() >= 3 && logits.dim() <= 5, op,
              ": logits must be [N, C, *S] with S of 1 to 3 dimensions, got ", logits.sizes());
  const auto type = element_of(logits);
  PYSEG_CHECK(type && is_float(*type), op, ": logits must be float32, float64, float16 or bfloat16, got ",
              dtype_name(logits));
  PYSEG_CHECK(logits.size(1) > 0 && logits.size(1) < (int64_t{1} << 24), op,
              ": logits must have 1 to 2^24 classes, got ", logits.sizes());
}

// [N, *S]
inline Ints sizes_of_pixels(const torch::stable::Tensor& logits) {
  Ints sizes = sizes_of(logits);
  sizes.erase(sizes.begin() + 1);
  return sizes;
}

// Whether the target is dense, [N, C, *S].
inline bool check_target(const char* op, const torch::stable::Tensor& target, const torch::stable::Tensor& logits) {
  const auto type = element_of(target);
  PYSEG_CHECK(type, op, ": target must be of numbers or bool, got ", dtype_name(target));
  check_same_device(op, "target", target, logits);
  const Ints pixels = sizes_of_pixels(logits);
  if (sizes_of(target) == sizes_of(logits)) return true;
  PYSEG_CHECK(sizes_of(target) == pixels, op, ": target must be labels ", pixels, " or dense ", logits.sizes(),
              ", got ", target.sizes());
  PYSEG_CHECK(!is_float(*type), op, ": target must be of integers or bool where it is labels ", pixels, ", got ",
              dtype_name(target));
  return false;
}

inline void check_weight(const char* op, const char* name, const OptTensor& weight, const torch::stable::Tensor& logits,
                         const Ints& sizes) {
  if (!weight) return;
  const auto type = element_of(*weight);
  PYSEG_CHECK(type && is_float(*type), op, ": ", name, " must be of floating point, got ", dtype_name(*weight));
  check_same_device(op, name, *weight, logits);
  PYSEG_CHECK(sizes_of(*weight) == sizes, op, ": ", name, " must be ", sizes, ", got ", weight->sizes());
}

inline void check_gamma(const char* op, double gamma) {
  PYSEG_CHECK(gamma >= 0 && gamma <= 1e6, op, ": gamma must be a number >= 0, got ", gamma);
}

inline void check_grad(const char* op, const torch::stable::Tensor& grad, const torch::stable::Tensor& logits) {
  const Ints expected{logits.size(0), logits.size(1), kStatistics};
  PYSEG_CHECK(grad.scalar_type() == torch::headeronly::ScalarType::Double, op, ": grad must be float64, got ",
              dtype_name(grad));
  check_same_device(op, "grad", grad, logits);
  PYSEG_CHECK(sizes_of(grad) == expected, op, ": grad must be ", expected, ", got ", grad.sizes());
}

inline int64_t pixels_of(const torch::stable::Tensor& logits) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < logits.dim(); ++d) pixels *= logits.size(d);
  return pixels;
}

// Whether [N, C, *S] lies in memory as [N, *S, C] without gaps, and not as [N, C, *S].
inline bool is_dense_channels_last(const torch::stable::Tensor& t) {
  if (t.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t i = 0; i < t.dim(); ++i) {
    const int64_t d = i == 0 ? 1 : i == t.dim() - 1 ? 0 : t.dim() - i;
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// [N, C, *S], in the memory format of the logits where torch has a name for it.
inline torch::stable::Tensor new_like(const torch::stable::Tensor& logits, bool channels_last,
                                      std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  using torch::headeronly::MemoryFormat;
  const MemoryFormat format = !channels_last      ? MemoryFormat::Contiguous
                              : logits.dim() == 4 ? MemoryFormat::ChannelsLast
                                                  : MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(sizes_of(logits), dtype.value_or(logits.scalar_type()), std::nullopt, logits.device(),
                              std::nullopt, format);
}

inline torch::stable::Tensor as_double(const torch::stable::Tensor& t) {
  return torch::stable::contiguous(torch::stable::to(t, torch::headeronly::ScalarType::Double));
}

// Maps that are in neither memory format are copied. Maps of one spatial dimension have no channels_last.
inline torch::stable::Tensor in_a_format(const torch::stable::Tensor& t) {
  return t.dim() > 3 && is_dense_channels_last(t) ? t : torch::stable::contiguous(t);
}

// --- What the forward pass of a softmax with labels keeps for the backward pass on the CPU

// From this many classes the logarithms of the sums take at most 1/20 of the gradient's memory.
constexpr int64_t kLogSumClasses = 20;

// float64 for float64 logits, else float32.
inline torch::headeronly::ScalarType wide_dtype(const torch::stable::Tensor& logits) {
  using torch::headeronly::ScalarType;
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// [N, *S], or [0] where none are kept.
inline torch::stable::Tensor new_log_sum(const torch::stable::Tensor& logits, Activation activation, bool dense) {
  const bool kept =
      !logits.is_cuda() && activation == Activation::kSoftmax && !dense && logits.size(1) >= kLogSumClasses;
  return torch::stable::new_empty(logits, kept ? sizes_of_pixels(logits) : Ints{0}, wide_dtype(logits));
}

inline void check_log_sum(const char* op, const torch::stable::Tensor& log_sum, const torch::stable::Tensor& logits) {
  check_same_device(op, "log_sum", log_sum, logits);
  PYSEG_CHECK(log_sum.scalar_type() == wide_dtype(logits), op, ": log_sum must be ",
              logits.scalar_type() == torch::headeronly::ScalarType::Double ? "float64" : "float32", ", got ",
              dtype_name(log_sum));
  PYSEG_CHECK(sizes_of(log_sum) == Ints{0} || (sizes_of(log_sum) == sizes_of_pixels(logits) && log_sum.is_contiguous()),
              op, ": log_sum must be contiguous ", sizes_of_pixels(logits), " or [0], got ", log_sum.sizes());
}

// --- pixel_cross_entropy

inline void check_pixel_cross_entropy(const char* op, const torch::stable::Tensor& logits,
                                      const OptTensor& class_weight, double gamma, double label_smoothing) {
  check_logits(op, logits);
  check_weight(op, "class_weight", class_weight, logits, {logits.size(1)});
  check_gamma(op, gamma);
  PYSEG_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing must be from 0 to 1, got ",
              label_smoothing);
}

// The loss of a pixel in the terms of segmentation_math.h: pos * POS + NEG + nll * sum(NLL), times the classes'
// weights, of targets target_scale * g + target_shift.
struct PixelLossTerms {
  double pos, nll, target_scale, target_shift;
};

inline PixelLossTerms pixel_loss_terms(const char* op, Activation activation, bool dense, int64_t classes, double gamma,
                                       double smoothing) {
  if (activation != Activation::kSoftmax) return {1, 0, 1 - smoothing, smoothing / 2};
  if (dense) return {1, 0, 1 - smoothing, smoothing / double(classes)};
  PYSEG_CHECK(gamma == 0 || smoothing == 0, op,
              ": label_smoothing must be 0 where gamma is not, for softmax and labels, got ", smoothing,
              " and gamma = ", gamma);
  return {1 - smoothing, smoothing / double(classes), 1, 0};
}

inline torch::stable::Tensor new_pixel_loss(const torch::stable::Tensor& logits, Activation activation,
                                            bool channels_last) {
  if (activation != Activation::kSoftmax) return new_like(logits, channels_last, wide_dtype(logits));
  return torch::stable::new_empty(logits, sizes_of_pixels(logits), wide_dtype(logits));
}

// --- _activation_vjp

constexpr const char* kVjp = "_activation_vjp";

inline void check_vjp(const torch::stable::Tensor& grad_p, const torch::stable::Tensor& logits,
                      const torch::stable::Tensor& scale) {
  check_logits(kVjp, logits);
  check_weight(kVjp, "grad_p", grad_p, logits, sizes_of(logits));
  check_weight(kVjp, "scale", scale, logits, {logits.size(0), logits.size(1)});
}

}  // namespace pyseg::loss
