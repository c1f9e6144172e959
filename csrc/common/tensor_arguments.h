// What the checks of the operators' tensor arguments have in common.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace pyseg {

using Ints = std::vector<int64_t>;

inline Ints sizes_of(const torch::stable::Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline std::string dtype_name(const torch::stable::Tensor& t) {
  return std::string("torch.") + torch::headeronly::toString(t.scalar_type());
}

}  // namespace pyseg
