// _hausdorff_dt on the CPU: checks, layouts, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "distance/distance_transform_check.h"
#include "loss/hausdorff_dt_cpu_kernel.h"
#include "loss/segmentation_cpu.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "_hausdorff_dt";

std::tuple<Tensor, Tensor> hausdorff_dt(Tensor logits, Tensor target, std::vector<int64_t> classes,
                                        std::vector<double> spacing, bool one_sided) {
  check_logits(kOp, logits);
  PYSEG_CHECK(target.scalar_type() == ScalarType::Byte && target.dim() == logits.dim() - 1, kOp,
              ": target must be uint8 labels ", sizes_of_pixels(logits), ", got ", dtype_name(target), " ",
              target.sizes());
  const SegmentationMaps maps(kOp, logits, target, "softmax", std::nullopt);
  HausdorffInput in{};
  in.maps = maps.input;
  PYSEG_CHECK(in.maps.classes <= 255, kOp, ": logits must have up to 255 classes, got ", logits.sizes());
  PYSEG_CHECK(int64_t(spacing.size()) == logits.dim() - 2, kOp, ": spacing must have ", logits.dim() - 2,
              " values, got ", spacing);
  for (const int64_t c : classes)
    PYSEG_CHECK(c >= 0 && c < in.maps.classes, kOp, ": classes must be from 0 to ", in.maps.classes - 1, ", got ",
                classes);
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const distance::Grid grid = distance::check_grid(kOp, "logits", logits, spacing, wide);
  in.classes = classes.data();
  in.chosen = int64_t(classes.size());
  in.dims = grid.dims;
  for (int axis = 0; axis < 3; ++axis) {
    in.sizes[axis] = grid.sizes[axis];
    in.spacing[axis] = grid.spacing[axis];
  }
  in.one_sided = one_sided;
  const Tensor loss = torch::stable::new_zeros(logits, {in.maps.images, in.maps.classes}, ScalarType::Double);
  const ScalarType number = wide ? ScalarType::Double : ScalarType::Float;
  std::vector<bool> listed(in.maps.classes);
  for (const int64_t c : classes) listed[c] = true;
  const bool all = std::find(listed.begin(), listed.end(), false) == listed.end();
  const Tensor error = all ? torch::stable::new_empty(logits, sizes_of(logits), number)
                           : torch::stable::new_zeros(logits, sizes_of(logits), number);
  if (error.numel() == 0) return {loss, error};
  maps.run(
      [&](const SegmentationRun& run) {
        PYSEG_CPU_TABLE(hausdorff_kernels).run(in, data<double>(loss), error.data_ptr(), run);
      },
      [&](int64_t workers) { return PYSEG_CPU_TABLE(hausdorff_kernels).workspace(in, workers); }, INT64_MAX);
  return {loss, error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("_hausdorff_dt", TORCH_BOX(&hausdorff_dt)); }

}  // namespace pyseg::loss
