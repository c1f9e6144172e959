// confusion_matrix on the CPU: checks, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cpu_capability.h"
#include "metric/confusion_matrix_check.h"
#include "metric/confusion_matrix_cpu_kernel.h"

namespace pyseg::metric {
namespace {

const ConfusionKernelTable& kernel_table() { return PYSEG_CPU_TABLE(confusion_kernels); }

int64_t label_at(const void* labels, LabelType type, int64_t i) {
  switch (type) {
    case LabelType::kUInt8: return static_cast<const uint8_t*>(labels)[i];
    case LabelType::kInt8: return static_cast<const int8_t*>(labels)[i];
    case LabelType::kInt16: return static_cast<const int16_t*>(labels)[i];
    case LabelType::kInt32: return static_cast<const int32_t*>(labels)[i];
    default: return static_cast<const int64_t*>(labels)[i];
  }
}

[[noreturn]] void throw_bad_label(const ConfusionArgs& a, std::optional<int64_t> ignore_index, int64_t pixel) {
  const int64_t target = label_at(a.target, a.target_type, pixel);
  if (target >= 0 && target < a.classes) {
    throw_error(kConfusionMatrix, ": prediction must be in [0, ", a.classes, "), got ",
                label_at(a.prediction, a.prediction_type, pixel));
  }
  if (ignore_index) {
    throw_error(kConfusionMatrix, ": target must be in [0, ", a.classes, ") or ignore_index = ", *ignore_index,
                ", got ", target);
  }
  throw_error(kConfusionMatrix, ": target must be in [0, ", a.classes, "), got ", target);
}

Tensor confusion_matrix(Tensor prediction, Tensor target, int64_t num_classes, std::optional<int64_t> ignore_index,
                        bool per_image) {
  ConfusionArgs args = check_arguments(prediction, target, num_classes, ignore_index, per_image);
  Tensor matrix = torch::stable::new_zeros(target, matrix_sizes(target, num_classes, per_image), ScalarType::Long);
  if (target.numel() == 0) return matrix;
  args.matrix = static_cast<int64_t*>(matrix.data_ptr());
  const ConfusionKernelTable& kernels = kernel_table();
  const Workers workers = workers_for(double(prediction.numel()) + 4. * double(target.numel()));
  const Tensor workspace = torch::stable::new_empty(target, {kernels.workspace(args, workers.count)}, ScalarType::Long);
  const int64_t bad = kernels.run(args, static_cast<int64_t*>(workspace.data_ptr()), workers);
  if (bad >= 0) throw_bad_label(args, ignore_index, bad);
  return matrix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix)); }

}  // namespace pyseg::metric
