// Schemas of atrous_conv2d: 2D convolution with dilation, stride 1, and a fused epilogue.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // y = epilogue(conv2d(input, weight, bias)), epilogue(z) = relu?(scale * z + shift) per output channel.
  // weight [C_out, C_in / groups, 3, 3], on the CPU also [C_out, C_in, 1, 1]; groups is 1 (dense) or C_in = C_out
  // (depthwise). packed: what
  // _atrous_conv2d_pack made of weight, or None.
  m.def(
      "atrous_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int[] padding, "
      "int[] dilation, int groups, bool relu, bool exact, bool allow_tf32, Tensor? packed) -> Tensor");
  // The same into `out`, which may be a channel slice of a larger tensor.
  m.def(
      "atrous_conv2d_out(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int[] padding, "
      "int[] dilation, int groups, bool relu, bool exact, bool allow_tf32, Tensor? packed, Tensor(a!) out) -> ()");
  // Gradients of conv2d with respect to input and weight; one that is not needed comes back with no elements.
  m.def(
      "_atrous_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[] padding, int[] dilation, "
      "int groups, bool exact, bool allow_tf32, bool need_input, bool need_weight) -> (Tensor, Tensor)");
  // A dense weight rearranged for the kernels of the device it lies on.
  m.def("_atrous_conv2d_pack(Tensor weight) -> Tensor");
  // A copy of a map in channels_last, for callers that run several convolutions on it. CPU, float32 and float64.
  m.def("_to_channels_last(Tensor input) -> Tensor");
}
