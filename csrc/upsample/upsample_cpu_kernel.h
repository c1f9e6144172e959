// The interface between the CPU operators of this family and their kernels, which are compiled once per instruction
// set: plain data and a table of functions, torch-free.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/workers.h"
#include "upsample/upsample_math.h"

namespace pyseg {

// One input, whose channels follow those of the input before it.
struct UpsampleMap {
  const void* input;  // [N, C_i, H_i, W_i]; null where only its gradient is asked for
  int64_t image_stride, channel_stride, row_stride, column_stride;
  void* grad;  // dense, in the operator's layout; or null
  int64_t channels, height, width;
  int64_t first_channel;
  bool copied_rows, copied_columns;  // an axis that keeps its size
  const upsample::Tap* rows;         // [H]
  const upsample::Tap* columns;      // [W]
};

struct UpsampleArgs {
  Element type;
  int64_t images, channels, height, width;  // of the output
  int64_t maps;
  const UpsampleMap* map;
  // The channels of a pixel lie side by side in all tensors; otherwise the pixels of a row do.
  bool last;
  void* output;      // [N, C, H, W], dense
  const void* grad;  // the same
};

// upsample_concat_depthwise: output and grad are [R, N, C, H, W]. A is what the elements are computed in.
struct UpsampleDepthwiseArgs {
  UpsampleArgs upsample;
  int64_t rates;
  const int64_t* dilation;  // [R]
  const void* weight;       // [R, C, 3, 3] of A, dense
  const void* scale;        // [R, C] of A, dense; or null
  const void* shift;        // the same
  // [N, R, C, 10] of A: gradients of the nine taps and of the shift, of all images in the first; or null
  void* sums;
};

struct UpsampleKernelTable {
  // Bytes of scratch, and what needs it; the same for concat and its gradient.
  int64_t (*concat_scratch)(const UpsampleArgs&, int64_t workers);
  void (*concat)(const UpsampleArgs&, void* scratch, const Workers&);
  void (*concat_backward)(const UpsampleArgs&, void* scratch, const Workers&);
  int64_t (*depthwise_scratch)(const UpsampleDepthwiseArgs&, int64_t workers);
  void (*depthwise)(const UpsampleDepthwiseArgs&, void* scratch, const Workers&);
  int64_t (*depthwise_backward_scratch)(const UpsampleDepthwiseArgs&, int64_t workers);
  void (*depthwise_backward)(const UpsampleDepthwiseArgs&, void* scratch, const Workers&);
};

namespace baseline {
extern const UpsampleKernelTable upsample_kernels;
}
namespace avx2 {
extern const UpsampleKernelTable upsample_kernels;
}
namespace avx512 {
extern const UpsampleKernelTable upsample_kernels;
}

}  // namespace pyseg
