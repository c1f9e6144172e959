// Schema of _mean_field: the iterations of dense_crf, without gradients.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // unary [N, C, *S] energies, S of 1 to 3 axes; initial: marginals to start from, else softmax(-unary / temperature).
  // Kernels: first those on lattices, nine tensors each (vertex, weight, row, entry, neighbour, offset, kernel_row,
  // kernel_vertex, kernel_weight), then separable Gaussian ones with as many sigmas each as S has axes and a peak of
  // one; coarse: these may be filtered on a grid of every second pixel (the CPU does where they are wide enough). For each
  // kernel in this order: scale_in and scale_out [N, P], [1, P] or [0] (1 everywhere); compatibility [C]
  // or [C, C]. message = scale_out * filter(scale_in * marginals); energy = unary + sum over kernels of compatibility *
  // message (its product with a matrix); marginals = softmax(-energy / temperature).
  m.def(
      "_mean_field(Tensor unary, Tensor? initial, int iterations, float temperature, Tensor[] lattices, float[] "
      "sigmas, "
      "float truncate, bool coarse, Tensor[] scale_in, Tensor[] scale_out, Tensor[] compatibility) -> Tensor");
}
