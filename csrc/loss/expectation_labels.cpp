// Schema of expectation_labels: the E-step of weakly supervised segmentation, the best of biased scores in each pixel.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // (labels [N, *S] int64, bias [N, C] float64 for float64 logits, else float32; -inf for classes that are excluded).
  // logits [N, C, *S]; present [N, C] bool, class 0 is the background; valid [N, *S] bool, pixels without it get
  // ignore_index. Biases start at background_bias and foreground_bias and are raised until each present class has its
  // share of the valid pixels, in at most `sweeps` rounds over the classes.
  m.def(
      "expectation_labels(Tensor logits, Tensor present, Tensor? valid, float background_bias, float foreground_bias, "
      "float background_share, float foreground_share, bool exclude_absent, int sweeps, int ignore_index) -> (Tensor, "
      "Tensor)");
}
