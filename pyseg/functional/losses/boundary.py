"""Losses on the distance between boundaries.

Arguments, empty cases, dtypes and determinism that all losses share: pyseg.functional.losses. p is the probability, g
the target. Distances come from pyseg.functional.distance_transform, one image and class at a time (on CUDA one class of
all images), with `spacing` as there; they are constants for autograd. A loss keeps E = d loss / d p for its backward,
one tensor like the logits (float32 for 16-bit logits), and a few maps of one class while it works (hausdorff_dt_loss of
labels: of one image, all classes of which share a transform of the labels). Ignored pixels belong to no class, in the
prediction as in the target, and the mean over the pixels leaves them out.

reduction="none" returns [N, C], one value an image and chosen class, or their mean over the batch [C] with batch=True.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyseg._ops.forward_mode import refuse_tangents
from pyseg.functional.distance_transform import distance_transform
from pyseg.functional.losses._common import (
    Mode,
    Problem,
    Reduction,
    Weight,
    add_ratio,
    check_reduction,
    chosen_classes,
    one_of,
    problem,
    ratio,
    reduce_table,
    statistics,
    take,
    within,
)
from pyseg.functional.losses.distribution import class_map, element_map
from pyseg.functional.losses.region import class_weight

# From some maps [M, *S] of p, of g (both float) and of g > 0.5 (uint8): the loss of each map [M], not yet divided by
# its pixels, and its derivative by p, [M, *S].
_MapLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# An operator that does this for all maps: from logits of a softmax, labels as uint8 and chosen classes the table
# [N, C], divided by the pixels, and E.
_Fused = Callable[[Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]


def _loss_and_error(of: Problem, chosen: list[int], map_loss: _MapLoss) -> tuple[Tensor, Tensor]:
    """The loss table [N, C] in float64 and E [N, C, *S], both 0 for classes that were not chosen.

    E starts as the probabilities and is overwritten map by map.
    """
    logits = of.logits.to(of.wide)
    if of.activation == "softmax":
        error = logits.softmax(1)
    else:
        error = logits.sigmoid() if of.activation == "sigmoid" else logits.clone()
    table = torch.zeros(error.shape[:2], dtype=torch.float64, device=error.device)
    for c in set(range(error.shape[1])) - set(chosen):
        error[:, c].zero_()
    target, valid = _small_labels(of), of.valid()
    for part in [slice(None)] if error.is_cuda else [slice(n, n + 1) for n in range(error.shape[0])]:
        for c in chosen:
            p = error[part, c]
            inside = torch.empty(p.shape, dtype=torch.uint8, device=p.device)
            if of.dense:
                torch.gt(target[part, c], 0.5, out=inside.view(torch.bool))
            else:
                torch.eq(target[part], 1 if error.shape[1] == 1 else c, out=inside)
            soft = of.dense and target.is_floating_point()
            mask = None if valid is None else valid[part, c] if of.dense else valid[part]
            if mask is None:
                g = (target[part, c] if soft else inside).to(p.dtype)
                loss, slope = map_loss(p, g, inside)
                table[part, c] = loss / max(of.pixels, 1)
                torch.mul(slope, 1 / max(of.pixels, 1), out=p)
                continue
            inside *= mask
            loss, slope = map_loss(torch.where(mask, p, 0.0), inside.to(p.dtype), inside)
            pixels = mask.flatten(1).sum(1).clamp_min(1)
            table[part, c] = loss / pixels
            p.copy_(torch.where(mask, slope / pixels.view(-1, *[1] * (p.dim() - 1)), 0.0))
    return table, error


def _small_labels(of: Problem) -> Tensor:
    """The target; labels as uint8 where that can tell them all apart, which is read faster once a class."""
    if of.dense:
        return of.target
    channels = of.logits.shape[1]
    limit = max(channels, 2)
    if of.target.device.type == "cpu" and of.target.numel() and not torch.compiler.is_compiling():
        valid = of.valid()
        low, high = (of.target if valid is None else of.target.where(valid, 0)).aminmax()
        if low < 0 or high >= limit:
            got = low if low < 0 else high
            raise RuntimeError(f"{of.loss}: target must be in [0, {limit}) or ignore_index, got {got.item()}")
    if of.ignore_index is not None or limit > 256 or of.target.dtype == torch.bool:
        return of.target
    return of.target.to(torch.uint8)


def _takes_fused(of: Problem) -> bool:
    """Labels that 8 bits can hold, on the CPU, of classes that exclude each other; none ignored.

    One class alone has nothing to share: two transforms of masks are faster there.
    """
    several = of.activation == "softmax" and 1 < of.logits.shape[1] <= 255
    return several and not (of.dense or of.logits.is_cuda or of.valid() is not None)


class _MapLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, of: Problem, chosen: list[int], map_loss: _MapLoss, fused: _Fused | None
    ) -> Tensor:
        of = of._replace(logits=logits)
        if fused is None or not _takes_fused(of):
            table, error = _loss_and_error(of, chosen, map_loss)
        else:
            table, error = fused(logits, _small_labels(of).view(torch.uint8), chosen)
        ctx.save_for_backward(error, logits)
        ctx.activation = of.activation
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        error, logits = ctx.saved_tensors
        return torch.ops.pyseg._activation_vjp(error, logits, grad, ctx.activation), None, None, None, None


def _loss(
    of: Problem, weight: Weight, include_background: bool, classes: Sequence[int] | None, reduction: str, batch: bool,
    map_loss: _MapLoss, fused: _Fused | None = None,
) -> Tensor:  # fmt: skip
    check_reduction(of.loss, reduction)
    if of.logits.dim() == 3:
        raise RuntimeError(f"{of.loss}: input must be [N, C, H, W] or [N, C, D, H, W], got {list(of.logits.shape)}")
    channels = of.logits.shape[1]
    chosen = chosen_classes(of.loss, channels, include_background, classes)
    every = list(range(channels)) if chosen is None else sorted(set(chosen))  # each is overwritten by its error
    refuse_tangents(of.loss, of.logits)
    table: Tensor = _MapLossFunction.apply(of.logits, of, every, map_loss, fused)
    table = take(table, chosen, 1)
    if batch:
        table = table.sum(0, keepdim=True) / max(table.shape[0], 1)
    return reduce_table(table, of, reduction, class_weight(of, weight, chosen), batch=batch)


def _unit(spacing: Sequence[float] | None, of: Problem) -> tuple[float, ...]:
    """A spacing for each axis, which also tells images of [H, W] from volumes of [D, H, W]."""
    axes = of.logits.dim() - 2
    if spacing is None:
        return (1.0,) * axes
    if len(spacing) != axes:
        raise ValueError(f"{of.loss}: spacing must have {axes} values, got {list(spacing)}")
    return tuple(float(step) for step in spacing)


def _squared_distance(masks: Tensor, spacing: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The squared distance to the nearest element of the other value, 0 in maps that have one value only.

    Two transforms of masks are faster than one of labels, which has to look for further values.
    """
    both = torch.stack([masks, 1 - masks])
    foreground, background = distance_transform(both, spacing=spacing, squared=True, dtype=dtype)
    return foreground.add_(background).nan_to_num_(posinf=0.0)


