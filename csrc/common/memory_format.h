// torch's reading of strides as a memory format.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace pyseg {

// Whether torch takes the strides of an [N, C, H, W] tensor for channels_last. Strides that fit both formats (one
// channel, or one pixel and one image) count as contiguous, and so do empty tensors.
inline bool is_channels_last(const torch::stable::Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return false;
  int64_t least = 0;
  for (int d : {1, 3, 2, 0}) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 0 || stride < least) return false;
    if (d == 0 && least == t.stride(1)) return false;  // a map of one channel and pixel, or of one channel
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

}  // namespace pyseg
