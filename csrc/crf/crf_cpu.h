// What the crf family's CPU operators share before their kernels run.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

// Every number in `t` must be in least..most - 1.
template <typename E>
void check_range(const char* op, const char* name, const torch::stable::Tensor& t, int64_t least, int64_t most) {
  const E* const data = elements<E>(t);
  E low = 0, high = 0;
  for (int64_t i = 0; i < t.numel(); ++i) {
    low = data[i] < low ? data[i] : low;
    high = data[i] > high ? data[i] : high;
  }
  PYSEG_CHECK(t.numel() == 0 || (low >= least && high < most), op, ": ", name, " must be from ", least, " to ",
              most - 1, ", got ", low < least ? low : high);
}

// The contents of a lattice's tensors that a read out of bounds could follow from.
inline void check_lattice_contents(const char* op, const Lattice& l) {
  const int64_t m = l.vertices();
  check_range<int32_t>(op, "vertex", l.vertex, 0, m);
  check_range<int32_t>(op, "neighbour", l.neighbour, -1, m);
  check_range<int64_t>(op, "offset", l.offset, 0, m + 1);
  check_range<int64_t>(op, "kernel_row", l.kernel_row, 0, l.kernel_vertex.numel() + 1);
  check_range<int32_t>(op, "kernel_vertex", l.kernel_vertex, 0, m);
  const int64_t* const offset = elements<int64_t>(l.offset);
  for (int64_t n = 0; n < l.images(); ++n) {
    PYSEG_CHECK(offset[n] <= offset[n + 1], op, ": offset must ascend");
    const auto own = [&](const torch::stable::Tensor& t, int64_t first, int64_t count) {
      const int32_t* const data = elements<int32_t>(t);
      for (int64_t i = first; i < first + count; ++i)
        PYSEG_CHECK(data[i] < 0 || (data[i] >= offset[n] && data[i] < offset[n + 1]), op,
                    ": vertex must be of its image: from ", offset[n], " to ", offset[n + 1] - 1, ", got ", data[i]);
    };
    if (l.images() == 1) continue;  // checked above
    own(l.vertex, n * l.points() * l.corners(), l.points() * l.corners());
    for (int j = 0; j < l.corners(); ++j) own(l.neighbour, 2 * (j * m + offset[n]), 2 * (offset[n + 1] - offset[n]));
    if (!l.has_kernel()) continue;
    const int64_t* const row = elements<int64_t>(l.kernel_row);
    own(l.kernel_vertex, row[offset[n]], row[offset[n + 1]] - row[offset[n]]);
  }
  if (l.images() == 1)
    PYSEG_CHECK(l.vertex.numel() == 0 || (offset[0] == 0 && offset[1] <= m), op, ": offset must start at 0");
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
