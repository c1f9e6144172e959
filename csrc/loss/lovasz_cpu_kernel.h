// The interface between lovasz_statistics_cpu.cpp and its kernels, one table for each instruction set.
#pragma once

#include "loss/segmentation_cpu_kernel.h"

namespace pyseg {

struct LovaszKernels {
  // Bytes of workspace: two numbers a pixel for softmax, and for each worker two records an element of a plane.
  int64_t (*workspace)(const SegmentationInput&, bool per_image, int64_t workers);
  // loss: [images or 1, classes]; to: the gradient of each loss with respect to its plane of p (hinge: of the logits),
  // in the logits' memory format, double for such logits, else float. hinge: margins of the logits instead of |g - p|;
  // the activation is then kNone.
  void (*run)(const SegmentationInput&, bool per_image, bool hinge, double* loss, void* to, const SegmentationRun&);
};

// The most pixels of a plane: a record counts them in 30 bits.
constexpr int64_t kMostLovaszPixels = int64_t{1} << 30;

namespace baseline {
extern const LovaszKernels lovasz_kernels;
}
namespace avx2 {
extern const LovaszKernels lovasz_kernels;
}
namespace avx512 {
extern const LovaszKernels lovasz_kernels;
}

}  // namespace pyseg
