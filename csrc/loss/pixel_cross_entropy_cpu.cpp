// pixel_cross_entropy on the CPU: layouts, threads, registration. The backward pass is that of segmentation_statistics,
// the incoming gradient the weight of every pixel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "loss/segmentation_cpu.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The operator's arguments for the kernels: maps, and the factors of the terms POS, NEG and NLL.
struct Arguments {
  SegmentationMaps maps;
  std::vector<double> factors;  // [C, kStatistics]

  Arguments(const char* op, const Tensor& logits, const Tensor& target, const OptTensor& class_weight,
            const std::string& activation, OptInt ignore_index, double gamma, double label_smoothing)
      : maps((check_pixel_cross_entropy(op, logits, class_weight, gamma, label_smoothing), op), logits, target,
             activation, ignore_index) {
    SegmentationInput& in = maps.input;
    const PixelLossTerms terms = pixel_loss_terms(op, in.activation, in.dense, in.classes, gamma, label_smoothing);
    in.gamma = gamma;
    in.pixel = true;
    in.smoothing = terms.nll != 0;
    in.target_scale = terms.target_scale;
    in.target_shift = terms.target_shift;
    OptTensor weights;
    if (class_weight) weights = as_double(*class_weight);
    factors.resize(in.classes * kStatistics);
    for (int64_t c = 0; c < in.classes; ++c) {
      const double w = weights ? data<double>(*weights)[c] : 1;
      factors[c * kStatistics + kPos] = w * terms.pos;
      factors[c * kStatistics + kNeg] = w;
      factors[c * kStatistics + kNll] = w * terms.nll;
    }
  }
};

std::tuple<Tensor, Tensor> pixel_cross_entropy(Tensor logits, Tensor target, OptTensor class_weight,
                                               std::string activation, OptInt ignore_index, double gamma,
                                               double label_smoothing) {
  Arguments a("pixel_cross_entropy", logits, target, class_weight, activation, ignore_index, gamma, label_smoothing);
  const SegmentationInput& in = a.maps.input;
  Tensor out = new_pixel_loss(logits, in.activation, in.logits.channels_last);
  const Tensor log_sum = new_log_sum(logits, in.activation, in.dense);
  if (out.numel() == 0) return {out, log_sum};
  a.maps.set_log_sum(log_sum);
  a.maps.run([&](const SegmentationRun& run) {
    segmentation_kernels().pixel_loss(in, a.factors.data(), out.data_ptr(), run);
  });
  return {out, log_sum};
}

Tensor pixel_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, OptTensor class_weight,
                                    std::string activation, OptInt ignore_index, double gamma, double label_smoothing,
                                    Tensor log_sum) {
  constexpr const char* kOp = "_pixel_cross_entropy_backward";
  Arguments a(kOp, logits, target, class_weight, activation, ignore_index, gamma, label_smoothing);
  const SegmentationInput& in = a.maps.input;
  check_weight(kOp, "grad", grad, logits,
               in.activation == Activation::kSoftmax ? sizes_of_pixels(logits) : sizes_of(logits));
  check_log_sum(kOp, log_sum, logits);
  a.maps.set_weight(grad);
  a.maps.set_log_sum(log_sum);
  Tensor out = new_like(logits, in.logits.channels_last);
  if (out.numel() == 0) return out;
  a.maps.run([&](const SegmentationRun& run) {
    segmentation_kernels().backward(in, a.factors.data(), 0, out.data_ptr(), run);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("pixel_cross_entropy", TORCH_BOX(&pixel_cross_entropy));
  m.impl("_pixel_cross_entropy_backward", TORCH_BOX(&pixel_cross_entropy_backward));
}

}  // namespace pyseg::loss
