// Schemas of segmentation_statistics: what region and pixel losses share, one row of sums per image and class.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // [N, C, 11] float64: PG, P, G, PP, GG, PPG, POS, NEG, WG, W, NLL (csrc/loss/segmentation_math.h). logits [N, C, *S];
  // target: labels [N, *S] or [N, C, *S]; pixel_weight [N, *S]; activation: softmax, sigmoid or none. The second result is
  // for the backward pass: log(sum(exp(z))) of every pixel, [N, *S], 0 where it is ignored, where softmax, labels and many
  // classes make that worth its memory on the CPU, else [0].
  m.def(
      "segmentation_statistics(Tensor logits, Tensor target, Tensor? pixel_weight, str activation, int? ignore_index, "
      "float gamma, bool region, bool pixel, bool smoothing) -> (Tensor, Tensor)");
  // The gradient with respect to logits; grad [N, C, 11]; log_sum: the second result of the forward pass.
  m.def(
      "_segmentation_statistics_backward(Tensor grad, Tensor logits, Tensor target, Tensor? pixel_weight, "
      "str activation, int? ignore_index, float gamma, bool region, bool pixel, bool smoothing, Tensor log_sum) -> "
      "Tensor");
}
