// Schemas of nms: non-maximum suppression of boxes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // boxes [K, 4] (x1, y1, x2, y2), scores [K], idxs [K] int64 (boxes of different ones do not suppress each other): the
  // rows that stay, by falling score. nms_padded: [K] rows, the first of which count, -1 behind them; and their number.
  m.def("nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> Tensor");
  m.def("nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> (Tensor, Tensor)");
}
