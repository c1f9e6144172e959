// The interface between warp_to_view's CPU operators and their kernels, which are compiled once per instruction set:
// plain data and a table of functions, torch-free.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/workers.h"
#include "warp/warp_to_view_math.h"

namespace pyseg {

// Depth maps of float or double, each image dense.
struct ViewDepth {
  const void* data;  // [images, height, width]; or null
  int64_t image_stride;
  bool wide;  // double
};

struct ViewWarpArgs {
  Element type;
  int64_t keys, views, channels;  // views of each keyframe
  int64_t key_height, key_width;
  view::Visibility visibility;         // of the views
  const view::Projection* projection;  // [keys * views]
  ViewDepth depth, source_depth;
  bool last;  // the channels of a pixel lie side by side in all maps; otherwise see the strides
  // [keys * views, C, H, W]
  const void* scores;
  int64_t image_stride, channel_stride, row_stride, column_stride;
  void* output;       // [keys, C, H', W'], dense
  uint8_t* seen;      // [keys, H', W']
  const void* grad;   // like output
  void* grad_scores;  // [keys * views, C, H, W], dense
};

struct ViewWarpKernelTable {
  // Bytes of scratch, and what needs it.
  int64_t (*forward_scratch)(const ViewWarpArgs&, int64_t workers);
  void (*forward)(const ViewWarpArgs&, void* scratch, const Workers&);
  int64_t (*backward_scratch)(const ViewWarpArgs&, int64_t workers);
  void (*backward)(const ViewWarpArgs&, void* scratch, const Workers&);
};

namespace baseline {
extern const ViewWarpKernelTable view_warp_kernels;
}
namespace avx2 {
extern const ViewWarpKernelTable view_warp_kernels;
}
namespace avx512 {
extern const ViewWarpKernelTable view_warp_kernels;
}

}  // namespace pyseg
