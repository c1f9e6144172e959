// point_supervision_loss on the CPU: layouts, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "loss/point_supervision_check.h"
#include "loss/point_supervision_loss_cpu_kernel.h"
#include "loss/segmentation_cpu.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const PointSupervisionKernels& kernels() { return PYSEG_CPU_TABLE(point_supervision_kernels); }

// The operators' arguments as the kernels take them.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& logits, const Tensor& target, const OptTensor& point_weight,
            const OptTensor& objectness, const Ints& background, OptInt ignore_index)
      : maps((check_point_supervision(op, logits, target, point_weight, objectness), op), logits, target, "softmax",
             ignore_index),
        objects_(objects_of(op, background, logits.size(1))) {
    maps.set_weight(point_weight);
    maps.input.pixel = true;  // weights are looked at
    input.is_object = objects_.data();
    if (objectness) {
      objectness_ = torch::stable::contiguous(*objectness);
      input.objectness = map_of(*objectness_);
    }
    input.maps = maps.input;
  }

  template <typename F>
  void run(const F& f) const {
    maps.run(f, [&](int64_t workers) { return kernels().workspace(input, workers); }, INT64_MAX);
  }

  SegmentationMaps maps;
  PointSupervisionInput input{};

 private:
  std::vector<uint8_t> objects_;
  OptTensor objectness_;
};

std::tuple<Tensor, Tensor> point_supervision_loss(Tensor logits, Tensor target, OptTensor point_weight,
                                                  OptTensor objectness, OptTensor image_labels, Ints background,
                                                  OptInt ignore_index) {
  constexpr const char* kOp = "point_supervision_loss";
  Arguments a(kOp, logits, target, point_weight, objectness, background, ignore_index);
  const int64_t images = logits.size(0), classes = logits.size(1);
  OptTensor labels;
  if (image_labels) {
    labels = checked_image_labels(kOp, *image_labels, logits);
    a.input.image_labels = data<int64_t>(*labels);
  }
  const Tensor terms = torch::stable::new_zeros(logits, {images, kPointTerms}, ScalarType::Double);
  const Tensor kept = torch::stable::new_zeros(logits, {images, classes, kPointKept}, ScalarType::Double);
  if (logits.numel() == 0) return {terms, kept};
  const Tensor partial = torch::stable::new_empty(logits, {kernels().partials(a.input)}, ScalarType::Double);
  a.run([&](const SegmentationRun& run) {
    kernels().forward(a.input, data<double>(partial), data<double>(terms), data<double>(kept), run);
  });
  return {terms, kept};
}

Tensor point_supervision_loss_backward(Tensor grad, Tensor logits, Tensor target, OptTensor point_weight,
                                       OptTensor objectness, Ints background, OptInt ignore_index, Tensor kept) {
  constexpr const char* kOp = "_point_supervision_loss_backward";
  const Arguments a(kOp, logits, target, point_weight, objectness, background, ignore_index);
  check_doubles(kOp, "grad", grad, logits, {logits.size(0), kPointTerms});
  check_doubles(kOp, "kept", kept, logits, {logits.size(0), logits.size(1), kPointKept});
  const Tensor out = new_like(logits, a.input.maps.logits.channels_last);
  if (out.numel() == 0) return out;
  const Tensor rows = torch::stable::contiguous(grad), best = torch::stable::contiguous(kept);
  a.run([&](const SegmentationRun& run) {
    kernels().backward(a.input, data<double>(rows), data<double>(best), out.data_ptr(), run);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("point_supervision_loss", TORCH_BOX(&point_supervision_loss));
  m.impl("_point_supervision_loss_backward", TORCH_BOX(&point_supervision_loss_backward));
}

}  // namespace pyseg::loss
