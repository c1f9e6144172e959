// Schema of _hausdorff_dt: the Hausdorff loss by distance transforms where targets are labels. CPU only: on CUDA, and
// for what this does not take, pyseg/functional/losses/boundary.py puts the loss together from other operators.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // (loss [N, C] float64, error [N, C, *S] contiguous, float64 for such logits, else float32). With d the squared
  // distances to the other side of p > 0.5 and of the target (one_sided: of the target alone), both 0 in maps that have
  // one value only: loss = mean((p - g)^2 d), error = d loss / d p. 0 for classes that are not listed. logits
  // [N, C, *S] of a softmax over C, up to 255; target uint8 [N, *S]; spacing: of each axis of S, 2 or 3.
  m.def(
      "_hausdorff_dt(Tensor logits, Tensor target, int[] classes, float[] spacing, bool one_sided) -> "
      "(Tensor, Tensor)");
}
