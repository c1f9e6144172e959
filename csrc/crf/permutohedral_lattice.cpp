// Schemas of permutohedral_lattice: the vertices that a set of points needs, and their weights.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // features [N, d, P], d from 1 to 8, in standard deviations. max_vertices: -1, or the size M of padded results.
  // vertex [N, P, d + 1] int32, over all images (-1: a point that is left out, CUDA only); weight [N, P, d + 1];
  // row [M + 1], entry [N * P * (d + 1)] int32: positions in weight by vertex (CUDA; on the CPU [0]); neighbour
  // [d + 1, M, 2] int32, -1 for none; offset [N + 1] int64: first vertex of each image, and their number; key [M, d]
  // int16: all coordinates of a vertex but the last.
  m.def(
      "permutohedral_lattice(Tensor features, float scale, int max_vertices) -> "
      "(Tensor vertex, Tensor weight, Tensor row, Tensor entry, Tensor neighbour, Tensor offset, Tensor key)");
  // grad_weight [N, P, d + 1] -> [N, d, P].
  m.def("_permutohedral_lattice_backward(Tensor grad_weight, Tensor features, float scale) -> Tensor");
  // The product that stands in for the blur: exp(-r^2 / (2 variance)) between the vertices of an image with r <= cutoff,
  // r in standard deviations, as compressed rows: row [M + 1] int64, vertex int32 and weight [entries].
  m.def(
      "permutohedral_vertex_kernel(Tensor key, Tensor offset, float scale, float cutoff, float variance, bool float64) "
      "-> "
      "(Tensor row, Tensor vertex, Tensor weight)");
}
