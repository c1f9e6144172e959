// Memory formats of the RoI operators' maps, the same on every device.
#pragma once

#include <optional>

#include "common/memory_format.h"
#include "roi/roi_check.h"

namespace pyseg::roi {

inline torch::stable::Tensor new_maps(const torch::stable::Tensor& like, const Ints& size, bool last) {
  using torch::headeronly::MemoryFormat;
  const MemoryFormat format = !last              ? MemoryFormat::Contiguous
                              : size.size() == 5 ? MemoryFormat::ChannelsLast3d
                                                 : MemoryFormat::ChannelsLast;
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

inline bool is_last(const torch::stable::Tensor& t) {
  return t.dim() == 5 ? is_channels_last_3d(t) : is_channels_last(t);
}

// Without gaps between its elements.
inline bool is_dense_last(const torch::stable::Tensor& t) {
  int64_t stride = t.size(1);
  bool dense = is_last(t) && t.stride(1) == 1;
  for (int64_t d = t.dim() - 1; d > 1; stride *= t.size(d--)) dense = dense && t.stride(d) == stride;
  return dense && t.stride(0) == stride;
}

}  // namespace pyseg::roi
