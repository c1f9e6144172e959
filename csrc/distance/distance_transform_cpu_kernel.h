// The interface between distance_transform_cpu.cpp, or another operator's kernels, and the CPU kernels of the distance
// transforms, which are compiled once per instruction set: plain data and a table of functions, torch-free.
#pragma once

#include <cstdint>

#include "common/workers.h"
#include "distance/distance_transform_math.h"

namespace pyseg {

struct DistanceArgs {
  const void* input;  // [N, D, H, W], contiguous
  int element_bytes;  // 1, 2, 4 or 8
  bool floating;      // elements are floating point: minus zero is zero
  distance::Mode mode;
  int dims;  // 2: D is 1, indices have two components
  int64_t n, d, h, w;
  double spacing[3];  // of D, H, W; 1 for the D of two dimensions
  bool squared, float64;
  void* output;      // [N, D, H, W], float or double
  int64_t* indices;  // [N, dims, D, H, W] or null
};

struct TwoNearestArgs {
  const int32_t* labels;  // [N, D, H, W], contiguous; 0 is no object
  int64_t n, d, h, w;
  double spacing[3];  // of D, H, W
  bool squared, float64;
  void* first;  // [N, D, H, W], float or double
  void* second;
};

// Each routine states how many bytes of workspace it needs for a number of workers, then runs with them.
struct DistanceKernelTable {
  int64_t (*transform_workspace)(const DistanceArgs&, int64_t workers);
  void (*transform)(const DistanceArgs&, void* workspace, const Workers&);
  int64_t (*two_nearest_workspace)(const TwoNearestArgs&, int64_t workers);
  void (*two_nearest)(const TwoNearestArgs&, void* workspace, const Workers&);
};

namespace baseline {
extern const DistanceKernelTable distance_kernels;
}
namespace avx2 {
extern const DistanceKernelTable distance_kernels;
}
namespace avx512 {
extern const DistanceKernelTable distance_kernels;
}

}  // namespace pyseg
