// The interface between the CUDA operators on segmentation maps and the launchers of their kernels: plain data,
// torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element.h"
#include "loss/segmentation_math.h"

namespace pyseg::loss {

// logits, target where it is dense, and weight where it is dense lie in memory alike: [N, C, S] or, channels_last, [N,
// S, C].
struct SegmentationArgs {
  const void* logits;  // [N, C, S] or [N, S, C]
  const void* target;  // like logits, or labels [N, S]
  const void* weight;  // like logits, or [N, S], or null
  // The gradient of the statistics: `grad` [N, C, kStatistics]; or, where it is null, `scale` [N, C] for that of PG;
  // or, where that is null too, the factors below times class_weight [C] (null: 1).
  const double* grad;
  const void* scale;
  const void* class_weight;
  double of_pos, of_neg, of_nll;
  double* partial;     // [N * units, C, kStatistics]
  double* statistics;  // [N, C, kStatistics]
  void* to;            // like logits, or [N, S]
  int64_t images, pixels;
  int classes;
  Element logits_type, target_type, weight_type, scale_type, class_weight_type;
  Activation activation;
  bool channels_last, dense, dense_weight, has_ignore, region, pixel, smoothing;
  int64_t ignore;
  double gamma, target_scale, target_shift;
};

constexpr int kUnitPixels = 1024;  // of one block

inline int64_t units_of_image(const SegmentationArgs& a) { return (a.pixels + kUnitPixels - 1) / kUnitPixels; }

cudaError_t launch_statistics(const SegmentationArgs&, cudaStream_t);
cudaError_t launch_backward(const SegmentationArgs&, cudaStream_t);
cudaError_t launch_pixel_loss(const SegmentationArgs&, cudaStream_t);

}  // namespace pyseg::loss
