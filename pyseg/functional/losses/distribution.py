"""Losses on the distribution of classes at each pixel: cross-entropies and what weighs or selects their pixels.

Arguments, empty cases, dtypes, determinism and cost that all losses share: pyseg.functional.losses. p is the
probability, g the target. Sums and means come from one pass over the logits that stores no map; reduction="none"
returns the map, [N, *S] for softmax and [N, C, *S] for independent classes, ignored pixels 0.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyseg._ops.forward_mode import refuse_tangents
from pyseg.functional.distance_transform import distance_to_two_nearest_objects
from pyseg.functional.losses._common import (
    Mode,
    Problem,
    Reduction,
    Table,
    Weight,
    add_ratio,
    all_reduce,
    check_reduction,
    one_of,
    problem,
    ratio,
    statistics,
    vector,
    within,
)


def _map(of: Problem, class_weight: Tensor | None = None, gamma: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    refuse_tangents(of.loss, of.logits)
    weight = None if class_weight is None else class_weight.to(of.wide)
    loss: Tensor
    loss, _ = torch.ops.pyseg.pixel_cross_entropy(
        of.logits, of.target, weight, of.activation, of.ignore_index, float(gamma), float(label_smoothing)
    )
    return loss


def _reduce_map(of: Problem, loss: Tensor, reduction: str, total: Tensor, group: Any) -> Tensor:
    """`total` is what a mean divides by."""
    if reduction == "none":
        return loss
    value = all_reduce(loss.sum(dtype=torch.float64), group)
    if reduction == "mean":
        value = ratio(value, all_reduce(total, group), 0.0)
    return value.to(of.wide)


def _elements(of: Problem) -> Tensor:
    """How many elements of the map [N, C, *S] are not ignored."""
    valid = of.valid_elements()
    if valid is None:
        return torch.full((), float(of.logits.numel()), dtype=torch.float64, device=of.logits.device)
    return valid.expand_as(of.logits).sum(dtype=torch.float64)


# ---- softmax ----


def class_sums(
    of: Problem, table: Table, weight: Tensor | None, label_smoothing: float = 0.0, weighted_mean: bool = False
) -> tuple[Tensor, Tensor]:
    """Each image's cross-entropy over the pixels of a softmax, and what its mean divides by, [N] each."""
    value = (table.pos if weight is None else table.pos * weight).sum(1)
    if label_smoothing > 0:
        nll = (table.nll if weight is None else table.nll * weight).sum(1)
        value = (1 - label_smoothing) * value + label_smoothing / of.logits.shape[1] * nll
    if not weighted_mean:
        return value, table.w[:, 0]
    return value, (table.wg if weight is None else table.wg * weight).sum(1)


def element_sums(table: Table, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's cross-entropy over the elements of independent classes, and their number, [N] each."""
    return (positive * table.pos + negative * table.neg).sum(1), table.w.sum(1)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    pixel_weight: Tensor | None = None,
    from_logits: bool = True,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    group: Any = None,
) -> Tensor:
    r"""-sum_c weight_c * g_c * log(p_c) at each pixel, times pixel_weight: torch's cross_entropy with a weight map.

    pixel_weight is [N, *S], such as unet_border_weights makes it: Ronneberger et al. 2015 (1505.04597), equation 1.
    Class labels: the mean divides by the weights of the pixels, weight[target] * pixel_weight. Soft targets [N, C, *S]:
    by the pixels, or their pixel_weight. Label smoothing and ignore_index=-100 are torch's.

    torch returns NaN where all pixels are ignored; this returns 0. smp's SoftCrossEntropyLoss divides by all pixels,
    ignored ones too.
    """
    name = "cross_entropy"
    check_reduction(name, reduction)
    within(name, "label_smoothing", label_smoothing, 0.0, 1.0)
    of = problem(name, input, target, "multiclass", from_logits, ignore_index)
    channels = input.shape[1]
    weights = None if weight is None else vector(name, "weight", weight, channels, input, torch.float64)
    if reduction == "none":
        loss = class_map(of, weights, 0.0, label_smoothing)
        return loss if pixel_weight is None else loss * pixel_weight.to(loss.dtype)
    table = statistics(of, pixel=True, pixel_weight=pixel_weight, nll=label_smoothing > 0, batch=True, group=group)
    sums = class_sums(of, table, weights, label_smoothing, weighted_mean=not target.is_floating_point())
    return add_ratio(of, *sums, reduction)


