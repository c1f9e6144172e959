"""Non-maximum suppression of boxes."""

import torch
from torch import Tensor

from pyseg._ops import nms as _op  # noqa: F401  registers the fake kernels


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    r"""Greedy non-maximum suppression: keeps the best box, removes those that overlap it too much, and so on.

        removed: IoU(a, b) = |a and b| / (|a| + |b| - |a and b|) > iou_threshold for a kept a of a higher score

    the results of torchvision.ops.nms, to the last bit.

    Args:
        boxes: [K, 4] of x1, y1, x2, y2, any floating dtype (computed in float32, or float64).
        scores: [K]. Of equal scores the first row goes first; NaN counts as the largest.
        iou_threshold: overlaps beyond it remove; compared as doubles.

    Returns:
        The kept rows, int64, by falling score. Not differentiable, deterministic, O(K * kept / vector length). Its size
        is data: under CUDA one synchronisation; `nms_padded` has none.

    Raises:
        RuntimeError: a shape or dtype that does not fit; on CUDA more than 262144 boxes.
    """
    return torch.ops.pyseg.nms(boxes.detach(), scores.detach(), None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` of each class by itself, in one pass: boxes of different `idxs` [K], integers, do not remove each other.

    The kept rows over all classes, by falling score, equal ones in their order: the results of
    torchvision.ops.batched_nms, which above 1000 boxes leaves the order of equal scores open. Boxes are compared where
    they are, not moved apart by class, so that large coordinates lose no precision; torchvision, which up to 1000 boxes
    moves each class by the largest coordinate, lets boxes with negative coordinates remove those of other classes.
    """
    return torch.ops.pyseg.nms(boxes.detach(), scores.detach(), _classes(idxs), iou_threshold)


def nms_padded(
    boxes: Tensor, scores: Tensor, iou_threshold: float, idxs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`nms`, or with `idxs` `batched_nms`, without a size that depends on data.

    Returns rows [K] int64, of which the first `count` are those that `nms` returns and the others -1, and `count`, a
    tensor without dimensions: for CUDA graphs, and for torch.compile without unbacked sizes.
    """
    groups = None if idxs is None else _classes(idxs)
    rows, count = torch.ops.pyseg.nms_padded(boxes.detach(), scores.detach(), groups, iou_threshold)
    return rows, count


def _classes(idxs: Tensor) -> Tensor:
    """Integers as int64; other types are the operator's to refuse."""
    return idxs if idxs.is_floating_point() or idxs.is_complex() else idxs.to(torch.int64)
