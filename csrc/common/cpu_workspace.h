// Scratch memory of one call of a CPU operator.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace pyseg {

// Aligned to kAlignment bytes: rows of scratch are whole cache lines.
struct Workspace {
  static constexpr int64_t kAlignment = 64;
  Workspace(const torch::stable::Tensor& like, int64_t bytes)
      : tensor(torch::stable::new_empty(like, {bytes + kAlignment}, torch::headeronly::ScalarType::Byte)) {
    const auto at = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    data = reinterpret_cast<void*>((at + kAlignment - 1) / kAlignment * kAlignment);
  }
  torch::stable::Tensor tensor;
  void* data;
};

}  // namespace pyseg
