// lovasz_statistics on CUDA devices: allocation, launches plane by plane, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "loss/lovasz_cuda.h"
#include "loss/segmentation_maps_cuda.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> lovasz_statistics(Tensor logits, Tensor target, std::string activation, OptInt ignore_index,
                                             bool per_image) {
  constexpr const char* kOp = "lovasz_statistics";
  check_logits(kOp, logits);
  LovaszPlane plane = {};
  plane.hinge = activation == "hinge";
  CudaMaps maps(kOp, logits, target, plane.hinge ? "none" : activation, ignore_index);
  SegmentationArgs& a = maps.args;
  plane.images = per_image ? 1 : a.images;
  const int64_t groups = per_image ? a.images : 1, elements = plane.images * a.pixels;
  PYSEG_CHECK(elements < int64_t{1} << 30, kOp, ": a class must have fewer than 2^30 pixels, got logits ",
              logits.sizes());
  const CudaLaunches launches(kOp, logits);
  const ScalarType number = wide_dtype(logits);
  const Tensor grad = new_like(logits, a.channels_last, number);
  if (grad.numel() == 0) return {torch::stable::new_zeros(logits, {groups, a.classes}, ScalarType::Double), grad};
  const Tensor loss = torch::stable::new_empty(logits, {groups, a.classes}, ScalarType::Double);
  const bool wide = a.logits_type == Element::kDouble;
  const int64_t blocks = lovasz_blocks(elements);

  // 1. Memory.
  std::vector<Tensor> pairs;  // keys and pixels, twice
  for (int i = 0; i < 2; ++i) {
    pairs.push_back(torch::stable::new_empty(logits, {elements}, wide ? ScalarType::Long : ScalarType::Int));
    plane.keys[i] = pairs.back().data_ptr();
    pairs.push_back(torch::stable::new_empty(logits, {elements}, ScalarType::Int));
    plane.pixels[i] = static_cast<uint32_t*>(pairs.back().data_ptr());
  }
  const Tensor before = torch::stable::new_empty(logits, {elements}, ScalarType::Int);
  const Tensor partial = torch::stable::new_empty(logits, {groups * a.classes, blocks}, ScalarType::Double);
  const int64_t normalisers = a.activation == Activation::kSoftmax ? a.images * a.pixels : 0;
  const Tensor most = torch::stable::new_empty(logits, {normalisers}, number);
  const Tensor scale = torch::stable::new_empty(logits, {normalisers}, number);
  plane.before = static_cast<uint32_t*>(before.data_ptr());
  plane.most = most.data_ptr();
  plane.scale = scale.data_ptr();
  size_t bytes = 0;
  launches.check(launch_sort(plane, wide, nullptr, bytes, elements, launches.stream()));
  const Tensor temporary = torch::stable::new_empty(logits, {int64_t(bytes)}, ScalarType::Byte);

  // 2. What all classes of a pixel share, then one plane after the other.
  maps.set_result(grad);
  if (normalisers > 0) launches.check(launch_normalise(a, most.data_ptr(), scale.data_ptr(), launches.stream()));
  for (int64_t i = 0; i < groups * a.classes; ++i) {
    plane.first = i / a.classes;
    plane.c = static_cast<int>(i % a.classes);
    plane.partial = static_cast<double*>(partial.data_ptr()) + i * blocks;
    launches.check(launch_keys(a, plane, launches.stream()));
    launches.check(launch_sort(plane, wide, temporary.data_ptr(), bytes, elements, launches.stream()));
    launches.check(launch_slopes(a, plane, launches.stream()));
  }
  launches.check(launch_loss(static_cast<const double*>(partial.data_ptr()), static_cast<double*>(loss.data_ptr()),
                             groups * a.classes, blocks, launches.stream()));
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) { m.impl("lovasz_statistics", TORCH_BOX(&lovasz_statistics)); }

}  // namespace pyseg::loss
