"""The usual scores of a segmentation, from its confusion matrix.

With m[i, j] the number of pixels of class i that were predicted as j, for class c

    TP = m[c, c]    FN = sum_j m[c, j] - TP    FP = sum_i m[i, c] - TP    TN = sum m - TP - FN - FP

All functions take [*, C, C] of any number type, as `confusion_matrix` makes it (per image too), and compute in float64.
Where a score is 0 / 0, the class is absent and gets the value `absent`, NaN unless told otherwise; means leave NaN out,
so that an absent class does not count, while absent=0 or absent=1 makes it count. A matrix with a negative count, which
is how `confusion_matrix` marks labels out of range on CUDA, gives NaN.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def iou(
    matrix: Tensor, *, reduction: str = "none", absent: float = math.nan, classes: Sequence[int] | None = None
) -> Tensor:
    r"""Intersection over union (Jaccard index): TP / (TP + FP + FN).

    Args:
        matrix: [*, C, C] confusion matrix, rows truth.
        reduction: "none" for [*, C], a value for each class, or "mean" for [*], the mean over classes that are not NaN
            (mIoU), NaN if all are.
        absent: the value of a class that is neither in the target nor predicted.
        classes: only these classes, in this order: leaves a background class out, for instance. Pixels of the others
            still count as errors of these.

    Returns:
        float64, [*, C] or [*].
    """
    tp, fp, fn, _ = _counts("iou", matrix)
    return _scores("iou", matrix, tp, tp + fp + fn, reduction, absent, classes)


def dice(
    matrix: Tensor, *, reduction: str = "none", absent: float = math.nan, classes: Sequence[int] | None = None
) -> Tensor:
    r"""Dice coefficient, or F1: 2 TP / (2 TP + FP + FN). Absent: neither in the target nor predicted. See `iou`."""
    tp, fp, fn, _ = _counts("dice", matrix)
    return _scores("dice", matrix, 2 * tp, 2 * tp + fp + fn, reduction, absent, classes)


def precision(
    matrix: Tensor, *, reduction: str = "none", absent: float = math.nan, classes: Sequence[int] | None = None
) -> Tensor:
    r"""Share of the pixels predicted as a class that are of it: TP / (TP + FP). Absent: never predicted. See `iou`."""
    tp, fp, _, _ = _counts("precision", matrix)
    return _scores("precision", matrix, tp, tp + fp, reduction, absent, classes)


def recall(
    matrix: Tensor, *, reduction: str = "none", absent: float = math.nan, classes: Sequence[int] | None = None
) -> Tensor:
    r"""Share of a class's pixels that were found (sensitivity, class accuracy): TP / (TP + FN). See `iou`.

    Absent: not in the target.
    """
    tp, _, fn, _ = _counts("recall", matrix)
    return _scores("recall", matrix, tp, tp + fn, reduction, absent, classes)


def specificity(
    matrix: Tensor, *, reduction: str = "none", absent: float = math.nan, classes: Sequence[int] | None = None
) -> Tensor:
    r"""Share of the pixels of other classes that were not predicted as this one: TN / (TN + FP). See `iou`.

    Absent: no pixel of another class in the target.
    """
    _, fp, _, tn = _counts("specificity", matrix)
    return _scores("specificity", matrix, tn, tn + fp, reduction, absent, classes)


def pixel_accuracy(matrix: Tensor) -> Tensor:
    r"""Share of all pixels that were predicted right: sum of TP over sum of m. [*]; NaN without a pixel."""
    m = _checked("pixel_accuracy", matrix)
    return m.diagonal(dim1=-2, dim2=-1).sum(-1) / m.sum((-2, -1))


def frequency_weighted_iou(matrix: Tensor) -> Tensor:
    r"""IoU of each class, weighted by the share of pixels that are of it (Long et al. 2015, 1411.4038, section 5). [*].

    Classes that are not in the target have weight 0. NaN without a pixel.
    """
    tp, fp, fn, _ = _counts("frequency_weighted_iou", matrix)
    truth = tp + fn
    union = tp + fp + fn
    weighted = torch.where(union == 0, 0.0, truth * tp / union)
    return weighted.sum(-1) / truth.sum(-1)


def _checked(op: str, matrix: Tensor) -> Tensor:
    """In float64, NaN where labels were out of range."""
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise RuntimeError(f"{op}: matrix must be [*, C, C], got {list(matrix.shape)}")
    m = matrix.to(torch.float64)
    return m.masked_fill((m < 0).any(-1, keepdim=True).any(-2, keepdim=True), math.nan)


def _counts(op: str, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TP, FP, FN, TN, each [*, C]."""
    m = _checked(op, matrix)
    tp = m.diagonal(dim1=-2, dim2=-1)
    fp, fn = m.sum(-2) - tp, m.sum(-1) - tp
    return tp, fp, fn, m.sum((-2, -1)).unsqueeze(-1) - tp - fp - fn


def _scores(
    op: str,
    matrix: Tensor,
    above: Tensor,
    below: Tensor,
    reduction: str,
    absent: float,
    classes: Sequence[int] | None,
) -> Tensor:
    if reduction not in ("none", "mean"):
        raise RuntimeError(f"{op}: reduction must be 'none' or 'mean', got {reduction!r}")
    scores = torch.where(below == 0, absent, above / below)
    if classes is not None:
        wrong = [c for c in classes if not 0 <= c < matrix.shape[-1]]
        if wrong:
            raise RuntimeError(f"{op}: classes must be in [0, {matrix.shape[-1]}), got {list(classes)}")
        scores = torch.stack([scores[..., c] for c in classes], -1)
    return scores.nanmean(-1) if reduction == "mean" else scores
