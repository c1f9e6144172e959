"""Losses made of several: one pass over the logits serves all parts.

Arguments, empty cases, dtypes, determinism and cost that all losses share: pyseg.functional.losses; the parts'
formulas: region.py and distribution.py. The parts have no common shape below the image, so reduction="none" returns
[N], or [1] with batch=True: for each image the region part's mean over the classes and the pixel part's mean over the
pixels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyseg.functional.losses._common import (
    Absent,
    Mode,
    Problem,
    Reduction,
    Smooth,
    Table,
    Weight,
    add_ratio,
    check_reduction,
    chosen_classes,
    image_means,
    problem,
    reduce_table,
    safe_pow,
    statistics,
    within,
)
from pyseg.functional.losses.distribution import (
    class_map,
    class_sums,
    element_map,
    element_sums,
    focal_alpha,
    sigmoid_alpha,
)
from pyseg.functional.losses.region import class_weight, dice_score, tversky_score


def _region_part(
    of: Problem, loss: Tensor, present: Tensor, weight: Tensor | None, absent: str, reduction: str
) -> Tensor:
    if reduction == "none":
        return image_means(loss, weight, present, absent)
    return reduce_table(loss, of, reduction, weight, present, absent)


def _all_weights(of: Problem, weight: Weight) -> Tensor | None:
    return class_weight(of, weight, None)


def dice_ce_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
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
    r"""lambda_dice * dice_loss + lambda_ce * cross_entropy; for independent classes the binary cross-entropy.

    `weight` serves both parts. `classes`, `include_background`, `absent` concern Dice alone, and `label_smoothing` the
    cross-entropy of a softmax alone, as in MONAI. Isensee et al. 2018 (nnU-Net, 1809.10486), section 2.

    MONAI's DiceCELoss has these defaults. Its weight multiplies Dice without being divided by its sum, and in the
    binary case weighs positives; with more than one channel its cross-entropy is always that of a softmax.
    """
    name = "dice_ce_loss"
    check_reduction(name, reduction, absent)
    within(name, "label_smoothing", label_smoothing, 0.0, 1.0 if mode == "multiclass" else 0.0)
    of = problem(name, input, target, mode, from_logits, ignore_index)
    chosen = chosen_classes(name, input.shape[1], include_background, classes)
    table = statistics(of, region=True, pixel=True, nll=label_smoothing > 0, batch=batch, group=group)
    regions = table.select(chosen)
    dice = _region_part(
        of, 1 - dice_score(regions, squared, smooth), regions.g > 0, class_weight(of, weight, chosen), absent, reduction
    )
    weights = _all_weights(of, weight)
    if mode == "multiclass":
        sums = class_sums(of, table, weights, label_smoothing, weighted_mean=not target.is_floating_point())
    else:
        sums = element_sums(table, *sigmoid_alpha(name, None, weights, input.shape[1], input))
    return (lambda_dice * dice + lambda_ce * add_ratio(of, *sums, reduction)).to(of.wide)


def dice_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    alpha: float | Sequence[float] | Tensor | None = None,
    gamma: float = 2.0,
    squared: bool = False,
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""lambda_dice * dice_loss + lambda_focal * focal_loss. Zhu et al. 2018 (AnatomyNet, 1808.05238), equation 4.

    `weight` serves both parts; `classes`, `include_background`, `absent` concern Dice alone.

    MONAI's DiceFocalLoss always takes the sigmoid in its focal part, also where softmax=True, leaves class 0 out of it
    too, and divides its mean by elements: mode="multilabel" on one-hot targets is the same as its sigmoid=True.
    """
    name = "dice_focal_loss"
    check_reduction(name, reduction, absent)
    within(name, "gamma", gamma, 0.0)
    of = problem(name, input, target, mode, from_logits, ignore_index)
    channels = input.shape[1]
    chosen = chosen_classes(name, channels, include_background, classes)
    table = statistics(of, region=True, pixel=True, gamma=gamma, batch=batch, group=group)
    regions = table.select(chosen)
    dice = _region_part(
        of, 1 - dice_score(regions, squared, smooth), regions.g > 0, class_weight(of, weight, chosen), absent, reduction
    )
    weights = _all_weights(of, weight)
    if mode == "multiclass":
        factor = focal_alpha(name, alpha, channels, input)
        factor = weights if factor is None else factor if weights is None else factor * weights
        sums = class_sums(of, table, factor)
    else:
        sums = element_sums(table, *sigmoid_alpha(name, alpha, weights, channels, input))
    return (lambda_dice * dice + lambda_focal * add_ratio(of, *sums, reduction)).to(of.wide)


