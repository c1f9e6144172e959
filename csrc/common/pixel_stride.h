// Maps of any strides as (image, class, pixel).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace pyseg {

// Whether the spatial dimensions (from 2 on) are evenly spaced, and their spacing.
inline std::optional<int64_t> pixel_stride(const torch::stable::Tensor& map) {
  int64_t stride = 1, next = 0;
  bool any = false;
  for (int64_t d = map.dim() - 1; d >= 2; --d) {
    if (map.size(d) == 0) return 1;  // no pixel: any spacing will do
    if (map.size(d) == 1) continue;
    if (any && map.stride(d) != next) return std::nullopt;
    if (!any) stride = map.stride(d);
    any = true;
    next = map.stride(d) * map.size(d);
  }
  return stride;
}

}  // namespace pyseg
