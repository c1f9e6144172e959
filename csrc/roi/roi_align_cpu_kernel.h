// The interface between roi_align_cpu.cpp and the CPU kernels of RoIAlign, which are compiled once per instruction set:
// plain data and a table of functions, torch-free.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/workers.h"
#include "roi/roi_align_math.h"

namespace pyseg {

// One map of a pyramid; a single map is a pyramid of one. Strides in elements.
struct RoiLevel {
  const void* input;  // [N, C, D, H, W], any strides; null where only the gradient of the input is asked for
  int64_t stride[5];
  void* grad;       // [N, C, D, H, W] or null
  bool grad_last;   // channels_last instead of contiguous
  int64_t size[3];  // D, H, W
  double scale;
};

struct RoiArgs {
  Element type;  // of the maps, the output and its gradient
  int64_t levels;
  const RoiLevel* level;
  int64_t images, channels;
  roi::Sampling sampling;
  bool maximum;
  int64_t boxes, columns;
  const void* box;           // [boxes, columns], double where the type is, else float
  const int32_t* box_level;  // [boxes], -1: the box has no level, and its output is 0
  const int64_t* order;      // boxes that have a level, by level, image and place
  const int64_t* group;      // [levels * images + 1]: where those of a level and image begin in `order`
  void* output;              // [boxes, C, bins], or null
  const void* grad_output;   // the same, or null
  bool last;                 // output and grad_output are channels_last
  void* grad_boxes;          // [boxes, columns] like box, zeroed, or null
  void* (*allocate)(void* context, int64_t bytes);  // scratch that lives as long as the call
  void* context;
};

struct RoiKernelTable {
  void (*forward)(const RoiArgs&, const Workers&);
  void (*backward)(const RoiArgs&, const Workers&);
  // Of masks of bytes with one channel, into output [boxes, bins] of float; a.type is kFloat.
  void (*crop)(const RoiArgs&, const Workers&);
};

namespace baseline {
extern const RoiKernelTable roi_kernels;
}
namespace avx2 {
extern const RoiKernelTable roi_kernels;
}
namespace avx512 {
extern const RoiKernelTable roi_kernels;
}

}  // namespace pyseg
