// The interface between sparse_pairwise on the CPU and its kernels, which are compiled once per instruction set: plain
// data and a table of functions, torch-free. T is double where float64 is set, else float.
#pragma once

#include <cstdint>

#include "common/workers.h"

namespace pyseg {

struct SparseArgs {
  const int64_t* starts;   // [images * points + 1]
  const int32_t* columns;  // [length]
  const int32_t* entries;  // [length], where the weights stand; null: in the order of the columns
  int64_t length;
  int64_t images, channels, points;
  bool float64;
  bool rows;  // whether values are [images, points, channels], else [images, channels, points]
};

struct SparseProductArgs {
  SparseArgs sparse;
  const void* weights;  // [length]
  const void* values;
  void* output;        // like values
  const void* base;    // like values: what sums are added to; null: zero
  const void* factor;  // [channels] of the sums; null: 1
};

struct SparseDotsArgs {
  SparseArgs sparse;
  const void *left, *right;  // values
  void* output;              // [length]
};

// False where starts do not ascend within the length, or a column or an entry does not exist: of these nothing is read.
struct SparseKernels {
  bool (*product)(const SparseProductArgs&, const Workers&);
  bool (*dots)(const SparseDotsArgs&, const Workers&);
};

namespace baseline {
extern const SparseKernels sparse_kernels;
}  // namespace baseline
namespace avx2 {
extern const SparseKernels sparse_kernels;
}  // namespace avx2
namespace avx512 {
extern const SparseKernels sparse_kernels;
}  // namespace avx512

}  // namespace pyseg
