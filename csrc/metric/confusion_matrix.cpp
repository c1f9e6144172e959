// Schema of confusion_matrix: what was predicted against what is there, counted pixel by pixel.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // Row: class in target, column: predicted class. prediction: labels of an integer type, of target's shape [N, *S], or
  // floats [N, C, *S] with C = num_classes, of which the largest wins. Pixels whose target is ignore_index are left
  // out. int64 [num_classes, num_classes], or with per_image [N, num_classes, num_classes].
  m.def(
      "confusion_matrix(Tensor prediction, Tensor target, int num_classes, int? ignore_index=None, "
      "bool per_image=False) -> Tensor");
}
