// Schema of fuse_query: a 1x1 convolution of a map, a vector tiled over it and eight coordinates of each pixel.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // input [N, C, H, W], weight [K, C], offset [N, K] (what the vector adds), coordinates [K, 8] (weights of xmin, ymin,
  // xmax, ymax, xcentre, ycentre, 1/W, 1/H). Returns output [N, K, H, W], channels_last where input is, and with
  // `normalize`, in float32 and float64, one over each pixel's norm [N, H, W] for the gradient, otherwise nothing [0].
  m.def(
      "fuse_query(Tensor input, Tensor weight, Tensor offset, Tensor coordinates, bool normalize, bool relu) "
      "-> (Tensor, Tensor)");
  // output: with ReLU, scale: with normalize. Gradients of input and weight are empty where they are not wanted.
  m.def(
      "_fuse_query_backward(Tensor grad, Tensor input, Tensor weight, Tensor? output, Tensor? scale, bool need_input, "
      "bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)");
}
