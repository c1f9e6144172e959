// lovasz_statistics on the CPU: layouts, threads, registration. Planes (a class of an image or of all) are shared out
// among the threads; each holds two records of 8 bytes (float64: 16) an element of one plane.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "loss/lovasz_cpu_kernel.h"
#include "loss/segmentation_cpu.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const LovaszKernels& lovasz_kernels() { return PYSEG_CPU_TABLE(lovasz_kernels); }

std::tuple<Tensor, Tensor> lovasz_statistics(Tensor logits, Tensor target, std::string activation, OptInt ignore_index,
                                             bool per_image) {
  constexpr const char* kOp = "lovasz_statistics";
  check_logits(kOp, logits);
  const bool hinge = activation == "hinge";
  const SegmentationMaps maps(kOp, logits, target, hinge ? "none" : activation, ignore_index);
  const SegmentationInput& in = maps.input;
  const int64_t groups = per_image ? in.images : 1;
  PYSEG_CHECK(in.pixels * (per_image ? 1 : in.images) < kMostLovaszPixels, kOp,
              ": a class must have fewer than 2^30 pixels, got logits ", logits.sizes());
  Tensor loss = torch::stable::new_zeros(logits, {groups, in.classes}, ScalarType::Double);
  Tensor grad = new_like(logits, in.logits.channels_last, wide_dtype(logits));
  if (grad.numel() == 0) return {loss, grad};
  maps.run(
      [&](const SegmentationRun& run) {
        lovasz_kernels().run(in, per_image, hinge, data<double>(loss), grad.data_ptr(), run);
      },
      [&](int64_t workers) { return lovasz_kernels().workspace(in, per_image, workers); }, groups * in.classes);
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("lovasz_statistics", TORCH_BOX(&lovasz_statistics)); }

}  // namespace pyseg::loss
