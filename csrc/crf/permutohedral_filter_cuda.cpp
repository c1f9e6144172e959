// permutohedral_filter on CUDA devices: checks, buffers, order of the launches, registration.
#include <torch/csrc/stable/library.h>

#include "crf/crf_cuda.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

// Values of a lattice's points on their way through it.
class Filtering {
 public:
  Filtering(const char* op, const Lattice& lattice, const Tensor& values)
      : launches_(op, values),
        kept_(values),
        view_(view_of(lattice, kept_)),
        rows_{.float64 = values.scalar_type() == ScalarType::Double, .channels = values.size(1)},
        items_(new_items(view_, rows_.float64, kept_)),
        carry_(new_carry(segments_of(view_), rows_, kept_)) {
    launches_.check(launch_items(view_, {nullptr, 0}, rows_.float64, items_, stream()));
  }

  // [N * P, stride]
  const void* pack(const Tensor& planes) {
    void* const rows = kept_.numbers(view_.images * view_.points * rows_.stride(), rows_.float64);
    launches_.check(launch_pack(rows_, planes.data_ptr(), view_.images, view_.points, 1, 0, rows, stream()));
    return rows;
  }

  // [M, stride]
  const void* vertices(const void* rows, bool reverse) {
    const auto table = [&] { return kept_.numbers(view_.vertices * rows_.stride(), rows_.float64); };
    void* const result = table();
    launches_.check(launch_vertices(view_, rows_, items_, carry_, rows, reverse, result, table(), stream()));
    return result;
  }

  void slice(const void* table, const Tensor& planes) const {
    launches_.check(launch_slice(view_, rows_, table, planes.data_ptr(), stream()));
  }

  void weight_gradient(const void* values, const void* grad, const void* of_values, const void* of_grad,
                       const Tensor& grad_weight) const {
    launches_.check(
        launch_weight_gradient(view_, rows_, values, grad, of_values, of_grad, grad_weight.data_ptr(), stream()));
  }

 private:
  CudaLaunches launches_;
  Kept kept_;
  LatticeView view_;
  Rows rows_;
  SplatItems items_;
  SplatCarry carry_;

  cudaStream_t stream() const { return launches_.stream(); }
};

Tensor permutohedral_filter(Tensor values, Tensor vertex, Tensor weight, Tensor row, Tensor entry, Tensor neighbour,
                            Tensor offset, Tensor kernel_row, Tensor kernel_vertex, Tensor kernel_weight,
                            bool reverse) {
  const Lattice lattice{vertex, weight, row, entry, neighbour, offset, kernel_row, kernel_vertex, kernel_weight};
  const ScalarType type = check_filter(kFilter, values, lattice);
  const Tensor wide = as_type(values, type);
  const Tensor output = torch::stable::new_empty(wide, wide.sizes());
  if (output.numel() > 0) {
    Filtering filtering(kFilter, lattice, wide);
    filtering.slice(filtering.vertices(filtering.pack(wide), reverse), output);
  }
  return values.scalar_type() == type ? output : torch::stable::to(output, values.scalar_type());
}

Tensor permutohedral_filter_backward_weight(Tensor grad, Tensor values, Tensor vertex, Tensor weight, Tensor row,
                                            Tensor entry, Tensor neighbour, Tensor offset, Tensor kernel_row,
                                            Tensor kernel_vertex, Tensor kernel_weight, bool reverse) {
  const Lattice lattice{vertex, weight, row, entry, neighbour, offset, kernel_row, kernel_vertex, kernel_weight};
  const ScalarType type = check_filter_backward(grad, values, lattice);
  const Tensor wide = as_type(values, type), wide_grad = as_type(grad, type);
  Tensor output = torch::stable::new_empty(wide, vertex.sizes());
  if (output.numel() == 0) return output;
  if (values.numel() == 0) return torch::stable::zero_(output);
  Filtering filtering(kFilterBackward, lattice, wide);
  const void *const rows = filtering.pack(wide), *const grad_rows = filtering.pack(wide_grad);
  const void* const of_values = filtering.vertices(rows, reverse);
  const void* const of_grad = filtering.vertices(grad_rows, !reverse);
  filtering.weight_gradient(rows, grad_rows, of_values, of_grad, output);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("permutohedral_filter", TORCH_BOX(&permutohedral_filter));
  m.impl("_permutohedral_filter_backward_weight", TORCH_BOX(&permutohedral_filter_backward_weight));
}

}  // namespace pyseg::crf
