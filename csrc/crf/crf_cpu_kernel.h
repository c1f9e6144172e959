// The interface between the crf family's CPU operators and their kernels, which are compiled once per instruction set:
// plain data and a table of functions, torch-free. T is double where float64 is set, else float.
#pragma once

#include <cstdint>

#include "common/workers.h"

namespace pyseg {

struct LatticeArgs {
  const void* features;  // [images, d, points]
  int64_t images, points;
  int d;
  double scale;
  bool float64;
  int32_t* vertex;  // [images, points, d + 1]
  void* weight;     // [images, points, d + 1]
};

enum class LatticeStatus { kGood, kOverflow, kNoMemory };

// What `lattice_begin` found and `lattice_finish` writes out.
struct LatticeBuild {
  LatticeStatus status;
  int64_t vertices;
  void* state;
};

struct LatticeOutput {
  int32_t* neighbour;  // [d + 1, rows, 2]
  int64_t* offset;     // [images + 1]
  int16_t* key;        // [rows, d]
  int64_t rows;        // >= the number of vertices; those beyond have no neighbours and keys of zeros
};

struct VertexKernelArgs {
  const int16_t* key;     // [vertices, d]
  const int64_t* offset;  // [images + 1]
  int64_t images, vertices;
  int d;
  double scale, cutoff, variance;
  bool float64;
};

// A lattice as the filters read it.
struct LatticeInput {
  const int32_t* vertex;     // [images, points, corners]
  const void* weight;        // [images, points, corners]
  const int32_t* neighbour;  // [corners, vertices, 2]
  const int64_t* offset;     // [images + 1]
  int corners;
  int64_t vertices;
  const int64_t* kernel_row;  // [vertices + 1]; null: blur
  const int32_t* kernel_vertex;
  const void* kernel_weight;
};

struct FilterArgs {
  LatticeInput lattice;
  int64_t images, channels, points;
  bool float64, reverse;
  const void* values;  // [images, channels, points]
  void* output;        // like values, or null
  const void* grad;    // like values: the gradient of the result, or null
  void* grad_weight;   // [images, points, corners]
};

struct GaussianArgs {
  int64_t maps;  // of axes[0] x axes[1] x axes[2] elements
  int64_t axes[3];
  const void* taps[3];  // [radius + 1], the middle one first
  int64_t radius[3];    // -1: the axis is left as it is
  bool float64;
  const void* values;
  void* output;
  void* scratch;  // like values; null where at most one axis is filtered
};

struct ScaleInput {
  const void* data;  // [images or 1, points]; null: 1
  int64_t image_stride;
};

struct PairwiseInput {
  ScaleInput scale_in, scale_out;
  const void* compatibility;  // [classes] or [classes, classes]
  bool matrix;
};

struct MeanFieldArgs {
  int64_t images, classes;
  int64_t axes[3];
  bool float64;
  const void* unary;    // [images, classes, points]
  const void* initial;  // like unary, or null
  int64_t iterations;
  double temperature;
  const LatticeInput* lattices;
  int64_t lattice_count;
  const void* const* taps;  // [gaussian_count, 3]: [radius + 1] each, the middle one first
  const int64_t* radius;    // [gaussian_count, 3]; -1: the axis is left as it is
  const bool* coarse;       // [gaussian_count]: taps of y and x are those between the nodes of a coarse grid
  int64_t gaussian_count;
  const PairwiseInput* pairwise;  // of the lattices, then of the Gaussian kernels
  void* output;                   // like unary
};

struct LatticeKernels {
  LatticeBuild (*begin)(const LatticeArgs&, const Workers&);
  // Writes the rest and frees the state, which only a good build has.
  void (*finish)(const LatticeArgs&, const LatticeBuild&, const LatticeOutput&, const Workers&);
  // grad_weight [images, points, d + 1] -> grad_features [images, d, points].
  void (*backward)(const LatticeArgs&, const void* grad_weight, void* grad_features, const Workers&);
  // row: [vertices + 1]; then vertex and weight: [row[vertices]]. False where there is no memory.
  bool (*vertex_kernel_rows)(const VertexKernelArgs&, int64_t* row, const Workers&);
  bool (*vertex_kernel)(const VertexKernelArgs&, const int64_t* row, int32_t* vertex, void* weight, const Workers&);
};

struct CrfKernels {
  int64_t (*filter_workspace)(const FilterArgs&, int64_t workers);  // bytes
  void (*filter)(const FilterArgs&, void* workspace, const Workers&);
  int64_t (*gaussian_workspace)(const GaussianArgs&, int64_t workers);  // bytes
  void (*gaussian)(const GaussianArgs&, void* workspace, const Workers&);
  int64_t (*mean_field_workspace)(const MeanFieldArgs&, int64_t workers);  // bytes
  // Returns whether the unary energies are free of NaN.
  bool (*mean_field)(const MeanFieldArgs&, void* workspace, const Workers&);
};

namespace baseline {
extern const LatticeKernels lattice_kernels;
extern const CrfKernels crf_kernels;
}  // namespace baseline
namespace avx2 {
extern const LatticeKernels lattice_kernels;
extern const CrfKernels crf_kernels;
}  // namespace avx2
namespace avx512 {
extern const LatticeKernels lattice_kernels;
extern const CrfKernels crf_kernels;
}  // namespace avx512

}  // namespace pyseg