def class_map(of: Problem, weight: Tensor | None, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-sum_c w_c g_c (1 - p_c)^gamma log(p_c), [N, *S], of a softmax or of probabilities over classes."""
    if of.activation == "softmax":
        return _map(of, weight, gamma, label_smoothing)
    # Elementwise for probabilities, with the term of 1 - p: with g = 1 that term is 0.
    channels = of.logits.shape[1]
    positive = _map(of._replace(target=torch.ones_like(of.logits), ignore_index=None), None, gamma)
    if of.dense:
        g, valid = of.target.to(positive.dtype), of.valid()
        g = g if valid is None else g.masked_fill(~valid, 0.0)
    else:
        _map(of)  # reports labels that are none
        classes = torch.arange(channels, device=of.target.device)
        g = (of.target.unsqueeze(1) == of.channel(classes)).to(positive.dtype)
        valid = of.valid()
        if valid is not None:
            g = g.masked_fill(~valid.unsqueeze(1), 0.0)
        if of.target.is_cuda:  # where the operator reports by NaN
            wrong = (of.target < 0) | (of.target >= channels)
            wrong = wrong if valid is None else wrong & valid
            g = g.masked_fill(wrong.unsqueeze(1), float("nan"))
    g = g * (1 - label_smoothing) + label_smoothing / channels * g.sum(1, keepdim=True)
    return (positive * g * (1.0 if weight is None else of.channel(weight.to(g.dtype)))).sum(1)


def unet_border_weights(
    instances: Tensor,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weight: Tensor | None = None,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    r"""w = wc + w0 * exp(-(d1 + d2)^2 / (2 * sigma^2)): the pixel weights of U-Net, which open gaps between cells.

    d1 and d2 are the distances to the nearest and the second nearest object. Ronneberger et al. 2015 (1505.04597),
    equation 2, with its w0 = 10 and sigma = 5.

    Args:
        instances: integers [*, H, W], or [*, D, H, W] with `spacing` of three: 0 is background, every other value one
            object. The border term is added to background pixels only, as in the paper's figure.
        class_weight: wc, of the shape of `instances` (1 if left out).
        spacing: of the pixels, in the unit of sigma.

    Returns:
        float32 of the shape of `instances`. Fewer than two objects in an image: wc alone.
    """
    first, second = distance_to_two_nearest_objects(instances, spacing=spacing)
    border = w0 * torch.exp(-((first + second) ** 2) / (2 * sigma**2))
    border = torch.where(instances == 0, border, 0.0)
    return border + (1.0 if class_weight is None else class_weight.to(border.dtype))


# ---- independent classes ----


def element_map(of: Problem, positive: Any, negative: Any, gamma: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """positive * g' * POS + negative * (1 - g') * NEG for each element; ignored elements 0. g' is the smoothed target.

    positive and negative are numbers or broadcast against [N, C, *S].
    """
    soft = of.target.is_floating_point() or label_smoothing > 0
    if not soft:
        loss = _map(of, None, gamma)
        return loss * torch.where(one_hot(of), positive, negative).to(loss.dtype)
    if not of.target.is_floating_point() and not of.target.is_cuda:
        _map(of)  # reports labels that are none
    # The map is linear in g: two of them, for g = 1 and g = 0, allow any weights.
    hard = of._replace(ignore_index=None)
    ones = _map(hard._replace(target=torch.ones_like(of.logits)), None, gamma)
    zeros = _map(hard._replace(target=torch.zeros_like(of.logits)), None, gamma)
    g = (of.target if of.target.is_floating_point() else one_hot(of)).to(ones.dtype)
    g = g * (1 - label_smoothing) + label_smoothing / 2
    loss = positive * g * ones + negative * (1 - g) * zeros
    valid = of.valid_elements()
    return (loss if valid is None else torch.where(valid, loss, 0.0)).to(of.wide)


def one_hot(of: Problem) -> Tensor:
    """Where the target is 1, bool, broadcasting against [N, C, *S]."""
    if of.dense:
        return of.target == 1
    classes = torch.arange(of.logits.shape[1], device=of.target.device)
    return of.target.unsqueeze(1) == (1 if of.logits.shape[1] == 1 else of.channel(classes))


def weighted_binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    beta: float | Sequence[float] | Tensor = 1.0,
    pixel_weight: Tensor | None = None,
    mode: Literal["binary", "multilabel"] = "binary",
    from_logits: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    group: Any = None,
) -> Tensor:
    r"""-(beta * g * log(p) + (1 - g) * log(1 - p)) for each element, times weight of its class and pixel_weight.

    beta > 1 costs false negatives, beta < 1 false positives: Jadon 2020 (2006.14822), equation 3; torch calls it
    pos_weight. `label_smoothing` e replaces g by g*(1 - e) + e/2. The mean divides by the elements that are not
    ignored (or their pixel_weight); weight and beta do not change that.

    torch's binary_cross_entropy_with_logits is the same for the same weights. smp's SoftBCEWithLogitsLoss divides by
    all elements, ignored ones too, and its smooth_factor e replaces g by g*(1 - e) + (1 - g)*e, which is 2*e here.
    """
    name = "weighted_binary_cross_entropy"
    check_reduction(name, reduction)
    one_of(name, "mode", mode, ("binary", "multilabel"))
    within(name, "label_smoothing", label_smoothing, 0.0, 1.0)
    of = problem(name, input, target, mode, from_logits, ignore_index)
    channels = input.shape[1]
    positive = vector(name, "beta", beta, channels, input, torch.float64)
    negative = torch.ones_like(positive)
    if weight is not None:
        weights = vector(name, "weight", weight, channels, input, torch.float64)
        positive, negative = positive * weights, weights
    if reduction == "none" or label_smoothing > 0:
        loss = element_map(of, of.channel(positive).to(of.wide), of.channel(negative).to(of.wide), 0.0, label_smoothing)
        total = _elements(of)
        if pixel_weight is not None:
            loss = loss * pixel_weight.unsqueeze(1).to(loss.dtype)
            valid = of.valid_elements()
            spread = pixel_weight.unsqueeze(1).expand_as(loss)
            total = (spread if valid is None else spread * valid).sum(dtype=torch.float64)
        return _reduce_map(of, loss, reduction, total, group)
    table = statistics(of, pixel=True, pixel_weight=pixel_weight, batch=True, group=group)
    return add_ratio(of, *element_sums(table, positive, negative), reduction)


def balanced_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    beta: float | None = None,
    mode: Literal["binary", "multilabel"] = "binary",
    from_logits: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = False,
    group: Any = None,
) -> Tensor:
    r"""-(beta * g * log(p) + (1 - beta) * (1 - g) * log(1 - p)) for each element.

    beta left out is 1 - mean(g), the share of negatives, of each image and class, or with batch=True of the batch:
    Xie and Tu 2015 (HED, 1504.06375), equation 2. The mean divides by the elements that are not ignored.

    No other library has it.
    """
    name = "balanced_cross_entropy"
    check_reduction(name, reduction)
    one_of(name, "mode", mode, ("binary", "multilabel"))
    of = problem(name, input, target, mode, from_logits, ignore_index)
    table = statistics(of, pixel=True, batch=batch or group is not None, group=group)
    share = 1 - ratio(table.wg, table.w, 0.0) if beta is None else torch.full_like(table.wg, beta)
    if reduction == "none":
        share = share.view(*share.shape, *[1] * (input.dim() - 2)).to(of.wide)
        return element_map(of, share, 1 - share)
    return add_ratio(of, *element_sums(table, share, 1 - share), reduction)


# ---- focal ----


def focal_alpha(
    loss: str, alpha: float | Sequence[float] | Tensor | None, channels: int, like: Tensor
) -> Tensor | None:
    """A softmax's alpha for each class: a number stands for 1 - alpha at class 0 and alpha at the others."""
    if alpha is None:
        return None
    values = vector(loss, "alpha", alpha, channels, like, torch.float64)
    if (isinstance(alpha, Tensor) and alpha.dim() == 0) or isinstance(alpha, int | float):
        values = torch.cat([1 - values[:1], values[1:]])
    return values


