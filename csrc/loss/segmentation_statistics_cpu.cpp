// segmentation_statistics on the CPU: layouts, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "loss/segmentation_cpu.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kForward = "segmentation_statistics";
constexpr const char* kBackward = "_segmentation_statistics_backward";

SegmentationMaps read_arguments(const char* op, const Tensor& logits, const Tensor& target,
                                const OptTensor& pixel_weight, const std::string& activation, OptInt ignore_index,
                                double gamma, bool region, bool pixel, bool smoothing) {
  check_logits(op, logits);
  check_weight(op, "pixel_weight", pixel_weight, logits, sizes_of_pixels(logits));
  check_gamma(op, gamma);
  SegmentationMaps maps(op, logits, target, activation, ignore_index);
  maps.set_weight(pixel_weight);
  maps.input.gamma = gamma;
  maps.input.region = region;
  maps.input.pixel = pixel;
  maps.input.smoothing = smoothing;
  return maps;
}

std::tuple<Tensor, Tensor> segmentation_statistics(Tensor logits, Tensor target, OptTensor pixel_weight,
                                                   std::string activation, OptInt ignore_index, double gamma,
                                                   bool region, bool pixel, bool smoothing) {
  SegmentationMaps maps =
      read_arguments(kForward, logits, target, pixel_weight, activation, ignore_index, gamma, region, pixel, smoothing);
  const SegmentationInput& in = maps.input;
  Tensor out = torch::stable::new_empty(logits, {in.images, in.classes, kStatistics}, ScalarType::Double);
  const Tensor log_sum = new_log_sum(logits, in.activation, in.dense);
  if (out.numel() == 0) return {out, log_sum};
  maps.set_log_sum(log_sum);
  const Tensor partial = torch::stable::new_empty(
      logits, {segmentation_kernels().partials(in), in.classes, kStatistics}, ScalarType::Double);
  maps.run([&](const SegmentationRun& run) {
    segmentation_kernels().statistics(in, data<double>(partial), data<double>(out), run);
  });
  return {out, log_sum};
}

Tensor segmentation_statistics_backward(Tensor grad, Tensor logits, Tensor target, OptTensor pixel_weight,
                                        std::string activation, OptInt ignore_index, double gamma, bool region,
                                        bool pixel, bool smoothing, Tensor log_sum) {
  SegmentationMaps maps = read_arguments(kBackward, logits, target, pixel_weight, activation, ignore_index, gamma,
                                         region, pixel, smoothing);
  const SegmentationInput& in = maps.input;
  check_grad(kBackward, grad, logits);
  check_log_sum(kBackward, log_sum, logits);
  maps.set_log_sum(log_sum);
  Tensor out = new_like(logits, in.logits.channels_last);
  if (out.numel() == 0) return out;
  const Tensor rows = torch::stable::contiguous(grad);
  maps.run([&](const SegmentationRun& run) {
    segmentation_kernels().backward(in, data<double>(rows), in.classes * kStatistics, out.data_ptr(), run);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("segmentation_statistics", TORCH_BOX(&segmentation_statistics));
  m.impl("_segmentation_statistics_backward", TORCH_BOX(&segmentation_statistics_backward));
}

}  // namespace pyseg::loss
