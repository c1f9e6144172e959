// The interface between point_supervision_loss on CUDA devices and the launchers of its kernels: plain data, torch-free.
#pragma once

#include "loss/point_supervision_math.h"
#include "loss/segmentation_cuda.h"

namespace pyseg::loss {

// What a block finds of a class, and of all its pixels.
enum PointBest { kValue, kPixel, kPoints, kPointBest };
enum PointRest { kObjectnessSum, kPointSum, kPointsOfAll, kPointRest };

// Beside SegmentationArgs: target is labels [N, S], weight [N, S] the points'.
struct PointSupervisionArgs {
  const void* objectness;  // [N, S], or null
  Element objectness_type;
  const int64_t* image_labels;               // [N, C], or null
  const double* grad;                        // [N, kPointTerms]
  double* best;                              // [N * units, C, kPointBest]
  double* rest;                              // [N * units, kPointRest]
  double* kept;                              // [N, C, kPointKept]
  double* terms;                             // [N, kPointTerms]
  uint32_t objects[kMostPointClasses / 32];  // a bit for each class
};

cudaError_t launch_point_supervision(const SegmentationArgs&, const PointSupervisionArgs&, cudaStream_t);
cudaError_t launch_point_supervision_backward(const SegmentationArgs&, const PointSupervisionArgs&, cudaStream_t);

}  // namespace pyseg::loss
