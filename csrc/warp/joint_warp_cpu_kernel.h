// The interface between joint_warp on the CPU and its kernels, which are compiled once per instruction set: plain data
// and a table of functions, torch-free. A is double where the image is, else float. Axes are the last d of three.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/workers.h"
#include "warp/joint_warp_math.h"

namespace pyseg {

struct WarpGeometry {
  bool wide;  // A is double
  int dims;
  int64_t images;
  int64_t in[warp::kMostDims], out[warp::kMostDims];
  int64_t grid[warp::kMostDims];
  const void* affine;        // [N, d, d + 1] of A, dense
  const void* displacement;  // [N, d, *grid] of A, dense; or null
  double cubic;
};

// A tensor that is read at interpolated places. Strides in elements.
struct WarpMap {
  Element type, output_type;
  int64_t channels;
  const void* input;  // [N, C, *S]
  int64_t image_stride, channel_stride, stride[warp::kMostDims];
  void* output;  // [N, C, *out], dense in one of the two memory formats
  int64_t output_image_stride, output_channel_stride, output_step;
  warp::Border border;
  double fill;
  const void* gain;  // [N, C] of A, dense; or null
  const void* bias;  // the same
};

// Labels that are read at the nearest place.
struct WarpLabels {
  int element_size;
  const void* input;  // [N, *S]
  int64_t image_stride, stride[warp::kMostDims];
  void* output;  // [N, *out], dense
  warp::Border border;
  int64_t ignore_index;
};

struct WarpArgs {
  WarpGeometry geometry;
  const WarpMap* map;  // the image, and soft labels
  int maps;
  const WarpLabels* labels;  // or null
  bool near;                 // elements of an image lie within 2^31 of its first
};

struct WarpBackwardArgs {
  WarpGeometry geometry;
  Element type;
  int64_t channels;
  const void* grad;  // [N, C, *out]
  int64_t grad_image_stride, grad_channel_stride, grad_stride[warp::kMostDims];
  void* grad_image;  // [N, C, *in], dense in one of the two memory formats
  int64_t image_stride, channel_stride, step;
  warp::Border border;
  const void* gain;  // [N, C] of A, dense; or null
};

struct WarpKernelTable {
  int64_t (*forward_scratch)(const WarpArgs&, int64_t workers);  // bytes
  void (*forward)(const WarpArgs&, void* scratch, const Workers&);
  int64_t (*backward_scratch)(const WarpBackwardArgs&, int64_t workers);
  void (*backward)(const WarpBackwardArgs&, void* scratch, const Workers&);
};

namespace baseline {
extern const WarpKernelTable warp_kernels;
}
namespace avx2 {
extern const WarpKernelTable warp_kernels;
}
namespace avx512 {
extern const WarpKernelTable warp_kernels;
}

}  // namespace pyseg
