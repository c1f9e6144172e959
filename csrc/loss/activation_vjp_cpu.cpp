// _activation_vjp on the CPU: the gradient of the statistic sum(p * g) with grad_p for a target.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "loss/segmentation_cpu.h"

namespace pyseg::loss {
namespace {

using torch::stable::Tensor;

Tensor activation_vjp(Tensor grad_p, Tensor logits, Tensor scale, std::string activation) {
  check_vjp(grad_p, logits, scale);
  SegmentationMaps maps(kVjp, logits, grad_p, activation, std::nullopt);
  maps.input.region = true;
  const SegmentationInput& in = maps.input;
  Tensor out = new_like(logits, in.logits.channels_last);
  if (out.numel() == 0) return out;
  const Tensor scales = as_double(scale);
  std::vector<double> table(in.images * in.classes * kStatistics);
  for (int64_t i = 0; i < in.images * in.classes; ++i) table[i * kStatistics + kPG] = data<double>(scales)[i];
  maps.run([&](const SegmentationRun& run) {
    segmentation_kernels().backward(in, table.data(), in.classes * kStatistics, out.data_ptr(), run);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("_activation_vjp", TORCH_BOX(&activation_vjp)); }

}  // namespace pyseg::loss
