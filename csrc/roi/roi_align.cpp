// Schemas of roi_align and multiscale_roi_align: boxes of feature maps, resampled to one size.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // input [N, C, H, W] or [N, C, D, H, W]; boxes [K, 5] (batch index, x1, y1, x2, y2), [K, 6] (batch index, centre x,
  // centre y, width, height, angle in degrees counter-clockwise) or, of volumes, [K, 7] (batch index, x1, y1, z1, x2,
  // y2, z2). mode: "avg" or "max". Output [K, C, *output_size] like input, channels_last where input is.
  m.def(
      "roi_align(Tensor input, Tensor boxes, SymInt[] output_size, float spatial_scale, int sampling_ratio, bool "
      "aligned, str mode) -> Tensor");
  // Each box from the map of its level: floor(canonical_level + log2(sqrt(area) / canonical_size + epsilon[0]) +
  // epsilon[1]), within least_level and most_level, counted from least_level; zeros where there is no such map.
  m.def(
      "multiscale_roi_align(Tensor[] features, Tensor boxes, SymInt[] output_size, float[] spatial_scales, int "
      "sampling_ratio, bool aligned, str mode, int least_level, int most_level, float canonical_size, float "
      "canonical_level, float[2] epsilon) -> Tensor");
  // Gradients of the maps (of these sizes, one after the other, and memory formats) and of the boxes; without elements
  // unless needed. The maps themselves are read for mode "max" and for the boxes only. pyramid: the last five arguments
  // above, six numbers, or nothing for one map.
  m.def(
      "_roi_align_backward(Tensor grad, Tensor[] features, Tensor boxes, SymInt[] sizes, int[] channels_last, float[] "
      "spatial_scales, int sampling_ratio, bool aligned, str mode, float[] pyramid, bool need_features, bool "
      "need_boxes) -> (Tensor[], Tensor)");
}
