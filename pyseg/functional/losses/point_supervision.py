"""Supervision by single points: image-level labels, a few labelled pixels and an objectness prior in one loss."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyseg.functional.losses._common import Reduction, check_reduction

_UNLABELLED = -1


def point_supervision_loss(
    input: Tensor,
    target: Tensor | None = None,
    *,
    image_labels: Tensor | None = None,
    point_weight: Tensor | None = None,
    objectness: Tensor | None = None,
    background: Sequence[int] = (0,),
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The loss of Bearman, Russakovsky, Ferrari and Fei-Fei 2016 (1506.02106, section 3, equations 1 to 5).

    With S = softmax(input) over the classes and t_c = argmax_i S_ic, the pixel of an image where class c is most
    likely, the loss of an image is the sum, times `factors`, of

        image-level  -1/|L| sum_{c in L} log S_{t_c c} - 1/|L'| sum_{c in L'} log(1 - S_{t_c c})
        points       -sum_{i in I_s} alpha_i log S_{i G_i}
        objectness   -1/|I| sum_{i in I} P_i log sum_{c in O} S_ic + (1 - P_i) log(1 - sum_{c in O} S_ic)

    over the classes L that the image has and L' that it has not, the labelled pixels I_s, all its pixels I and the
    object classes O. Of pixels that are equally likely (as computed) t_c is the first in row-major order; like an
    argmax anywhere it has no gradient. A term over nothing is 0.

    Args:
        input: logits [N, C, *S] with 1 to 3 spatial dimensions and 2 to 1024 classes; float32, float64, float16 or
            bfloat16, contiguous or channels_last without a copy.
        target: the points: labels G [N, *S] of any integer dtype, ignore_index where there is none (nearly everywhere;
            `points_to_labels` makes it from coordinates). None: no points.
        image_labels: [N, C], integers or bool: > 0 where the image has the class, 0 where it has not, < 0 where neither
            is known. None: the classes of an image's points and the background are in it, all others are not; an image
            without points has no image-level term.
        point_weight: alpha [N, *S], such as an annotator's reliability; looked at where there are labels. None:
            1/|I_s|.
        objectness: P [N, *S], in [0, 1]: how likely a pixel is to be of any object. None: no such term, and then the
            gradient is zero but at the points and the pixels t_c.
        background: the classes that are no objects; O are all others. Neither may be empty.
        factors: what the three terms are multiplied with; the paper adds them up.
        ignore_index: the label of pixels that have none.
        reduction: "mean" or "sum" over the images, or "none": [N].

    Returns:
        float32 for 16-bit and float32 logits, float64 for float64.

    Everything is computed from log-odds: probabilities that round to 0 or 1 have their losses and finite gradients, up
    to the rounding of log-odds, and t_c is found among them. A logit of -inf is a class that a pixel cannot have; NaN,
    inf, and -inf for all classes but one, or with objectness for all objects or all of the background, make each term
    that looks at the pixel NaN (the image-level one looks at all). Labels out of range raise RuntimeError on the CPU
    and make the loss of their image NaN on CUDA; wrong shapes and dtypes raise RuntimeError, unknown names ValueError.

    One pass over the logits forward, O(N C S), and O(N C^2) for the pixels t_c; the backward pass reads them once more,
    or without objectness only near points and pixels t_c. Beside the gradient neither holds a map as large as the
    input; a target of int8 takes the place of None. The same bits in every run, on the CPU for
    any number of threads. Only `input` has a gradient, which cannot be differentiated again.
    """
    name = "point_supervision_loss"
    check_reduction(name, reduction)
    if len(factors) != 3:
        raise ValueError(f"{name}: factors must be three numbers, got {factors!r}")
    if input.dim() < 3:
        raise RuntimeError(f"{name}: input must be [N, C, *S] with 1 to 3 spatial dimensions, got {list(input.shape)}")
    if target is None:
        target = input.new_full((input.shape[0], *input.shape[2:]), _UNLABELLED, dtype=torch.int8)
        ignore_index = _UNLABELLED
    terms: Tensor
    terms, _ = torch.ops.pyseg.point_supervision_loss(
        input, target, point_weight, objectness, image_labels, list(background), ignore_index
    )
    present, absent, points, prior = terms[:, :4].unbind(1)
    of_present, of_absent, of_points = terms.detach()[:, 4:].clamp_min(1).unbind(1)
    if point_weight is None:
        points = points / of_points
    loss = factors[0] * (present / of_present + absent / of_absent) + factors[1] * points
    if objectness is not None:
        loss = loss + factors[2] / max(math.prod(input.shape[2:]), 1) * prior
    if reduction == "mean":
        loss = loss.sum() / max(input.shape[0], 1)
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(torch.float64 if input.dtype == torch.float64 else torch.float32)


def points_to_labels(
    points: Tensor, size: Sequence[int], weight: Tensor | None = None, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor | None]:
    r"""A list of annotated points as `target` and `point_weight` of point_supervision_loss.

    Args:
        points: integers [K, 2 + D], rows of image, class and D coordinates (row and column, in pixels from 0); [0, 2 +
            D] where there are none.
        size: of the maps: (N, *S) with D spatial dimensions.
        weight: alpha [K] of the points, of floating point.
        ignore_index: the label of all other pixels; negative.

    Returns:
        Labels [N, *S] int64, and weights [N, *S] (0 elsewhere) or None. Of several points at one pixel the largest
        class and the largest weight count. Raises ValueError for wrong shapes and dtypes, and RuntimeError for points
        outside of the maps, on the CPU and in eager mode; elsewhere torch's index check does.
    """
    name = "points_to_labels"
    if points.dim() != 2 or points.shape[1] != len(size) + 1:
        raise ValueError(f"{name}: points must be [K, {len(size) + 1}], got {list(points.shape)}")
    if points.dtype.is_floating_point or points.dtype.is_complex or points.dtype == torch.bool:
        raise ValueError(f"{name}: points must be of integers, got {points.dtype}")
    if weight is not None and not weight.dtype.is_floating_point:
        raise ValueError(f"{name}: weight must be of floating point, got {weight.dtype}")
    if ignore_index >= 0:
        raise ValueError(f"{name}: ignore_index must be negative, got {ignore_index}")
    if weight is not None and weight.shape != points.shape[:1]:
        raise ValueError(f"{name}: weight must be [{points.shape[0]}], got {list(weight.shape)}")
    image, classes, *place = points.long().unbind(1)
    flat, outside = torch.zeros_like(image), torch.zeros_like(image, dtype=torch.bool)
    for coordinate, extent in zip((image, *place), size, strict=True):
        outside |= (coordinate < 0) | (coordinate >= extent)
        flat = flat * extent + coordinate
    if points.device.type == "cpu" and not torch.compiler.is_compiling() and bool(outside.any()):
        raise RuntimeError(f"{name}: points must lie on maps of {list(size)}, got {points[outside][0].tolist()}")
    flat = flat.masked_fill(outside, math.prod(size))  # elsewhere scatter's own check finds them
    labels = torch.full((math.prod(size),), ignore_index, dtype=torch.int64, device=points.device)
    labels = labels.scatter_reduce(0, flat, classes, "amax").view(*size)
    if weight is None:
        return labels, None
    weights = weight.new_zeros(math.prod(size)).scatter_reduce(0, flat, weight, "amax")
    return labels, weights.view(*size)
