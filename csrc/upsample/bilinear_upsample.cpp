// Schemas of bilinear_upsample and upsample_concat: maps resampled to one size.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // input [N, C, H, W] to [N, C, *size]. scale_factors: nothing, or how many times larger the output is along H and W,
  // where coordinates are to follow from that and not from the sizes. The output is channels_last where input is.
  m.def("bilinear_upsample(Tensor input, SymInt[] size, bool align_corners, float[] scale_factors) -> Tensor");
  // inputs [N, C_i, H_i, W_i] to [N, sum of C_i, *size], channels_last where one of them is.
  m.def("upsample_concat(Tensor[] inputs, SymInt[] size, bool align_corners) -> Tensor");
  // Gradients of maps of these sizes ([N, C_i, H_i, W_i], one after the other), all in one memory format.
  m.def(
      "_upsample_concat_backward(Tensor grad, SymInt[] sizes, bool channels_last, bool align_corners, float[] "
      "scale_factors) -> Tensor[]");
}
