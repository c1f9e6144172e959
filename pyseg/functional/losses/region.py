"""Losses on the overlap of regions: a few sums per image and class, from one pass over the logits.

Arguments, empty cases, dtypes, determinism and cost that all losses share: pyseg.functional.losses. In the formulas p
is the probability, g the target, and a sum runs over the pixels of an image that are not ignored. Every loss here
returns [N, C] for reduction="none", one value an image and chosen class, or [C] with batch=True.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyseg._ops.forward_mode import refuse_tangents
from pyseg.functional.losses._common import (
    Absent,
    Mode,
    Problem,
    Reduction,
    Smooth,
    Table,
    Weight,
    check_reduction,
    chosen_classes,
    one_of,
    problem,
    ratio,
    reduce_table,
    safe_pow,
    score,
    smooths,
    statistics,
    take,
    vector,
    within,
)


class _Region(NamedTuple):
    """The table of the chosen classes, and how to reduce what is made of it."""

    of: Problem
    table: Table
    weight: Tensor | None
    reduction: str
    absent: str
    batch: bool
    present: Tensor  # classes with target pixels, before label smoothing

    def reduce(self, loss: Tensor) -> Tensor:
        present = None if self.absent == "include" else self.present
        return reduce_table(loss, self.of, self.reduction, self.weight, present, self.absent, self.batch)


def _region(
    loss: str, input: Tensor, target: Tensor, weight: Weight, mode: str, from_logits: bool, absent: str,
    classes: Sequence[int] | None, include_background: bool, ignore_index: int | None, label_smoothing: float,
    reduction: str, batch: bool, group: Any, count: bool = False,
) -> _Region:  # fmt: skip
    of = problem(loss, input, target, mode, from_logits, ignore_index)
    check_reduction(loss, reduction, absent)
    within(loss, "label_smoothing", label_smoothing, 0.0, 1.0)
    chosen = chosen_classes(loss, input.shape[1], include_background, classes)
    table = statistics(of, region=True, count=count or label_smoothing > 0, batch=batch, group=group)
    present = take(table.g > 0, chosen, 1)
    table = table.smoothed(label_smoothing, of.alternatives).select(chosen)
    return _Region(of, table, class_weight(of, weight, chosen), reduction, absent, batch, present)


def class_weight(of: Problem, weight: Weight, chosen: list[int] | None) -> Tensor | None:
    """The chosen classes' weights."""
    if weight is None:
        return None
    return take(vector(of.loss, "weight", weight, of.logits.shape[1], of.logits, torch.float64), chosen, 0)


# ---- scores of a table, which the compound losses share ----


def dice_score(table: Table, squared: bool, smooth: Smooth) -> Tensor:
    """(2 * sum(p*g) + s) / (sum(p) + sum(g) + s), or with squares in the denominator."""
    p, g = (table.pp, table.gg) if squared else (table.p, table.g)
    return score(2 * table.pg, p + g, smooth)


def tversky_score(table: Table, alpha: float, beta: float, smooth: Smooth) -> Tensor:
    """sum(p*g) over itself, alpha times the false positives and beta times the false negatives."""
    return score(table.pg, (1 - alpha - beta) * table.pg + alpha * table.p + beta * table.g, smooth)


# ---- losses ----


def dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    squared: bool = False,
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""1 - (2 * sum(p*g) + s) / (sum(p) + sum(g) + s) for each class; with `squared`, sum(p^2) + sum(g^2) below.

    Milletari et al. 2016 (V-Net, 1606.04797), section 3, which squares; Drozdzal et al. 2016 (1608.04117), which does
    not.

    MONAI's DiceLoss has these defaults (squared_pred=False, smooth 1e-5, batch=False). smp's has smooth=0, batch=True
    and absent="zero"; kornia's "macro" adds its eps below only, smooth=(0, eps), with absent="skip", and its "micro",
    the default there, sums over the classes first. For soft targets smp takes (p + g - |p - g|) / 2 for p*g.
    """
    of = _region("dice_loss", input, target, weight, mode, from_logits, absent, classes, include_background,
                 ignore_index, label_smoothing, reduction, batch, group)  # fmt: skip
    return of.reduce(1 - dice_score(of.table, squared, smooth))


def log_cosh_dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    squared: bool = False,
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""log(cosh(dice_loss)) for each class: as dice_loss, but flat where the loss is near 0.

    Jadon 2020 (2006.14822), equation 21. No other library has it.
    """
    of = _region("log_cosh_dice_loss", input, target, weight, mode, from_logits, absent, classes, include_background,
                 ignore_index, label_smoothing, reduction, batch, group)  # fmt: skip
    return of.reduce((1 - dice_score(of.table, squared, smooth)).cosh().log())


