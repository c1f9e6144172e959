// Schema of _activation_vjp: the backward pass of an activation for losses that compute the gradient of p themselves.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // The gradient of sum(scale[n, c] * grad_p * activation(logits)) with respect to logits. grad_p, logits [N, C, *S];
  // scale [N, C]; activation: softmax, sigmoid or none.
  m.def("_activation_vjp(Tensor grad_p, Tensor logits, Tensor scale, str activation) -> Tensor");
}
