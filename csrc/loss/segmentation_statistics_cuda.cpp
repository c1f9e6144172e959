// The operators on segmentation maps on CUDA devices: allocation, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "loss/segmentation_maps_cuda.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- segmentation_statistics

CudaMaps read_statistics(const char* op, const Tensor& logits, const Tensor& target, const OptTensor& pixel_weight,
                         const std::string& activation, OptInt ignore_index, double gamma, bool region, bool pixel,
                         bool smoothing) {
  check_logits(op, logits);
  check_weight(op, "pixel_weight", pixel_weight, logits, sizes_of_pixels(logits));
  check_gamma(op, gamma);
  CudaMaps maps(op, logits, target, activation, ignore_index);
  maps.set_weight(pixel_weight, logits.dim());
  maps.args.gamma = gamma;
  maps.args.region = region;
  maps.args.pixel = pixel;
  maps.args.smoothing = smoothing;
  return maps;
}

std::tuple<Tensor, Tensor> segmentation_statistics(Tensor logits, Tensor target, OptTensor pixel_weight,
                                                   std::string activation, OptInt ignore_index, double gamma,
                                                   bool region, bool pixel, bool smoothing) {
  constexpr const char* kOp = "segmentation_statistics";
  CudaMaps maps =
      read_statistics(kOp, logits, target, pixel_weight, activation, ignore_index, gamma, region, pixel, smoothing);
  SegmentationArgs& a = maps.args;
  const Tensor log_sum = new_log_sum(logits, a.activation, a.dense);
  if (a.images == 0 || a.pixels == 0)
    return {torch::stable::new_zeros(logits, {a.images, a.classes, kStatistics}, ScalarType::Double), log_sum};
  const CudaLaunches launches(kOp, logits);
  Tensor out = torch::stable::new_empty(logits, {a.images, a.classes, kStatistics}, ScalarType::Double);
  const Tensor partial =
      torch::stable::new_empty(logits, {a.images * units_of_image(a), a.classes, kStatistics}, ScalarType::Double);
  a.partial = static_cast<double*>(partial.data_ptr());
  a.statistics = static_cast<double*>(out.data_ptr());
  launches.check(launch_statistics(a, launches.stream()));
  return {out, log_sum};
}

Tensor segmentation_statistics_backward(Tensor grad, Tensor logits, Tensor target, OptTensor pixel_weight,
                                        std::string activation, OptInt ignore_index, double gamma, bool region,
                                        bool pixel, bool smoothing, Tensor log_sum) {
  constexpr const char* kOp = "_segmentation_statistics_backward";
  CudaMaps maps =
      read_statistics(kOp, logits, target, pixel_weight, activation, ignore_index, gamma, region, pixel, smoothing);
  check_grad(kOp, grad, logits);
  check_log_sum(kOp, log_sum, logits);
  const CudaLaunches launches(kOp, logits);
  const Tensor out = new_like(logits, maps.args.channels_last);
  if (out.numel() == 0) return out;
  maps.set_grad(grad);
  maps.set_result(out);
  launches.check(launch_backward(maps.args, launches.stream()));
  return out;
}

// --- pixel_cross_entropy

CudaMaps read_pixel_loss(const char* op, const Tensor& logits, const Tensor& target, const OptTensor& class_weight,
                         const std::string& activation, OptInt ignore_index, double gamma, double label_smoothing) {
  check_pixel_cross_entropy(op, logits, class_weight, gamma, label_smoothing);
  CudaMaps maps(op, logits, target, activation, ignore_index);
  SegmentationArgs& a = maps.args;
  const PixelLossTerms terms = pixel_loss_terms(op, a.activation, a.dense, a.classes, gamma, label_smoothing);
  a.gamma = gamma;
  a.pixel = true;
  a.smoothing = terms.nll != 0;
  a.target_scale = terms.target_scale;
  a.target_shift = terms.target_shift;
  a.of_pos = terms.pos;
  a.of_neg = 1;
  a.of_nll = terms.nll;
  maps.set_class_weight(class_weight);
  return maps;
}

std::tuple<Tensor, Tensor> pixel_cross_entropy(Tensor logits, Tensor target, OptTensor class_weight,
                                               std::string activation, OptInt ignore_index, double gamma,
                                               double label_smoothing) {
  constexpr const char* kOp = "pixel_cross_entropy";
  CudaMaps maps = read_pixel_loss(kOp, logits, target, class_weight, activation, ignore_index, gamma, label_smoothing);
  const CudaLaunches launches(kOp, logits);
  const Tensor out = new_pixel_loss(logits, maps.args.activation, maps.args.channels_last);
  const Tensor log_sum = new_log_sum(logits, maps.args.activation, maps.args.dense);
  if (out.numel() == 0) return {out, log_sum};
  maps.set_result(out);
  launches.check(launch_pixel_loss(maps.args, launches.stream()));
  return {out, log_sum};
}

Tensor pixel_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, OptTensor class_weight,
                                    std::string activation, OptInt ignore_index, double gamma, double label_smoothing,
                                    Tensor log_sum) {
  constexpr const char* kOp = "_pixel_cross_entropy_backward";
  CudaMaps maps = read_pixel_loss(kOp, logits, target, class_weight, activation, ignore_index, gamma, label_smoothing);
  check_weight(kOp, "grad", grad, logits,
               maps.args.activation == Activation::kSoftmax ? sizes_of_pixels(logits) : sizes_of(logits));
  check_log_sum(kOp, log_sum, logits);
  maps.set_weight(grad, logits.dim());
  const CudaLaunches launches(kOp, logits);
  const Tensor out = new_like(logits, maps.args.channels_last);
  if (out.numel() == 0) return out;
  maps.set_result(out);
  launches.check(launch_backward(maps.args, launches.stream()));
  return out;
}

// --- _activation_vjp: the gradient of the statistic sum(p * g) with grad_p for a target

Tensor activation_vjp(Tensor grad_p, Tensor logits, Tensor scale, std::string activation) {
  check_vjp(grad_p, logits, scale);
  CudaMaps maps(kVjp, logits, grad_p, activation, std::nullopt);
  maps.args.region = true;
  maps.set_scale(scale);
  const CudaLaunches launches(kVjp, logits);
  const Tensor out = new_like(logits, maps.args.channels_last);
  if (out.numel() == 0) return out;
  maps.set_result(out);
  launches.check(launch_backward(maps.args, launches.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("segmentation_statistics", TORCH_BOX(&segmentation_statistics));
  m.impl("_segmentation_statistics_backward", TORCH_BOX(&segmentation_statistics_backward));
  m.impl("pixel_cross_entropy", TORCH_BOX(&pixel_cross_entropy));
  m.impl("_pixel_cross_entropy_backward", TORCH_BOX(&pixel_cross_entropy_backward));
  m.impl("_activation_vjp", TORCH_BOX(&activation_vjp));
}

}  // namespace pyseg::loss