def generalized_dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    w_type: Literal["square", "simple", "uniform"] = "square",
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""1 - (2 * sum_c w_c sum(p*g) + s) / (sum_c w_c (sum(p) + sum(g)) + s), one value an image.

    w_c is 1 / sum(g)^2 ("square"), 1 / sum(g) ("simple") or 1. Sudre et al. 2017 (1707.03237), section 2.1. A class
    without target pixels has the largest weight of the image's others ("include", as in MONAI) or none.

    reduction="none" returns [N], or [1] with batch=True. MONAI's defaults are the same.
    """
    name = "generalized_dice_loss"
    one_of(name, "w_type", w_type, ("square", "simple", "uniform"))
    of = _region(name, input, target, None, mode, from_logits, absent, classes, include_background, ignore_index,
                 label_smoothing, reduction, batch, group)  # fmt: skip
    table = of.table
    weight = torch.ones_like(table.g)
    if w_type != "uniform":
        present = of.present
        inverse = 1 / torch.where(present, table.g, 1.0)
        weight = torch.where(present, inverse * inverse if w_type == "square" else inverse, 0.0)
        if absent == "include":
            weight = torch.where(present, weight, weight.amax(1, keepdim=True))
    elif absent != "include":
        weight = of.present.to(weight.dtype)
    loss = 1 - score(2 * (weight * table.pg).sum(1), (weight * (table.p + table.g)).sum(1), smooth)
    result = reduce_table(loss.unsqueeze(1), of.of, reduction)
    return result.squeeze(1) if reduction == "none" else result


def jaccard_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    squared: bool = False,
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""1 - (sum(p*g) + s) / (sum(p) + sum(g) - sum(p*g) + s) for each class; with `squared`, squares in p and g alone.

    Rahman and Wang 2016, "Optimizing intersection-over-union in deep neural networks for image segmentation".

    smp has smooth=0, batch=True, absent="zero". MONAI's DiceLoss(jaccard=True) adds half as much: its 1e-5 is 5e-6
    here.
    """
    of = _region("jaccard_loss", input, target, weight, mode, from_logits, absent, classes, include_background,
                 ignore_index, label_smoothing, reduction, batch, group)  # fmt: skip
    table = of.table
    p, g = (table.pp, table.gg) if squared else (table.p, table.g)
    return of.reduce(1 - score(table.pg, p + g - table.pg, smooth))


def tversky_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""1 - (TP + s) / (TP + alpha * FP + beta * FN + s): alpha weighs false POSITIVES, beta false NEGATIVES.

    TP = sum(p*g), FP = sum(p*(1-g)), FN = sum((1-p)*g). Salehi et al. 2017 (1706.05721), equation 3, alpha = 0.3 and
    beta = 0.7. alpha = beta = 0.5 is Dice (whose smooth is twice this one), alpha = beta = 1 is Jaccard.

    MONAI and smp have the same meaning and alpha = beta = 0.5; kornia gives them no defaults, smooth=(0, eps) and
    absent="skip". Abraham and Khan (focal_tversky_loss) swap the letters.
    """
    of = _region("tversky_loss", input, target, weight, mode, from_logits, absent, classes, include_background,
                 ignore_index, label_smoothing, reduction, batch, group)  # fmt: skip
    return of.reduce(1 - tversky_score(of.table, alpha, beta, smooth))


def focal_tversky_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 4 / 3,
    exponent: Literal["1/gamma", "gamma"] = "1/gamma",
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""tversky_loss raised to the power 1/gamma, or gamma, for each class; alpha weighs false positives, as there.

    exponent="1/gamma" is Abraham and Khan 2018 (1810.07842), equation 4, gamma = 4/3; "gamma" is what most published
    code does, where 0.75 means the same. An exponent below 1 has an infinite slope at loss 0: the gradient is 0 below
    a loss of 1e-12.

    smp's TverskyLoss(gamma) raises the mean over the classes, not each class.
    """
    name = "focal_tversky_loss"
    one_of(name, "exponent", exponent, ("1/gamma", "gamma"))
    if not gamma > 0:
        raise ValueError(f"{name}: gamma must be positive, got {gamma}")
    of = _region(name, input, target, weight, mode, from_logits, absent, classes, include_background, ignore_index,
                 label_smoothing, reduction, batch, group)  # fmt: skip
    power = gamma if exponent == "gamma" else 1 / gamma
    return of.reduce(safe_pow(1 - tversky_score(of.table, alpha, beta, smooth), power))


