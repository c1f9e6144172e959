// The interface between nms_cpu.cpp and the CPU kernels of non-maximum suppression, which are compiled once per
// instruction set: plain data and a table of functions, torch-free.
#pragma once

#include <cstdint>

#include "common/workers.h"

namespace pyseg {

// Boxes of one group after the other, each group by falling score and padded to whole vectors with empty boxes: those
// of different groups are no rivals.
struct NmsArgs {
  int64_t groups;
  const int64_t* begin;  // [groups + 1]
  const int64_t* count;  // [groups]: boxes without the padding
  int64_t total;         // begin[groups]
  bool float64;
  const void* coordinates;  // x1, y1, x2, y2, area: [5, total] of float or double
  double threshold;
  void* removed;  // [total] of the same type, zeroed: set where a box is removed
};

constexpr int64_t kNmsPadding = 16;  // boxes

struct NmsKernelTable {
  void (*suppress)(const NmsArgs&, const Workers&);
};

namespace baseline {
extern const NmsKernelTable nms_kernels;
}
namespace avx2 {
extern const NmsKernelTable nms_kernels;
}
namespace avx512 {
extern const NmsKernelTable nms_kernels;
}

}  // namespace pyseg
