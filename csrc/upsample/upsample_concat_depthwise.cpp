// Schema of upsample_concat_depthwise: the front of Joint Pyramid Upsampling in one pass.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // inputs [N, C_i, H_i, W_i]; weight [R, C, 3, 3], scale and shift [R, C], C = sum of C_i, of the inputs' dtype or,
  // beside 16-bit inputs, float32. Output [R, N, C, *size], each [N, C, *size] channels_last where an input is.
  m.def(
      "upsample_concat_depthwise(Tensor[] inputs, Tensor weight, Tensor? scale, Tensor? shift, SymInt[] size, int[] "
      "dilations, bool align_corners) -> Tensor");
  // Gradients of the inputs, all in one memory format, and of weight and shift for scale 1, [R, C, 3, 3] and [R, C];
  // without elements unless needed. weight already has the scale in it; it and its gradients are of the dtype that is
  // computed in.
  m.def(
      "_upsample_concat_depthwise_backward(Tensor grad, Tensor[] inputs, Tensor weight, int[] dilations, bool "
      "align_corners, bool need_inputs, bool need_weight) -> (Tensor[], Tensor, Tensor)");
}
