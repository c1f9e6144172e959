// Schemas of paste_masks and crop_masks: masks of boxes into images, and back.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // masks [K, m_h, m_w], boxes [K, 4] (x1, y1, x2, y2) in pixels of an image of height x width. output: "values" like
  // masks [K, height, width], 0 outside the boxes; "bool" whether the value is above threshold; "packed" the same, eight
  // columns a byte [K, height, ceil(width / 8)], the first in the highest bit.
  m.def(
      "paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold, str output, int padding) "
      "-> Tensor");
  m.def(
      "_paste_masks_backward(Tensor grad, Tensor boxes, SymInt mask_height, SymInt mask_width, int padding) -> Tensor");
  // COCO's compressed run lengths of the masks above the threshold, one after the other, and the bytes of each.
  m.def(
      "paste_masks_rle(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold, int padding) -> "
      "(Tensor, Tensor)");
  // masks [N, H, W] of bool or uint8, boxes [K, 5] (index of the mask, x1, y1, x2, y2): roi_align of the masks, float32
  // [K, *size].
  m.def("crop_masks(Tensor masks, Tensor boxes, SymInt[] size, int sampling_ratio, bool aligned) -> Tensor");
}
