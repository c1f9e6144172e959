// Schemas of segmentation_statistics: what region and pixel losses share, one row of sums per image and class.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // [N, C, 11] float64: PG, P, G, PP, GG, PPG, POS, NEG, WG, W, NLL (csrc/loss/segmentation_math.h). logits [N, C, *S];
  // target: labels [N, *S] or [N, C, *S]; pixel_weight [N, *S]; activation: softmax, sigmoid or none.
  m.def(
      "segmentation_statistics(Tensor logits, Tensor target, Tensor? pixel_weight, str activation, int? ignore_index, "
      "float gamma, bool region, bool pixel, bool smoothing) -> Tensor");
  // The gradient with respect to logits; grad [N, C, 11].
  m.def(
      "_segmentation_statistics_backward(Tensor grad, Tensor logits, Tensor target, Tensor? pixel_weight, "
      "str activation, int? ignore_index, float gamma, bool region, bool pixel, bool smoothing) -> Tensor");
}
