// The interface between the CPU operators on segmentation maps and their kernels, which are compiled once per
// instruction set: plain data and tables of functions, torch-free and without inline functions.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/workers.h"
#include "loss/segmentation_math.h"

namespace pyseg {

// [images, classes, pixels] or, channels_last, [images, pixels, classes].
struct PixelMap {
  const void* data;
  Element type;
  bool channels_last;
};

struct SegmentationInput {
  int64_t images, classes, pixels;
  PixelMap logits;
  PixelMap target;  // labels: [images, pixels]
  bool dense;       // a target for every class; else labels
  bool has_ignore;
  int64_t ignore;
  double target_scale, target_shift;  // label smoothing of sigmoid and none: g becomes scale * g + shift
  PixelMap weight;                    // [images, pixels], or like a dense target; data null: 1
  bool dense_weight;
  Activation activation;
  double gamma;
  bool region, pixel, smoothing;  // the groups of columns that are wanted
  // Softmax and labels: [images, pixels] logarithms of sums of exponentials, in the type that is computed in, which forward
  // passes write and the backward pass reads; null: none are kept.
  void* log_sum;
};

// The first label of a worker's share that is neither in its range nor ignored.
struct LabelError {
  bool found;
  int64_t label;
};

struct SegmentationRun {
  void* workspace;     // aligned to 64 bytes
  LabelError* errors;  // one for each worker
  const Workers& workers;
};

struct SegmentationKernels {
  int64_t (*workspace)(const SegmentationInput&, int64_t workers);  // bytes
  // Rows of partial sums that `statistics` adds up, each [classes, kStatistics] doubles.
  int64_t (*partials)(const SegmentationInput&);
  // partial: [partials, classes, kStatistics]; statistics: [images, classes, kStatistics].
  void (*statistics)(const SegmentationInput&, double* partial, double* statistics, const SegmentationRun&);
  // grad: [classes, kStatistics] for each image, the next one `grad_stride` away; to: like the logits.
  void (*backward)(const SegmentationInput&, const double* grad, int64_t grad_stride, void* to, const SegmentationRun&);
  // The terms POS, NEG and NLL times their factors, [classes, kStatistics], unsummed: [images, pixels] for softmax,
  // else like the logits; double for such logits, else float.
  void (*pixel_loss)(const SegmentationInput&, const double* factors, void* to, const SegmentationRun&);
};

namespace baseline {
extern const SegmentationKernels segmentation_kernels;
}
namespace avx2 {
extern const SegmentationKernels segmentation_kernels;
}
namespace avx512 {
extern const SegmentationKernels segmentation_kernels;
}

}  // namespace pyseg
