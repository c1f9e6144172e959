// Schemas of permutohedral_filter: splat, blur and slice on a lattice.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // values [N, C, P] -> [N, C, P]. The lattice's tensors as permutohedral_lattice and permutohedral_vertex_kernel (or
  // three without elements: blur) return them. reverse: blur along the directions in the opposite order, the transpose.
  m.def(
      "permutohedral_filter(Tensor values, Tensor vertex, Tensor weight, Tensor row, Tensor entry, Tensor neighbour, "
      "Tensor offset, Tensor kernel_row, Tensor kernel_vertex, Tensor kernel_weight, bool reverse) -> Tensor");
  // grad like the result -> the gradient of weight, [N, P, d + 1].
  m.def(
      "_permutohedral_filter_backward_weight(Tensor grad, Tensor values, Tensor vertex, Tensor weight, Tensor row, "
      "Tensor entry, Tensor neighbour, Tensor offset, Tensor kernel_row, Tensor kernel_vertex, Tensor kernel_weight, "
      "bool reverse) -> Tensor");
}
