// What the CPU operators on segmentation maps do before their kernels run: layouts, workspace, errors of labels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/cpu_capability.h"
#include "loss/segmentation_check.h"
#include "loss/segmentation_cpu_kernel.h"

namespace pyseg::loss {

inline const SegmentationKernels& segmentation_kernels() { return PYSEG_CPU_TABLE(segmentation_kernels); }

template <typename T>
T* data(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline PixelMap map_of(const torch::stable::Tensor& t) {
  return {t.data_ptr(), *element_of(t), is_dense_channels_last(t)};
}

// The operators' arguments as the kernels take them, and the tensors that these point into.
class SegmentationMaps {
 public:
  SegmentationInput input{};

  SegmentationMaps(const char* op, const torch::stable::Tensor& logits, const torch::stable::Tensor& target,
                   const std::string& activation, OptInt ignore_index)
      : op_(op) {
    input.activation = activation_of(op, activation);
    input.dense = check_target(op, target, logits);
    input.images = logits.size(0);
    input.classes = logits.size(1);
    input.pixels = pixels_of(logits);
    input.has_ignore = ignore_index.has_value();
    input.ignore = ignore_index.value_or(0);
    input.target_scale = 1;
    input.logits = keep(in_a_format(logits));
    input.target = keep(input.dense ? in_a_format(target) : torch::stable::contiguous(target));
  }

  // [N, *S], or [N, C, *S]: a weight for every element.
  void set_weight(const OptTensor& weight) {
    if (!weight) return;
    input.dense_weight = weight->dim() == logits().dim();
    input.weight = keep(input.dense_weight ? in_a_format(*weight) : torch::stable::contiguous(*weight));
  }

  // What forward passes keep; nothing where `log_sum` has no elements.
  void set_log_sum(const torch::stable::Tensor& log_sum) {
    input.log_sum = log_sum.numel() > 0 ? log_sum.data_ptr() : nullptr;
  }

  // Calls f(run) and raises what it finds wrong with the labels.
  template <typename F>
  void run(const F& f) const {
    run(f, [&](int64_t workers) { return segmentation_kernels().workspace(input, workers); }, INT64_MAX);
  }

  // With bytes(workers) of workspace, and no more than `most` workers.
  template <typename F, typename Bytes>
  void run(const F& f, const Bytes& bytes, int64_t most) const {
    Workers workers = workers_for(20. * double(logits().numel()));
    workers.count = std::min(workers.count, most);
    const torch::stable::Tensor workspace =
        torch::stable::new_empty(logits(), {bytes(workers.count)}, torch::headeronly::ScalarType::Byte);
    std::vector<LabelError> errors(workers.count);
    f(SegmentationRun{workspace.data_ptr(), errors.data(), workers});
    for (const LabelError& error : errors) {
      if (!error.found) continue;
      const bool binary = input.dense || (input.classes == 1 && input.activation != Activation::kSoftmax);
      PYSEG_CHECK(false, op_, ": target must have ", input.dense ? "elements" : "labels", " from 0 to ",
                  binary ? 1 : input.classes - 1,
                  input.has_ignore ? " or ignore_index = " + std::to_string(input.ignore) : "", ", got ", error.label);
    }
  }

 private:
  const char* op_;
  std::vector<torch::stable::Tensor> kept_;

  const torch::stable::Tensor& logits() const { return kept_.front(); }
  PixelMap keep(torch::stable::Tensor t) {
    kept_.push_back(std::move(t));
    return map_of(kept_.back());
  }
};

}  // namespace pyseg::loss
