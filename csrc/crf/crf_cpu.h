// What the crf family's CPU operators share before their kernels run.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "crf/crf_check.h"
#include "crf/crf_cpu_kernel.h"

namespace pyseg::crf {

inline const LatticeKernels& lattice_kernels() { return PYSEG_CPU_TABLE(lattice_kernels); }

inline const CrfKernels& crf_kernels() { return PYSEG_CPU_TABLE(crf_kernels); }

// [radius + 1], of the type of `like`.
inline torch::stable::Tensor taps_of(const torch::stable::Tensor& like, const std::vector<double>& numbers) {
  torch::stable::Tensor taps = torch::stable::new_empty(like, {int64_t(numbers.size())});
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (like.scalar_type() == ScalarType::Double)
      static_cast<double*>(taps.data_ptr())[i] = numbers[i];
    else
      static_cast<float*>(taps.data_ptr())[i] = static_cast<float>(numbers[i]);
  }
  return taps;
}

// Null for a tensor without elements.
template <typename E>
const E* elements(const torch::stable::Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<const E*>(t.data_ptr());
}

// `count` vertices must be of their image, whose vertices are first..last - 1; `none`: or -1.
inline void check_vertices(const char* op, const char* name, const int32_t* data, int64_t count, int64_t first,
                           int64_t last, bool none) {
  const uint32_t span = uint32_t(last - first), shift = uint32_t(first), missing = none ? uint32_t(-1) : shift;
  const auto bad = [&](int32_t v) { return (uint32_t(v) - shift >= span) & ((uint32_t(v) != missing) | !none); };
  int any = 0;  // without a branch: the compiler makes vectors of it
  for (int64_t i = 0; i < count; ++i) any |= bad(data[i]);
  if (any == 0) return;
  const int32_t* const found = std::find_if(data, data + count, bad);
  throw_error(op, ": ", name, " must be of its image: from ", first, " to ", last - 1, ", got ", *found);
}

// `data` [count + 1] must ascend, from no less than 0 to at most `most`.
inline void check_offsets(const char* op, const char* name, const int64_t* data, int64_t count, int64_t most) {
  bool ascends = data[0] >= 0 && data[count] <= most;
  for (int64_t i = 0; i < count; ++i) ascends &= data[i] <= data[i + 1];
  PYSEG_CHECK(ascends, op, ": ", name, " must ascend from 0 to at most ", most);
}

// The contents of a lattice's tensors that an access out of bounds could follow from.
inline void check_lattice_contents(const char* op, const Lattice& l) {
  const int64_t m = l.vertices(), entries = l.kernel_vertex.numel();
  const int64_t* const offset = elements<int64_t>(l.offset);
  const int64_t* const row = elements<int64_t>(l.kernel_row);
  check_offsets(op, "offset", offset, l.images(), m);
  PYSEG_CHECK(offset[0] == 0, op, ": offset must start at 0, got ", offset[0]);
  if (l.has_kernel()) check_offsets(op, "kernel_row", row, m, entries);
  for (int64_t n = 0; n < l.images(); ++n) {
    const int64_t first = offset[n], last = offset[n + 1], own = l.points() * l.corners();
    check_vertices(op, "vertex", elements<int32_t>(l.vertex) + n * own, own, first, last, false);
    for (int j = 0; j < l.corners() && last > first; ++j)
      check_vertices(op, "neighbour", elements<int32_t>(l.neighbour) + 2 * (j * m + first), 2 * (last - first), first,
                     last, true);
    if (l.has_kernel())
      check_vertices(op, "kernel_vertex", elements<int32_t>(l.kernel_vertex) + row[first], row[last] - row[first],
                     first, last, false);
  }
}

inline LatticeInput input_of(const Lattice& l) {
  return {.vertex = elements<int32_t>(l.vertex),
          .weight = elements<void>(l.weight),
          .neighbour = elements<int32_t>(l.neighbour),
          .offset = elements<int64_t>(l.offset),
          .corners = l.corners(),
          .vertices = l.vertices(),
          .kernel_row = elements<int64_t>(l.kernel_row),
          .kernel_vertex = elements<int32_t>(l.kernel_vertex),
          .kernel_weight = elements<void>(l.kernel_weight)};
}

}  // namespace pyseg::crf
