"""Fake kernels of `pyseg::nms` and `pyseg::nms_padded`. A choice of rows has no gradient."""

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.segmentation_statistics import FLOATS, check, check_shape

_NMS = torch.ops.pyseg.nms.default
_PADDED = torch.ops.pyseg.nms_padded.default


def _check(boxes: Tensor, scores: Tensor, idxs: Tensor | None) -> None:
    op = "nms"
    check(op, boxes.dim() == 2, f"boxes must be [K, 4], got {list(boxes.shape)}")
    check(op, boxes.shape[1] == 4, f"boxes must be [K, 4], got {list(boxes.shape)}")
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        check(op, tensor.dtype in FLOATS, f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    check_shape(op, "scores", scores, [boxes.shape[0]])
    if idxs is not None:
        check_shape(op, "idxs", idxs, [boxes.shape[0]])
        check(op, idxs.dtype == torch.int64, f"idxs must be of int64, got {idxs.dtype}")


def _fake_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    _check(boxes, scores, idxs)
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _fake_padded(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> tuple[Tensor, Tensor]:
    _check(boxes, scores, idxs)
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64), boxes.new_empty((), dtype=torch.int64)


torch.library.register_fake(_NMS, _fake_nms)
torch.library.register_fake(_PADDED, _fake_padded)