def combo_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    alpha: float = 0.5,
    beta: float | None = None,
    squared: bool = False,
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""alpha * WCE - (1 - alpha) * Dice, WCE = mean(-beta * g * log(p) - (1 - beta) * (1 - g) * log(1 - p)).

    Taghanaki et al. 2018 (1805.02798), equation 3, alpha = 0.5 and beta = 0.5 (what None means). beta > 0.5 costs false
    negatives. A softmax has no term of 1 - p: there WCE is the cross-entropy and beta must be None. The best value is
    -(1 - alpha), not 0. `weight` weighs the classes of Dice alone. With absent="zero" or "skip" an absent class counts
    as Dice 1. No other library has it.
    """
    name = "combo_loss"
    check_reduction(name, reduction, absent)
    within(name, "alpha", alpha, 0.0, 1.0)
    if mode == "multiclass" and beta is not None:
        raise ValueError(f"{name}: beta must be None in multiclass mode, got {beta}")
    of = problem(name, input, target, mode, from_logits, ignore_index)
    chosen = chosen_classes(name, input.shape[1], include_background, classes)
    table = statistics(of, region=True, pixel=True, batch=batch, group=group)
    regions = table.select(chosen)
    # Dice = 1 - loss: what is absent or empty then follows the rules of the losses
    loss = _region_part(
        of, 1 - dice_score(regions, squared, smooth), regions.g > 0, class_weight(of, weight, chosen), absent, reduction
    )
    ones = _region_part(of, torch.ones_like(regions.g), regions.g > 0, class_weight(of, weight, chosen), "include",
                        reduction)  # fmt: skip
    if mode == "multiclass":
        sums = class_sums(of, table, None)
    else:
        sums = element_sums(table, *sigmoid_alpha(name, 0.5 if beta is None else beta, None, input.shape[1], input))
    return (alpha * add_ratio(of, *sums, reduction) - (1 - alpha) * (ones - loss)).to(of.wide)


def exponential_logarithmic_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    w_dice: float = 0.8,
    w_ce: float = 0.2,
    gamma: float = 0.3,
    gamma_ce: float | None = None,
    smooth: Smooth = 1e-5,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    absent: Absent = "include",
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = False,
) -> Tensor:
    r"""w_dice * mean_c((-log Dice_c)^gamma) + w_ce * mean_i(w_t * (-log p_t)^gamma_ce); gamma_ce is gamma if None.

    Wong et al. 2018 (1809.00076), equations 1 to 3, weights 0.8 and 0.2, gamma 0.3. `weight` is the w of the second
    part (the paper: sqrt(sum_k f_k / f_c) of the classes' frequencies f). Logarithms below 1e-12 have gradient 0, since
    for a gamma below 1 the slope at 0 is infinite.

    The power acts on each pixel, so the second part needs a map [N, *S] (independent classes: [N, C, *S]) and a second
    pass over the logits. No other library has it.
    """
    name = "exponential_logarithmic_loss"
    check_reduction(name, reduction, absent)
    if not (gamma > 0 and (gamma_ce is None or gamma_ce > 0)):
        raise ValueError(f"{name}: gamma must be positive, got {gamma} and {gamma_ce}")
    of = problem(name, input, target, mode, from_logits, ignore_index)
    chosen = chosen_classes(name, input.shape[1], include_background, classes)
    regions = statistics(of, region=True, batch=batch).select(chosen)
    score = dice_score(regions, False, smooth).clamp_min(1e-12)
    dice = _region_part(of, safe_pow(-score.log(), gamma), regions.g > 0, None, absent, reduction)

    weights = _all_weights(of, weight)
    map_ = class_map(of, None, 0.0) if mode == "multiclass" else element_map(of, 1.0, 1.0)
    map_ = safe_pow(map_, gamma if gamma_ce is None else gamma_ce)
    valid = of.valid_pixels() if mode == "multiclass" else of.valid_elements()
    counted = torch.ones_like(map_) if valid is None else valid.to(map_.dtype).expand_as(map_)
    factor = counted if weights is None else counted * _target_weight(of, weights)
    dims = 0 if batch else 1
    value, total = ((map_ * factor).flatten(dims), counted.flatten(dims))
    sums = [t.sum(-1, dtype=torch.float64).reshape(-1) for t in (value, total)]
    return (w_dice * dice + w_ce * add_ratio(of, sums[0], sums[1], reduction)).to(of.wide)


def _target_weight(of: Problem, weight: Tensor) -> Tensor:
    """The weight of each pixel's class [N, *S]; for independent classes of each channel, broadcasting."""
    weight = weight.to(of.wide)
    if of.mode != "multiclass":
        return of.channel(weight)
    if of.dense:
        return (of.target * of.channel(weight)).sum(1)
    valid = of.valid()
    labels = of.target.long() if valid is None else of.target.long().where(valid, 0)
    return weight[labels.clamp(0, weight.shape[0] - 1)]  # the operator has reported labels outside the range


def unified_focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    lambda_focal: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    asymmetric: bool = True,
    smooth: Smooth = 1e-7,
    mode: Literal["multiclass", "binary"] = "multiclass",
    from_logits: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""lambda_focal * F + (1 - lambda_focal) * T, each a mean over the classes; class 0 is the background.

        symmetric    F_c = delta_c * mean(g * (1 - p)^(1 - gamma) * -log(p)),   T_c = (1 - TI_c)^gamma
        asymmetric   F_0 = (1 - delta) * mean(g * (1 - p)^gamma * -log(p)),     T_0 = 1 - TI_0
                     F_c = delta * mean(g * -log(p)),                           T_c = (1 - TI_c)^(1 - gamma)

    with delta_0 = 1 - delta, delta_c = delta, and TI = TP / (TP + delta * FN + (1 - delta) * FP): delta weighs false
    NEGATIVES. Yeung et al. 2022 (2102.04525), equations 10 to 17, delta 0.6, gamma 0.5, lambda 0.5. In binary mode the
    one channel stands for two classes. The asymmetric form has two focal exponents, hence two passes over the logits.

    MONAI's AsymmetricUnifiedFocalLoss has delta 0.7 and takes probabilities (from_logits=False), of two classes only.
    """
    name = "unified_focal_loss"
    check_reduction(name, reduction)
    within(name, "lambda_focal", lambda_focal, 0.0, 1.0)
    within(name, "delta", delta, 0.0, 1.0)
    within(name, "gamma", gamma, 0.0, 1.0)
    of = problem(name, input, target, mode, from_logits, ignore_index)
    table = statistics(of, region=True, pixel=True, gamma=gamma if asymmetric else 1 - gamma, count=True, batch=batch,
                       group=group)  # fmt: skip
    plain = statistics(of, pixel=True, batch=batch, group=group) if asymmetric else table
    binary = input.shape[1] == 1
    background, foreground = (table.neg, plain.pos) if binary else (table.pos[:, :1], plain.pos[:, 1:])
    focal = torch.cat([(1 - delta) * background, delta * foreground], 1)
    overlap = 1 - tversky_score(_two_classes(table) if binary else table, 1 - delta, delta, smooth)
    if asymmetric:
        overlap = torch.cat([overlap[:, :1], safe_pow(overlap[:, 1:], 1 - gamma)], 1)
    else:
        overlap = safe_pow(overlap, gamma)
    region = _region_part(of, overlap, overlap, None, "include", reduction)
    pixel = add_ratio(of, focal.sum(1), table.w[:, 0] * focal.shape[1], reduction)
    return (lambda_focal * pixel + (1 - lambda_focal) * region).to(of.wide)


def _two_classes(table: Table) -> Table:
    """p, g and p * g of background and foreground, from those of the foreground [N, 1]."""
    p, g, n, pg = table.p, table.g, table.pixels, table.pg
    sums = [torch.cat(pair, 1) for pair in ((n - p - g + pg, pg), (n - p, p), (n - g, g))]
    return Table(torch.stack([*sums, *[torch.zeros_like(sums[0])] * 8], -1))
