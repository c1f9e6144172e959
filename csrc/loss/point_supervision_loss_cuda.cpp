// point_supervision_loss on CUDA devices: allocation, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "loss/point_supervision_check.h"
#include "loss/point_supervision_cuda.h"
#include "loss/segmentation_maps_cuda.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The operators' arguments as the kernels take them.
struct Arguments {
  CudaMaps maps;
  PointSupervisionArgs points{};
  OptTensor objectness;

  Arguments(const char* op, const Tensor& logits, const Tensor& target, const OptTensor& point_weight,
            const OptTensor& given_objectness, const Ints& background, OptInt ignore_index)
      : maps((check_point_supervision(op, logits, target, point_weight, given_objectness), op), logits, target,
             "softmax", ignore_index) {
    maps.set_weight(point_weight, logits.dim());
    const std::vector<uint8_t> objects = objects_of(op, background, logits.size(1));
    for (size_t c = 0; c < objects.size(); ++c) points.objects[c / 32] |= uint32_t{objects[c]} << (c % 32);
    if (!given_objectness) return;
    objectness = torch::stable::contiguous(*given_objectness);
    points.objectness = objectness->data_ptr();
    points.objectness_type = *element_of(*objectness);
  }
};

double* doubles(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

std::tuple<Tensor, Tensor> point_supervision_loss(Tensor logits, Tensor target, OptTensor point_weight,
                                                  OptTensor objectness, OptTensor image_labels, Ints background,
                                                  OptInt ignore_index) {
  constexpr const char* kOp = "point_supervision_loss";
  Arguments arguments(kOp, logits, target, point_weight, objectness, background, ignore_index);
  const SegmentationArgs& a = arguments.maps.args;
  PointSupervisionArgs& p = arguments.points;
  OptTensor labels;
  if (image_labels) {
    labels = checked_image_labels(kOp, *image_labels, logits);
    p.image_labels = static_cast<const int64_t*>(labels->data_ptr());
  }
  const Ints sizes{a.images, kPointTerms}, kept_sizes{a.images, a.classes, kPointKept};
  if (logits.numel() == 0)
    return {torch::stable::new_zeros(logits, sizes, ScalarType::Double),
            torch::stable::new_zeros(logits, kept_sizes, ScalarType::Double)};
  const CudaLaunches launches(kOp, logits);
  const Tensor terms = torch::stable::new_empty(logits, sizes, ScalarType::Double);
  const Tensor kept = torch::stable::new_empty(logits, kept_sizes, ScalarType::Double);
  const int64_t blocks = a.images * units_of_image(a);
  const Tensor best = torch::stable::new_empty(logits, {blocks, a.classes, kPointBest}, ScalarType::Double);
  const Tensor rest = torch::stable::new_empty(logits, {blocks, kPointRest}, ScalarType::Double);
  p.best = doubles(best);
  p.rest = doubles(rest);
  p.kept = doubles(kept);
  p.terms = doubles(terms);
  launches.check(launch_point_supervision(a, p, launches.stream()));
  return {terms, kept};
}

Tensor point_supervision_loss_backward(Tensor grad, Tensor logits, Tensor target, OptTensor point_weight,
                                       OptTensor objectness, Ints background, OptInt ignore_index, Tensor kept) {
  constexpr const char* kOp = "_point_supervision_loss_backward";
  Arguments arguments(kOp, logits, target, point_weight, objectness, background, ignore_index);
  check_doubles(kOp, "grad", grad, logits, {logits.size(0), kPointTerms});
  check_doubles(kOp, "kept", kept, logits, {logits.size(0), logits.size(1), kPointKept});
  const CudaLaunches launches(kOp, logits);
  const Tensor out = new_like(logits, arguments.maps.args.channels_last);
  if (out.numel() == 0) return out;
  const Tensor rows = torch::stable::contiguous(grad), best = torch::stable::contiguous(kept);
  arguments.points.grad = doubles(rows);
  arguments.points.kept = doubles(best);
  arguments.maps.set_result(out);
  launches.check(launch_point_supervision_backward(arguments.maps.args, arguments.points, launches.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("point_supervision_loss", TORCH_BOX(&point_supervision_loss));
  m.impl("_point_supervision_loss_backward", TORCH_BOX(&point_supervision_loss_backward));
}

}  // namespace pyseg::loss
