// What the crf family's CUDA operators share before their kernels run: views of tensors, buffers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <list>

#include "common/cuda_launches.h"
#include "crf/crf_check.h"
#include "crf/lattice_rows_cuda.h"

namespace pyseg::crf {

// Tensors that a call's kernels point into.
class Kept {
 public:
  explicit Kept(const torch::stable::Tensor& like) : like_(like) {}

  // Contiguous and aligned; null where there is nothing.
  template <typename E>
  const E* read(const torch::stable::Tensor& t) {
    torch::stable::Tensor& own = tensors_.emplace_back(torch::stable::contiguous(t));
    if (reinterpret_cast<uintptr_t>(own.data_ptr()) % kUnitBytes != 0) own = torch::stable::clone(own);
    return own.numel() == 0 ? nullptr : static_cast<const E*>(own.data_ptr());
  }
  template <typename E>
  E* buffer(int64_t elements, ScalarType type) {
    const torch::stable::Tensor& own = tensors_.emplace_back(torch::stable::new_empty(like_, {elements}, type));
    return static_cast<E*>(own.data_ptr());
  }
  // Of the numbers that are computed with.
  void* numbers(int64_t elements, bool float64) {
    return buffer<void>(elements, float64 ? ScalarType::Double : ScalarType::Float);
  }

 private:
  torch::stable::Tensor like_;
  std::list<torch::stable::Tensor> tensors_;
};

inline LatticeView view_of(const Lattice& l, Kept& kept) {
  return {.images = l.images(),
          .points = l.points(),
          .corners = l.corners(),
          .vertices = l.vertices(),
          .vertex = kept.read<int32_t>(l.vertex),
          .weight = kept.read<void>(l.weight),
          .row = kept.read<int32_t>(l.row),
          .entry = kept.read<int32_t>(l.entry),
          .neighbour = kept.read<int32_t>(l.neighbour),
          .offset = kept.read<int64_t>(l.offset),
          .kernel_row = kept.read<int64_t>(l.kernel_row),
          .kernel_vertex = kept.read<int32_t>(l.kernel_vertex),
          .kernel_weight = kept.read<void>(l.kernel_weight),
          .kernel_entries = l.kernel_vertex.numel(),
          .entries = l.vertex.numel()};
}

inline SplatItems new_items(const LatticeView& l, bool float64, Kept& kept) {
  const int64_t places = segments_of(l) * kSegment;
  return {.point = kept.buffer<uint32_t>(places, ScalarType::Int),
          .weight = kept.numbers(places, float64),
          .vertex = kept.buffer<int32_t>(segments_of(l), ScalarType::Int)};
}

inline SplatCarry new_carry(int64_t segments, const Rows& rows, Kept& kept) {
  return {.sums = kept.numbers(2 * segments * rows.stride(), rows.float64),
          .open = kept.buffer<int32_t>(segments, ScalarType::Int)};
}

}  // namespace pyseg::crf
