// The interface between nms_cpu.cpp and the CPU kernels of non-maximum suppression, which are compiled once per
// instruction set: plain data and a table of functions, torch-free.
#pragma once

#include <cstdint>

#include "common/workers.h"

namespace pyseg {

struct NmsArgs {
  int64_t count, padded;  // of boxes; padded to whole vectors, with empty boxes of no class
  bool float64;
  const void* coordinates;  // x1, y1, x2, y2, area: [5, padded] of float or double, by falling score
  const void* group;        // [padded] of the same type and exact, or null: boxes of others are no rivals
  double threshold;
  void* removed;  // [padded] of the same type, zeroed: set where a box is removed
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
