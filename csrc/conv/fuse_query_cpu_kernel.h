// The interface between fuse_query on the CPU and its kernels, which are compiled once per instruction set: plain data
// and a table of functions, torch-free.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/workers.h"

namespace pyseg {

// A is what the elements, of `type`, are computed in. Maps are dense, all in one layout.
struct FuseQueryArgs {
  Element type;
  bool last;  // the channels of a pixel lie side by side; otherwise its row does
  bool relu;
  int64_t images, inputs, channels, height, width;
  const void* input;        // [N, C, H, W]
  void* scale;              // [N, H, W] of A: one over the norm of each pixel of input; or null
  void* output;             // [N, K, H, W]: holds the product, gets the result
  const void* offset;       // [N, K] of A
  const void* coordinates;  // [K, 8] of A

  const void* grad;        // [N, K, H, W]
  void* gated;             // [N, K, H, W]: the product's gradient; null where it is grad
  void* grad_offset;       // [N, K] of A
  void* grad_coordinates;  // [K, 8] of A
  void* grad_input;        // [N, C, H, W]: holds weight^T * gated, gets the gradient
};

struct FuseQueryKernelTable {
  void (*scale)(const FuseQueryArgs&, const Workers&);
  void (*add)(const FuseQueryArgs&, const Workers&);
  int64_t (*gate_scratch)(const FuseQueryArgs&);  // bytes
  void (*gate)(const FuseQueryArgs&, void* scratch, const Workers&);
  void (*project)(const FuseQueryArgs&, const Workers&);
};

namespace baseline {
extern const FuseQueryKernelTable fuse_query_kernels;
}
namespace avx2 {
extern const FuseQueryKernelTable fuse_query_kernels;
}
namespace avx512 {
extern const FuseQueryKernelTable fuse_query_kernels;
}

}  // namespace pyseg
