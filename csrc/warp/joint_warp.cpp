// Schemas of joint_warp and its gradient: images and labels resampled at the same places.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // image [N, C, *S]; labels [N, *S] of integers (nearest) or [N, K, *S] of floating point (linear); affine [N, d, d + 1]
  // from places of the output to places of the image, in elements; displacement [N, d, *grid] in elements of the image;
  // gain, bias [N, C]. Borders: reflect, replicate, constant. float_output: float32 from an image of uint8. Returns the
  // image [N, C, *size] and the labels, [0] where none were given.
  m.def(
      "joint_warp(Tensor image, Tensor? labels, Tensor affine, Tensor? displacement, Tensor? gain, Tensor? bias, "
      "SymInt[] size, str border, float fill, str label_border, int ignore_index, float cubic, bool float_output) -> "
      "(Tensor, Tensor)");
  // grad [N, C, *size] to the gradient of an image [N, C, *image_size], channels_last if said so.
  m.def(
      "_joint_warp_backward(Tensor grad, Tensor affine, Tensor? displacement, Tensor? gain, SymInt[] image_size, str "
      "border, float cubic, bool channels_last) -> Tensor");
}
