// The interface between this family's CUDA launchers and kernels: plain data, torch-free.
#pragma once

#include <cstdint>

#include "upsample/upsample_math.h"

namespace pyseg::upsample {

constexpr int kMostMaps = 16;  // they travel as a kernel's argument

// Tap of a table in device memory; A is float or double.
template <typename A>
struct alignas(16) CudaTap {
  int32_t low, high;
  A weight;
};

// One input, whose channels follow those of the input before it. Strides in elements.
struct CudaMap {
  const void* input;  // [N, C_i, H_i, W_i]; null where only its gradient is asked for
  int64_t image_stride, channel_stride, row_stride, column_stride;
  void* grad;               // [N, C_i, H_i, W_i], dense in the operator's layout; or null
  void* interpolated_grad;  // [N, C_i, H, W], likewise, of what is computed in; null for a map that is copied
  int64_t channels, height, width;
  int64_t first_channel;
  int64_t first_block;               // upsample_concat_depthwise: of its blocks of channels
  bool copied_rows, copied_columns;  // an axis that keeps its size
  Axis row_axis, column_axis;
  const void* rows;     // [H] of CudaTap
  const void* columns;  // [W] of CudaTap
};

struct CudaUpsampleArgs {
  int64_t images, channels, height, width;  // of the output
  int maps;
  CudaMap map[kMostMaps];
  void* output;      // [N, C, H, W] or [R, N, C, H, W], dense
  const void* grad;  // the same
};

struct CudaDepthwiseArgs {
  CudaUpsampleArgs upsample;
  int rates;
  int row_dilation[kMostRates], column_dilation[kMostRates];  // at most the map's size: beyond all is zero
  int row_reach, column_reach;                                // the largest of them
  int64_t blocks;                                             // of channels, of all maps
  const void* weight;                                         // [R, C, 3, 3], dense, of what is computed in
  const void* scale;                                          // [R, C], or null
  const void* shift;                                          // [R, C], or null
  void* sums;  // [N * rows of tiles, R, 10, C]: gradients of the nine taps and of the shift
};

}  // namespace pyseg::upsample