def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    alpha: float | Sequence[float] | Tensor | None = None,
    gamma: float = 2.0,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    group: Any = None,
) -> Tensor:
    r"""-alpha_t * (1 - p_t)^gamma * log(p_t). Lin et al. 2017 (1708.02002), equation 5, whose alpha is 0.25, gamma 2.

    multiclass: over the softmax; alpha is a number (1 - alpha for class 0, alpha for the others) or one value a class.
    The mean divides by the pixels that are not ignored: gamma=0 is cross_entropy without weights.
    multilabel, binary: over the sigmoid of each element, alpha * g * (1 - p)^gamma * -log(p) + (1 - alpha) * (1 - g) *
    p^gamma * -log(1 - p), alpha a number or one value a class. The mean divides by the elements that are not ignored.
    `weight` multiplies a class's terms and does not change what the mean divides by.

    torchvision's sigmoid_focal_loss: alpha=0.25, reduction="none"; for soft targets its modulating factor is another
    one. MONAI and kornia divide a softmax's mean by C times the pixels, kornia by ignored ones too; MONAI's
    reduction="sum" is a mean over the pixels. smp's "multiclass" is a sigmoid for each class, mode="multilabel" on
    one-hot targets.
    """
    name = "focal_loss"
    check_reduction(name, reduction)
    within(name, "gamma", gamma, 0.0)
    of = problem(name, input, target, mode, from_logits, ignore_index)
    channels = input.shape[1]
    weights = None if weight is None else vector(name, "weight", weight, channels, input, torch.float64)
    if mode == "multiclass":
        factor = focal_alpha(name, alpha, channels, input)
        factor = weights if factor is None else factor if weights is None else factor * weights
        if reduction == "none":
            return class_map(of, factor, gamma)
        table = statistics(of, pixel=True, gamma=gamma, batch=True, group=group)
        return add_ratio(of, *class_sums(of, table, factor), reduction)
    positive, negative = sigmoid_alpha(name, alpha, weights, channels, input)
    if reduction == "none":
        return element_map(of, of.channel(positive).to(of.wide), of.channel(negative).to(of.wide), gamma)
    table = statistics(of, pixel=True, gamma=gamma, batch=True, group=group)
    return add_ratio(of, *element_sums(table, positive, negative), reduction)


