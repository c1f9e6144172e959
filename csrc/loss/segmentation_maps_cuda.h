// What the CUDA operators on segmentation maps do before their kernels run: checks, layouts.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "common/cuda_launches.h"
#include "loss/segmentation_check.h"
#include "loss/segmentation_cuda.h"

namespace pyseg::loss {

// The arguments as the kernels take them, and the tensors that these point into.
class CudaMaps {
 public:
  SegmentationArgs args{};

  CudaMaps(const char* op, const torch::stable::Tensor& logits, const torch::stable::Tensor& target,
           const std::string& activation, OptInt ignore_index) {
    args.activation = activation_of(op, activation);
    args.dense = check_target(op, target, logits);
    args.images = logits.size(0);
    args.classes = static_cast<int>(logits.size(1));
    args.pixels = pixels_of(logits);
    args.has_ignore = ignore_index.has_value();
    args.ignore = ignore_index.value_or(0);
    args.target_scale = 1;
    const torch::stable::Tensor map = in_a_format(logits);
    args.channels_last = is_dense_channels_last(map);
    format_ = !args.channels_last ? torch::headeronly::MemoryFormat::Contiguous
              : logits.dim() == 4 ? torch::headeronly::MemoryFormat::ChannelsLast
                                  : torch::headeronly::MemoryFormat::ChannelsLast3d;
    args.logits = keep(map);
    args.logits_type = *element_of(logits);
    args.target =
        keep(torch::stable::contiguous(target, args.dense ? format_ : torch::headeronly::MemoryFormat::Contiguous));
    args.target_type = *element_of(target);
  }

  // [N, *S], or [N, C, *S]: a weight for every element.
  void set_weight(const OptTensor& weight, int64_t dim) {
    if (!weight) return;
    args.dense_weight = weight->dim() == dim;
    args.weight = keep(
        torch::stable::contiguous(*weight, args.dense_weight ? format_ : torch::headeronly::MemoryFormat::Contiguous));
    args.weight_type = *element_of(*weight);
  }

  void set_grad(const torch::stable::Tensor& grad) {  // [N, C, kStatistics]
    args.grad = static_cast<const double*>(keep(torch::stable::contiguous(grad)));
  }
  void set_scale(const torch::stable::Tensor& scale) {  // [N, C]
    args.scale = keep(torch::stable::contiguous(scale));
    args.scale_type = *element_of(scale);
  }
  void set_class_weight(const OptTensor& weight) {  // [C]
    if (!weight) return;
    args.class_weight = keep(torch::stable::contiguous(*weight));
    args.class_weight_type = *element_of(*weight);
  }

  void set_result(const torch::stable::Tensor& result) { args.to = result.data_ptr(); }

 private:
  std::vector<torch::stable::Tensor> kept_;
  torch::headeronly::MemoryFormat format_;

  void* keep(torch::stable::Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back().data_ptr();
  }
};

}  // namespace pyseg::loss
