// permutohedral_filter on the CPU: layouts, workspace, threads, registration.
#include <torch/csrc/stable/library.h>

#include "crf/crf_cpu.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

// A lattice whose tensors lie contiguously.
struct Tensors {
  Tensor vertex, weight, row, entry, neighbour, offset, kernel_row, kernel_vertex, kernel_weight;
  Lattice lattice() const {
    return {vertex, weight, row, entry, neighbour, offset, kernel_row, kernel_vertex, kernel_weight};
  }
};

void run(const char* op, const Lattice& given, FilterArgs args) {
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensors tensors{dense(given.vertex),     dense(given.weight),        dense(given.row),
                        dense(given.entry),      dense(given.neighbour),     dense(given.offset),
                        dense(given.kernel_row), dense(given.kernel_vertex), dense(given.kernel_weight)};
  const Lattice lattice = tensors.lattice();
  check_lattice_contents(op, lattice);
  args.lattice = input_of(lattice);
  const Workers workers = workers_for(8. * double(args.images) * double(args.points) * double(args.channels));
  const Workspace workspace(tensors.weight, crf_kernels().filter_workspace(args, workers.count));
  crf_kernels().filter(args, workspace.data, workers);
}

FilterArgs args_of(const Tensor& values, bool reverse) {
  return {.lattice = {},
          .images = values.size(0),
          .channels = values.size(1),
          .points = values.size(2),
          .float64 = values.scalar_type() == ScalarType::Double,
          .reverse = reverse,
          .values = values.data_ptr(),
          .output = nullptr,
          .grad = nullptr,
          .grad_weight = nullptr};
}

Tensor permutohedral_filter(Tensor values, Tensor vertex, Tensor weight, Tensor row, Tensor entry, Tensor neighbour,
                            Tensor offset, Tensor kernel_row, Tensor kernel_vertex, Tensor kernel_weight,
                            bool reverse) {
  const Lattice lattice{vertex, weight, row, entry, neighbour, offset, kernel_row, kernel_vertex, kernel_weight};
  const ScalarType type = check_filter(kFilter, values, lattice);
  const Tensor wide = as_type(values, type);
  Tensor output = torch::stable::new_empty(wide, wide.sizes());
  if (output.numel() > 0) {
    FilterArgs args = args_of(wide, reverse);
    args.output = output.data_ptr();
    run(kFilter, lattice, args);
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
  FilterArgs args = args_of(wide, reverse);
  args.grad = wide_grad.data_ptr();
  args.grad_weight = output.data_ptr();
  run(kFilterBackward, lattice, args);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("permutohedral_filter", TORCH_BOX(&permutohedral_filter));
  m.impl("_permutohedral_filter_backward_weight", TORCH_BOX(&permutohedral_filter_backward_weight));
}

}  // namespace pyseg::crf
