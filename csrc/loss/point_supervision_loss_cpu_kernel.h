// The interface between point_supervision_loss on the CPU and its kernels, which are compiled once per instruction set.
#pragma once

#include "loss/point_supervision_math.h"
#include "loss/segmentation_cpu_kernel.h"

namespace pyseg {

struct PointSupervisionInput {
  SegmentationInput maps;       // target: labels; weight: of the points
  PixelMap objectness;          // [images, pixels]; data null: none
  const uint8_t* is_object;     // [classes]
  const int64_t* image_labels;  // [images, classes], or null
};

struct PointSupervisionKernels {
  int64_t (*workspace)(const PointSupervisionInput&, int64_t workers);  // bytes
  int64_t (*partials)(const PointSupervisionInput&);                    // doubles
  // terms: [images, kPointTerms]; kept: [images, classes, kPointKept].
  void (*forward)(const PointSupervisionInput&, double* partial, double* terms, double* kept, const SegmentationRun&);
  // grad: [images, kPointTerms]; to: like the logits.
  void (*backward)(const PointSupervisionInput&, const double* grad, const double* kept, void* to,
                   const SegmentationRun&);
};

namespace baseline {
extern const PointSupervisionKernels point_supervision_kernels;
}
namespace avx2 {
extern const PointSupervisionKernels point_supervision_kernels;
}
namespace avx512 {
extern const PointSupervisionKernels point_supervision_kernels;
}

}  // namespace pyseg
