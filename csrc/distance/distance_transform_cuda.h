// The CUDA parts of the distance transforms as seen by their registration: torch-free host functions over raw device
// pointers. Every function launches on `stream` of the current device, never synchronises, allocates nothing, and
// returns the first error of its launches. What comes in has been checked and has elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "distance/distance_transform_math.h"

namespace pyseg::distance {

// How bytes of `edges` describe an element where labels are compared, or where the result's sign depends on it.
constexpr uint8_t kEdgeAbove = 1;   // differs from its neighbour before along H
constexpr uint8_t kEdgeBefore = 2;  // along D
constexpr uint8_t kZero = 4;

// The pass along rows.
struct RowPass {
  const void* input;  // [N, D, H, W]
  int element_bytes;
  bool floating;
  Mode mode;
  int64_t n, d, h, w;
  double spacing;    // along W
  void* squares;     // [N, D, H, W] of the arithmetic's type: squared distance to the nearest source in the row
  uint8_t* edges;    // [N, D, H, W] or null in the mode kMask
  int64_t* nearest;  // [N, D, H, W] or null: the source's position in the row, -1 where there is none
};

// The pass along another axis: at every one of its `rows`, `columns` neighbours lie `stride` = columns elements further
// on, and the next of `outer` such blocks follows after rows * columns elements.
struct AxisPass {
  int64_t outer, rows, columns;
  double spacing;
  const void* squares;      // of the pass before
  const uint8_t* edges;     // or null
  uint8_t edge;             // the bit that belongs to this axis
  const int64_t* nearest;   // of the pass before, or null
  void* result;             // squares, or in the last pass distances
  int64_t* result_nearest;  // [outer, rows, columns] (position along this axis) * columns + that of the pass before
  bool last, squared, float64, exact_roots;
  Mode mode;
  int64_t* indices;  // last pass: [outer, dims, rows, columns] or null
  int dims;
  int64_t w;
};

cudaError_t launch_row_pass(const RowPass& args, Arithmetic arithmetic, cudaStream_t stream);
cudaError_t launch_axis_pass(const AxisPass& args, Arithmetic arithmetic, cudaStream_t stream);

// The same for two objects: distances and labels of the nearest and the second nearest, [N, D, H, W] each.
struct TwoNearest {
  void *first, *second;
  int32_t *first_label, *second_label;
};

cudaError_t launch_two_nearest_rows(const int32_t* labels, int64_t rows, int64_t w, double spacing, TwoNearest result,
                                    Arithmetic arithmetic, cudaStream_t stream);
// args: outer, rows, columns, spacing, last, squared, float64, exact_roots; in the last pass result.first and second
// alone are written, as distances.
cudaError_t launch_two_nearest_axis(const AxisPass& args, TwoNearest from, TwoNearest result, Arithmetic arithmetic,
                                    cudaStream_t stream);

}  // namespace pyseg::distance