def sigmoid_alpha(
    loss: str, alpha: float | Sequence[float] | Tensor | None, weight: Tensor | None, channels: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """What positives and negatives of each class are multiplied by."""
    ones = torch.ones(channels, dtype=torch.float64, device=like.device)
    positive = ones if alpha is None else vector(loss, "alpha", alpha, channels, like, torch.float64)
    negative = ones if alpha is None else 1 - positive
    return (positive, negative) if weight is None else (positive * weight, negative * weight)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: Reduction = "none"
) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss's arguments and defaults: focal_loss for each element, any shape [N, *].

    A negative alpha means none, as there. Equal to torchvision for targets 0 and 1; in between its modulating factor is
    (p*(1 - g) + (1 - p)*g)^gamma for both terms.
    """
    shape = inputs.shape
    flat, goal = (t.flatten(1).unsqueeze(1) if t.dim() > 1 else t.reshape(1, 1, -1) for t in (inputs, targets))
    value = focal_loss(
        flat, goal, alpha=None if alpha < 0 else alpha, gamma=gamma, mode="multilabel", reduction=reduction
    )
    return value.view(shape) if reduction == "none" else value


# ---- the hardest pixels ----


def topk_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    k: float = 0.1,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    batch: bool = True,
) -> Tensor:
    r"""The cross-entropy of the k hardest pixels; the mean divides by their number.

    k < 1 is a share of all pixels (ignored ones count), k >= 1 a number, of each image with batch=False. Wu et al. 2016
    (1605.06457). reduction="none" returns the map [N, *S], 0 where a pixel was not taken. Holds maps of [N, *S].

    nnU-Net's TopKLoss is k=0.1 over the batch.
    """
    name = "topk_cross_entropy"
    check_reduction(name, reduction)
    if not k > 0:
        raise ValueError(f"{name}: k must be positive, got {k}")
    of = problem(name, input, target, "multiclass", True, ignore_index)
    weights = None if weight is None else vector(name, "weight", weight, input.shape[1], input, torch.float64)
    loss = _map(of, weights, 0.0, label_smoothing)
    flat = loss.reshape(1, -1) if batch else loss.flatten(1)
    number = min(max(int(k * flat.shape[1]) if k < 1 else int(k), 1), flat.shape[1])
    hardest, index = flat.topk(number, dim=1)
    if reduction == "none":
        return torch.zeros_like(flat).scatter(1, index, hardest).view_as(loss)
    return (
        hardest.sum() if reduction == "sum" else ratio(hardest.sum(), torch.full_like(loss.sum(), hardest.numel()), 0.0)
    )


def ohem_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The cross-entropy of the pixels whose true class has a probability below `threshold`; their mean.

    Online hard example mining: at least `min_kept` pixels of the batch, the hardest, are taken where fewer are below
    the threshold. Shrivastava et al. 2016 (1604.03540) for detection; for segmentation this form became common with
    Yuan and Wang 2018 (OCNet, 1809.00916). reduction="none" returns the map [N, *S], 0 where a pixel was not taken.
    Class weights do not enter the selection nor what the mean divides by.

    Defaults as in mmsegmentation's OHEMPixelSampler (thresh=0.7, min_kept=100000).
    """
    name = "ohem_cross_entropy"
    check_reduction(name, reduction)
    within(name, "threshold", threshold, 0.0, 1.0)
    if min_kept < 0:
        raise ValueError(f"{name}: min_kept must be >= 0, got {min_kept}")
    of = problem(name, input, target, "multiclass", True, ignore_index)
    if of.dense:
        raise RuntimeError(f"{name}: target must hold labels [N, *S], got {list(target.shape)}")
    plain = _map(of)
    weights = None if weight is None else vector(name, "weight", weight, input.shape[1], input, torch.float64)
    loss = plain if weights is None else _map(of, weights)
    with torch.no_grad():
        hardness = plain.detach()
        valid = of.valid()
        if valid is not None:
            hardness = hardness.masked_fill(~valid, -1.0)
        limit = -torch.log(torch.full((), threshold, dtype=hardness.dtype, device=hardness.device))
        if hardness.numel():
            number = min(max(min_kept, 1), hardness.numel())
            limit = torch.minimum(limit, hardness.flatten().topk(number).values[-1])
        taken = (hardness >= limit.clamp_min(0.0)) | hardness.isnan()  # a loss that is NaN must not go unnoticed
    kept = torch.where(taken, loss, 0.0)
    return _reduce_map(of, kept, reduction, taken.sum(dtype=torch.float64), None)
