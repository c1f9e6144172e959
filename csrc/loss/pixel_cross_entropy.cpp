// Schemas of pixel_cross_entropy: cross-entropy, focal or not, of every pixel (softmax) or element (sigmoid, none).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // [N, *S] for softmax, else [N, C, *S]; float64 for float64 logits, else float32. logits [N, C, *S]; target: labels
  // [N, *S] or [N, C, *S]; class_weight [C]. The second result is that of segmentation_statistics.
  m.def(
      "pixel_cross_entropy(Tensor logits, Tensor target, Tensor? class_weight, str activation, int? ignore_index, "
      "float gamma, float label_smoothing) -> (Tensor, Tensor)");
  // The gradient with respect to logits; grad like the first result of the forward pass, log_sum
  // its second.
  m.def(
      "_pixel_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? class_weight, str activation, "
      "int? ignore_index, float gamma, float label_smoothing, Tensor log_sum) -> Tensor");
}
