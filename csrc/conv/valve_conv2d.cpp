// Schemas of valve_conv2d and region_gate: features gated by a convolution of a region map.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // y = relu?(features * r), r = conv2d(region, weight) + bias; features + r with `additive`. features [N, K, H, W],
  // region [N, R, H_r, W_r], weight [K, R, kH, kW], bias [K]; the convolution's output has the features' H and W.
  m.def(
      "region_gate(Tensor features, Tensor region, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] "
      "dilation, bool additive, bool relu) -> Tensor");
  // The same over the features, without gradients.
  m.def(
      "region_gate_(Tensor(a!) features, Tensor region, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, bool additive, bool relu) -> ()");
  // Gradients of features, region, weight and bias; without elements unless needed.
  m.def(
      "_region_gate_backward(Tensor grad, Tensor features, Tensor region, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, bool additive, bool relu, bool need_features, bool need_region, bool "
      "need_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  // region_gate of features = conv2d(input, weight) + bias, which are never stored. input [N, C, H_i, W_i], weight [K,
  // C, kH, kW]; valve_* are region_gate's.
  m.def(
      "valve_conv2d(Tensor input, Tensor region, Tensor weight, Tensor? bias, Tensor valve_weight, Tensor? valve_bias, "
      "int[] stride, int[] padding, int[] dilation, int[] valve_stride, int[] valve_padding, int[] valve_dilation, "
      "bool "
      "additive, bool relu) -> Tensor");
  // Gradients of weight, bias, valve_weight and valve_bias.
  m.def(
      "_valve_conv2d_backward(Tensor grad, Tensor input, Tensor region, Tensor weight, Tensor? bias, Tensor "
      "valve_weight, Tensor? valve_bias, int[] stride, int[] padding, int[] dilation, int[] valve_stride, int[] "
      "valve_padding, int[] valve_dilation, bool additive, bool relu) -> (Tensor, Tensor, Tensor, Tensor)");
}
