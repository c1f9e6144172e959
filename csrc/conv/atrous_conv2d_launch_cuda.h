// What the launchers of atrous_conv2d's kernels without and with tensor cores ask about their arguments.
#pragma once

#include "atrous_conv2d_cuda.h"

namespace pyseg::atrous {

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // grid x
constexpr int64_t kMostTiles = 65535;                    // grid y

// Sums of a few sizes, paddings and dilations fit an int, and so does the number of output pixels, which the dense
// kernels count.
inline bool sizes_fit(const Shape& s) {
  constexpr int64_t kMostSize = int64_t{1} << 28, kMostPixels = int64_t{1} << 30;
  for (int64_t size : {s.batch, s.channels, s.height, s.width, s.out_channels, s.out_height, s.out_width, s.dilation_h,
                       s.dilation_w, s.pad_h < 0 ? -s.pad_h : s.pad_h, s.pad_w < 0 ? -s.pad_w : s.pad_w}) {
    if (size > kMostSize) return false;
  }
  return s.out_height * s.out_width <= kMostPixels && s.batch * s.out_height * s.out_width <= kMostPixels;
}

inline bool is_aligned(const void* data, int bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Every pixel of a channels-last map starts at a multiple of `elements`, which fill `bytes`. Strides of dimensions of one
// element are never used.
inline bool pixels_aligned(const void* data, const Strides& strides, int64_t batch, int64_t height, int64_t width,
                           int elements, int bytes) {
  return is_aligned(data, bytes) && (batch <= 1 || strides.n % elements == 0) &&
         (height <= 1 || strides.h % elements == 0) && (width <= 1 || strides.w % elements == 0);
}

}  // namespace pyseg::atrous