# ---- Hausdorff distance ----


def hausdorff_dt_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    alpha: float = 2.0,
    one_sided: bool = False,
    log: bool = False,
    spacing: Sequence[float] | None = None,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = False,
) -> Tensor:
    r"""mean((p - g)^2 * (d_p^alpha + d_g^alpha)) for each class, with distances to the boundaries of p > 0.5 and of g.

    d is the distance to the nearest pixel of the other value, in foreground and background; a map that has one value
    only counts as d = 0. Karimi and Salcudean 2019 (1904.10030), equation 8, alpha = 2; `one_sided` is its equation 9,
    without d_p. `log` returns log(1 + loss), after the reduction, as MONAI's LogHausdorffDTLoss does.

    Two distance transforms an image and class: O(N C S).

    MONAI's HausdorffDTLoss leaves class 0 out by default, include_background=False.
    """
    name = "hausdorff_dt_loss"
    if not alpha > 0:
        raise ValueError(f"{name}: alpha must be positive, got {alpha}")
    of = problem(name, input, target, mode, from_logits, ignore_index)
    steps = _unit(spacing, of)

    def map_loss(p: Tensor, g: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        distance = _squared_distance(inside, steps, p.dtype)
        distance = distance if alpha == 2 else distance.pow_(alpha / 2)
        if not one_sided:
            predicted = torch.empty_like(inside)
            torch.gt(p, 0.5, out=predicted.view(torch.bool))
            other = _squared_distance(predicted, steps, p.dtype)
            distance += other if alpha == 2 else other.pow_(alpha / 2)
        difference = p - g
        slope = distance.mul_(difference)
        return (slope * difference).flatten(1).sum(1), slope.mul_(2)

    def fused(logits: Tensor, labels: Tensor, chosen: list[int]) -> tuple[Tensor, Tensor]:
        return torch.ops.pyseg._hausdorff_dt(logits, labels, chosen, steps, one_sided)

    loss = _loss(of, weight, include_background, classes, reduction, batch, map_loss, fused if alpha == 2 else None)
    return loss.log1p() if log else loss


def hausdorff_er_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    alpha: float = 2.0,
    erosions: int = 10,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = False,
) -> Tensor:
    r"""mean(sum_k (k + 1)^alpha * e_k), with e_k the map (p - g)^2 after k + 1 soft erosions, k = 0 to erosions - 1.

    An erosion is the mean over the pixel and its neighbours along the axes, minus 0.5, not below 0, stretched to
    [0, 1]. Karimi and Salcudean 2019 (1904.10030), equation 11, alpha = 2 and 10 erosions with a cross.

    Keeps one tensor like the logits; holds all erosions of one image and class while it works.

    kornia's HausdorffERLoss has these defaults and takes probabilities, from_logits=False.
    """
    name = "hausdorff_er_loss"
    if erosions < 1:
        raise ValueError(f"{name}: erosions must be at least 1, got {erosions}")
    of = problem(name, input, target, mode, from_logits, ignore_index)

    def map_loss(p: Tensor, g: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        axes = p.dim() - 1
        kernel = _cross(axes, p)
        convolve = F.conv2d if axes == 2 else F.conv3d
        spatial = tuple(range(2, p.dim() + 1))
        with torch.enable_grad():
            variable = p.detach().clone().requires_grad_()
            map_ = ((variable - g) ** 2).unsqueeze(1)
            total = torch.zeros_like(map_)
            for k in range(erosions):
                map_ = convolve(map_, kernel, padding=1) - 0.5
                map_ = map_.masked_fill(map_ < 0, 0.0)
                low, high = map_.amin(spatial, keepdim=True), map_.amax(spatial, keepdim=True)
                flat = high == low
                map_ = torch.where(flat, map_, (map_ - low) / torch.where(flat, 1.0, high - low))
                total = total + map_ * (k + 1) ** alpha
            loss = total.flatten(1).sum(1)
            (slope,) = torch.autograd.grad(loss.sum(), variable)
        return loss.detach(), slope

    return _loss(of, weight, include_background, classes, reduction, batch, map_loss)


def _cross(axes: int, like: Tensor) -> Tensor:
    """The mean over a pixel and its 2 * axes neighbours, [1, 1, 3, ...]."""
    kernel = like.new_zeros((1, 1, *[3] * axes))
    for axis in range(axes):
        index: list[Any] = [0, 0, *[1] * axes]
        index[2 + axis] = slice(None)
        kernel[tuple(index)] = 1 / (2 * axes + 1)
    return kernel


# ---- distances of the target alone ----


def boundary_loss(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    *,
    spacing: Sequence[float] | None = None,
    mode: Mode = "multiclass",
    from_logits: bool = True,
    classes: Sequence[int] | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    batch: bool = False,
) -> Tensor:
    r"""mean(p * phi) for each class: phi is the distance to the class outside of it, and 1 - the distance inside.

    Kervadec et al. 2019 (1812.07032), equation 6, with the signed distance of the authors' code, which is 0 on the
    class's own boundary pixels. phi is 0 where a map has one value only. The loss can be negative.

    One distance transform an image and class: O(N C S). MONAI's BoundaryLoss has the same defaults.
    """
    name = "boundary_loss"
    of = problem(name, input, target, mode, from_logits, ignore_index)
    steps = _unit(spacing, of)

    def map_loss(p: Tensor, g: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        distance = _squared_distance(inside, steps, p.dtype).sqrt_()
        phi = torch.where((inside > 0) & (distance > 0), 1 - distance, distance)
        return (p * phi).flatten(1).sum(1), phi

    return _loss(of, weight, include_background, classes, reduction, batch, map_loss)


def shape_aware_loss(
    input: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    spacing: Sequence[float] | None = None,
    mode: Literal["multiclass", "binary"] = "multiclass",
    from_logits: bool = True,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""mean(CE_i * (1 + scale * E * [pixel i is predicted wrongly])), CE the cross-entropy.

    E is an image's mean distance from the predicted curve (pixels with a neighbour of another predicted class) to the
    true curve: Al Arif, Knapp and Slabaugh 2018, "Shape-aware deep convolutional neural network for vertebrae
    segmentation", section 3.2. E is 0 where an image has no predicted or no true curve. The mean is over the pixels
    that are not ignored. reduction="none" returns the map [N, *S]. No other library has it.
    """
    name = "shape_aware_loss"
    check_reduction(name, reduction)
    one_of(name, "mode", mode, ("multiclass", "binary"))
    within(name, "scale", scale, 0.0)
    of = problem(name, input, target, mode, from_logits, ignore_index)
    pixel_weight = _shape_weight(of, scale, _unit(spacing, of))
    if reduction == "none":
        map_ = class_map(of, None, 0.0) if mode == "multiclass" else element_map(of, 1.0, 1.0).squeeze(1)
        return map_ * pixel_weight.to(map_.dtype)
    table = statistics(of, pixel=True, pixel_weight=pixel_weight, count=True)
    value = table.pos if mode == "multiclass" else table.pos + table.neg
    return add_ratio(of, value.sum(1), table.pixels[:, 0], reduction)


@torch.no_grad()
def _shape_weight(of: Problem, scale: float, spacing: tuple[float, ...]) -> Tensor:
    """1 + scale * E at the pixels that are predicted wrongly, 1 elsewhere, [N, *S]."""
    channels, target = of.logits.shape[1], of.target
    if channels > 1:
        predicted = of.logits.argmax(1)
        true = target.argmax(1) if of.dense else target.long()
    else:
        predicted = (of.logits > (0.5 if of.activation == "none" else 0.0)).squeeze(1).long()
        true = ((target.squeeze(1) if of.dense else target) > 0.5).long()
    valid = of.valid_pixels()
    if valid is not None:
        predicted, true = predicted.where(valid, 0), true.where(valid, 0)
    curve = _curve(predicted)
    distance: Tensor = distance_transform(~_curve(true), spacing=spacing, dtype=of.wide)
    distance = distance.nan_to_num(posinf=0.0)
    mean = ratio((distance * curve).flatten(1).sum(1), curve.flatten(1).sum(1).to(distance.dtype), 0.0)
    return 1 + scale * mean.view(-1, *[1] * (true.dim() - 1)) * (predicted != true)


def _curve(labels: Tensor) -> Tensor:
    """Pixels with a neighbour along an axis that has another label, bool [N, *S]."""
    curve = torch.zeros_like(labels, dtype=torch.bool)
    for axis in range(1, labels.dim()):
        size = labels.shape[axis]
        if size < 2:
            continue
        differs = labels.narrow(axis, 1, size - 1) != labels.narrow(axis, 0, size - 1)
        curve.narrow(axis, 1, size - 1).logical_or_(differs)
        curve.narrow(axis, 0, size - 1).logical_or_(differs)
    return curve
