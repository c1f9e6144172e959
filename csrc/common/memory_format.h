// torch's reading of strides as a memory format.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace pyseg {

// Whether torch takes the strides of an [N, C, *S] tensor for channels_last. Strides that fit both formats (one channel,
// or one pixel and one image) count as contiguous, and so do empty tensors.
inline bool has_channels_last_strides(const torch::stable::Tensor& t) {
  if (t.stride(1) == 0) return false;
  int64_t least = 0;
  const auto fits = [&](int d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 0 || stride < least) return false;
    if (d == 0 && least == t.stride(1)) return false;  // a map of one channel and pixel, or of one channel
    least = size > 1 ? stride * size : stride;
    return true;
  };
  if (!fits(1)) return false;
  for (int d = static_cast<int>(t.dim()) - 1; d > 1; --d)
    if (!fits(d)) return false;
  return fits(0);
}

inline bool is_channels_last(const torch::stable::Tensor& t) { return t.dim() == 4 && has_channels_last_strides(t); }
inline bool is_channels_last_3d(const torch::stable::Tensor& t) { return t.dim() == 5 && has_channels_last_strides(t); }

}  // namespace pyseg
