// Schemas of warp_to_view and its gradient.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // scores [N, C, H, W] of N / K views for each of K keyframes, depth [K, H', W'], key_intrinsics [K, 3, 3],
  // source_intrinsics [N, 3, 3], pose [N, 4, 4] (keyframe to view), source_depth [N, H, W]. Returns the sum of a keyframe's
  // warped views [K, C, H', W'], channels_last where scores are, and how many saw each pixel, [K, H', W'] uint8.
  m.def(
      "warp_to_view(Tensor scores, Tensor depth, Tensor key_intrinsics, Tensor source_intrinsics, Tensor pose, Tensor? "
      "source_depth, float absolute_tolerance, float relative_tolerance) -> (Tensor, Tensor)");
  // grad [K, C, H', W'] to [N, C, height, width].
  m.def(
      "_warp_to_view_backward(Tensor grad, Tensor depth, Tensor key_intrinsics, Tensor source_intrinsics, Tensor pose, "
      "Tensor? source_depth, SymInt height, SymInt width, bool channels_last, float absolute_tolerance, float "
      "relative_tolerance) -> Tensor");
}
