// Schema of lovasz_statistics: the Lovasz extension of the Jaccard loss, one number per class and image.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // (loss [N or 1, C] float64, grad_p like logits but float32 for 16 bits). activation: softmax, sigmoid, none (errors
  // |g - p|) or hinge (errors max(0, 1 - z (2 g - 1))). grad_p: the gradient of a class's loss with respect to its p,
  // of hinge to its z; what _activation_vjp takes. logits [N, C, *S]; target: labels [N, *S] or [N, C, *S], of which
  // 0.5 and above is foreground.
  m.def(
      "lovasz_statistics(Tensor logits, Tensor target, str activation, int? ignore_index, bool per_image) -> (Tensor, "
      "Tensor)");
}
