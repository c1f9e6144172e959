// Schema of gaussian_filter: a separable Gaussian of 1 to 3 axes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // values [N, C, *S] with a sigma for each axis of S, in elements; 0 leaves an axis as it is. Taps of
  // exp(-x^2 / (2 sigma^2)) for |x| <= int(truncate * sigma + 0.5), zero beyond the border. normalize: the taps of an axis
  // sum to one, else the middle one is one.
  m.def("gaussian_filter(Tensor values, float[] sigma, float truncate, bool normalize) -> Tensor");
}
