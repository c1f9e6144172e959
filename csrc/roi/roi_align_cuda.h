// The interface between roi_align_cuda.cu and the CUDA kernels of RoIAlign: plain data, torch-free.
#pragma once

#include <cstdint>

#include "roi/roi_align_math.h"

namespace pyseg::roi {

constexpr int kMostLevels = 16;  // they travel as a kernel's argument

// One map of a pyramid; a single map is a pyramid of one. Strides in elements.
struct CudaLevel {
  const void* input;  // [N, C, D, H, W], any strides; null where only the gradient of the input is asked for
  int64_t stride[5];
  bool vectors;     // 16 bytes of channels can be loaded at once
  void* grad;       // [N, C, D, H, W] or null
  bool grad_last;   // channels_last instead of contiguous
  int64_t size[3];  // D, H, W
  int64_t first_tile;
  double scale;
};

// A box that has no map: its output is 0, and NaN where its row is no box.
constexpr int kNoLevel = -1, kNoBox = -2;

// What is computed once for each box.
template <typename A>
struct CudaPlan {
  Box<A> box;
  int64_t image;
  int64_t first[kAxes], last[kAxes];  // of the elements that it can reach, inclusive; none where last < first
  int level;                          // or kNoLevel, kNoBox
};

struct CudaRoiArgs {
  int levels;
  CudaLevel level[kMostLevels];
  int64_t images, channels;
  Sampling sampling;
  bool maximum;
  int64_t boxes, columns;
  const void* box;   // [boxes, columns], double where the maps are, else float
  bool has_pyramid;  // levels are chosen by the boxes' areas
  Pyramid pyramid;
  void* plans;              // [boxes] of CudaPlan
  void* output;             // [boxes, C, bins], or null
  const void* grad_output;  // the same, or null
  bool last;                // output and grad_output are channels_last
  void* grad_boxes;         // [boxes, columns] like box, or null
};

}  // namespace pyseg::roi