def sensitivity_specificity_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    r: float = 0.05,
    smooth: float = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""r * sum(g*(1-p)^2) / (sum(g) + s) + (1-r) * sum((1-g)*p^2) / (sum(1-g) + s) for each class.

    Brosch et al. 2015, "Deep convolutional encoder networks for multiple sclerosis lesion segmentation", equation 5,
    r = 0.05, with (g-p)^2 as the error, which for g in {0, 1} is what stands here. Known code takes r = 0.1. No other
    library has it.
    """
    name = "sensitivity_specificity_loss"
    within(name, "r", r, 0.0, 1.0)
    of = _region(name, input, target, weight, mode, from_logits, absent, classes, include_background, ignore_index,
                 label_smoothing, reduction, batch, group, count=True)  # fmt: skip
    table = of.table
    missed = ratio(table.g - 2 * table.pg + table.ppg, table.g + smooth, 0.0)
    invented = ratio(table.pp - table.ppg, table.pixels - table.g + smooth, 0.0)
    return of.reduce(r * missed + (1 - r) * invented)


def mcc_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    smooth: Smooth = (0.0, 1e-5),
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""1 - MCC for each class, MCC = (TP*TN - FP*FN + s) / sqrt((TP+FP) * (TP+FN) * (TN+FP) * (TN+FN) + s').

    TP = sum(p*g), FP = sum(p*(1-g)), FN = sum((1-p)*g), TN = sum((1-p)*(1-g)); smooth = (s, s'). Matthews correlation:
    Abhishek and Hamarneh 2021 (2010.13454), equations 3 to 5. Where all pixels or none belong to the class, MCC is 0
    and so the loss is 1, but for a prediction that is exactly right, whose loss is 0.

    MONAI's defaults are the same. smp's MCCLoss takes probabilities, sums over the batch and adds 1e-5 to each of TP,
    TN, FP, FN.
    """
    of = _region("mcc_loss", input, target, weight, mode, from_logits, absent, classes, include_background,
                 ignore_index, label_smoothing, reduction, batch, group, count=True)  # fmt: skip
    (above, below), table = smooths(smooth), of.table
    p, g, n = table.p, table.g, table.pixels
    false_positives, false_negatives = p - table.pg, g - table.pg
    numerator = table.pg * (n - p - g + table.pg) - false_positives * false_negatives + above
    product = p * g * ((n - p) * (n - g)).clamp_min(0.0) + below  # n - p may round to a little below zero
    defined = product > 0
    mcc = torch.where(defined, numerator / torch.where(defined, product, 1.0).sqrt(), 0.0)
    exact = (false_positives == 0) & (false_negatives == 0)
    return of.reduce(torch.where(exact, 0.0, 1 - mcc))


# ---- Lovasz: sorted errors ----


def _present(of: Problem, batch: bool) -> Tensor:
    """Which classes have target pixels: [N, C], or [1, C] over the batch."""
    channels = of.logits.shape[1]
    valid = of.valid()
    if of.dense or channels == 1:
        target = of.target if of.dense else of.target.unsqueeze(1)
        positive = target >= 0.5 if target.is_floating_point() else target > 0  # as the operator takes them
        positive = positive if valid is None else positive & valid.view_as(target)
        present = positive.flatten(2).any(2)
    else:
        labels = of.target.flatten(1).long()
        labels = labels if valid is None else labels.masked_fill(~valid.flatten(1), channels)
        labels = labels.clamp(0, channels)  # the operator has reported labels outside the range
        marks = labels.new_zeros((labels.shape[0], channels + 1), dtype=torch.bool)
        present = marks.scatter(1, labels, True)[:, :channels]
    return present.any(0, keepdim=True) if batch else present


def _lovasz(
    of: Problem, activation: str, weight: Weight, absent: str, chosen: list[int] | None, reduction: str, batch: bool
) -> Tensor:
    check_reduction(of.loss, reduction, absent)
    refuse_tangents(of.loss, of.logits)
    loss, _ = torch.ops.pyseg.lovasz_statistics(of.logits, of.target, activation, of.ignore_index, not batch)
    present = None if absent == "include" else _present(of, batch)
    loss, present = take(loss, chosen, 1), None if present is None else take(present, chosen, 1)
    return reduce_table(loss, of, reduction, class_weight(of, weight, chosen), present, absent, batch)


def lovasz_softmax_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "skip",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = True,
) -> Tensor:
    r"""The Lovasz extension of the Jaccard loss, at the errors |g - p| of each class.

        loss_c = sum_i e_(i) * (J(i) - J(i-1)),   J(i) = 1 - (G - G_i) / (G + i - G_i)

    with the errors e sorted descending, G target pixels in all and G_i among the first i. Berman et al. 2018
    (1705.08790), equation 8 and algorithm 1; the errors are sorted over the batch unless batch=False. absent="skip" is
    the paper's "present" classes.

    It keeps one tensor like the logits (float32 for 16-bit logits) and, while it sorts, a few maps of one class.
    O(N C S log(N S)).

    smp has the same defaults; kornia sorts per image and averages all classes: batch=False, absent="include".
    """
    name = "lovasz_softmax_loss"
    of = problem(name, input, target, mode, from_logits, ignore_index)
    chosen = chosen_classes(name, input.shape[1], include_background, classes)
    return _lovasz(of, of.activation, weight, absent, chosen, reduction, batch)


def lovasz_hinge_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    mode: Literal["binary", "multilabel"] = "binary",
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = True,
) -> Tensor:
    r"""The Lovasz extension of the Jaccard loss, at the margins max(0, 1 - z * (2g - 1)) of logits z.

    Berman et al. 2018 (1705.08790), equation 5. Sorted over the batch unless batch=False. Cost as lovasz_softmax_loss.

    smp sorts over the channels of multilabel logits too; kornia sorts per image, batch=False.
    """
    name = "lovasz_hinge_loss"
    one_of(name, "mode", mode, ("binary", "multilabel"))
    of = problem(name, input, target, mode, True, ignore_index)
    return _lovasz(of, "hinge", weight, absent, chosen_classes(name, input.shape[1], True, classes), reduction, batch)
