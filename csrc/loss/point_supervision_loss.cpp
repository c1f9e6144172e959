// Schemas of point_supervision_loss: image-level, point-level and objectness terms of weakly labelled images.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // [N, 7] float64, the sums of csrc/loss/point_supervision_math.h, and [N, C, 5] float64 for the backward pass. logits
  // [N, C, *S]; target: labels [N, *S]; point_weight, objectness [N, *S]; image_labels [N, C]: > 0 present, 0 absent, < 0
  // neither (none: from the points); background: the classes that are no objects.
  m.def(
      "point_supervision_loss(Tensor logits, Tensor target, Tensor? point_weight, Tensor? objectness, "
      "Tensor? image_labels, int[] background, int? ignore_index) -> (Tensor, Tensor)");
  // The gradient with respect to logits; grad [N, 7], of which that of the counts is not looked at; kept: the forward
  // pass's second result.
  m.def(
      "_point_supervision_loss_backward(Tensor grad, Tensor logits, Tensor target, Tensor? point_weight, "
      "Tensor? objectness, int[] background, int? ignore_index, Tensor kept) -> Tensor");
}
