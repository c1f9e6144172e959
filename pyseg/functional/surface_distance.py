"""Distances between the surfaces of two segmentations, from the exact distance transform.

The surface S_A of a mask A are its elements that have a neighbour outside of it across a face (4 neighbours in 2D, 6 in
3D); what lies beyond the edge of the map is outside. d(a, B) = min over b in S_B of || spacing * (a - b) ||.

All functions take masks [*, H, W] or [*, D, H, W], nonzero is foreground, and return a value for each mask of the
batch: one-hot masks [N, C, H, W] give [N, C]. Where one mask is empty and the other is not, distances are infinite and
the surface Dice is 0; where both are empty there is nothing to measure: NaN, so that `nanmean` leaves it out. Distances
are computed in float64. Not differentiable.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyseg.functional.distance_transform import distance_transform

Spacing = float | Sequence[float] | None


def hausdorff_distance(
    prediction: Tensor,
    target: Tensor,
    spacing: Spacing = None,
    *,
    percentile: float | None = None,
    directed: bool = False,
    dims: int | None = None,
) -> Tensor:
    r"""Hausdorff distance of two surfaces, or a percentile of it (HD95 with percentile=95).

        h(A, B) = max over a in S_A of d(a, B)        H(A, B) = max(h(A, B), h(B, A))

    With a percentile, of the distances of each direction that percentile is taken (interpolated between the two nearest
    ranks, as in numpy and MONAI), and then the larger of the two. Other programs take the percentile of both
    directions' distances together, which gives another value.

    Args:
        prediction, target: masks of one shape, [*, H, W] or [*, D, H, W]; nonzero is foreground.
        spacing: how far neighbouring elements are apart: one number, or one for each axis. None: 1.
        percentile: in [0, 100]; None for the maximum.
        directed: only h(prediction, target).
        dims: 2 or 3, how many of the last dimensions are axes; the length of `spacing` says it too. 2 if neither does.

    Returns:
        [*] float64: infinity if one of two masks is empty, NaN if both are.

    Two distance transforms (one if directed), O(elements). With a percentile the surface elements are listed, which on
    CUDA waits for the device once; without, nothing waits.

    Raises:
        RuntimeError: a shape, spacing or percentile that does not fit.
    """
    op = "hausdorff_distance"
    if percentile is not None and not 0 <= percentile <= 100:
        raise RuntimeError(f"{op}: percentile must be in [0, 100], got {percentile}")
    axes, first, second = _surfaces(op, prediction, target, spacing, dims)
    pairs = [(first, second)] if directed else [(first, second), (second, first)]
    result = None
    for here, there in pairs:
        distances = _distances_to(there, spacing, axes)
        if percentile is None:
            value = torch.where(here, distances, -math.inf).flatten(-axes).amax(-1)
        else:
            value = _percentile(distances, here, axes, percentile)
        result = value if result is None else torch.maximum(result, value)
    assert result is not None
    return _with_empty(result, first, second, axes, math.inf)


def average_surface_distance(
    prediction: Tensor,
    target: Tensor,
    spacing: Spacing = None,
    *,
    symmetric: bool = True,
    dims: int | None = None,
) -> Tensor:
    r"""Mean distance of two surfaces.

        (sum over a in S_A of d(a, B) + sum over b in S_B of d(b, A)) / (|S_A| + |S_B|)

    the average symmetric surface distance (ASSD); with symmetric=False the mean over a in S_A of d(a, B) alone, A the
    prediction (MONAI's default). Arguments, empty masks and errors are those of `hausdorff_distance`; nothing waits for
    the device.
    """
    axes, first, second = _surfaces("average_surface_distance", prediction, target, spacing, dims)
    total, count = _sum(_distances_to(second, spacing, axes), first, axes), _count(first, axes)
    if symmetric:
        total = total + _sum(_distances_to(first, spacing, axes), second, axes)
        count = count + _count(second, axes)
    return _with_empty(total / count, first, second, axes, math.inf)


def surface_dice(
    prediction: Tensor,
    target: Tensor,
    tolerance: float,
    spacing: Spacing = None,
    *,
    dims: int | None = None,
) -> Tensor:
    r"""Normalised surface Dice: the share of both surfaces that lies within `tolerance` of the other one.

        (|{a in S_A : d(a, B) <= tolerance}| + |{b in S_B : d(b, A) <= tolerance}|) / (|S_A| + |S_B|)

    Nikolov et al. 2018 (1809.04430), who weigh each element by its piece of surface; here, as in MONAI, each counts the
    same. `tolerance` is in the units of `spacing`, >= 0. Other arguments and errors are those of `hausdorff_distance`;
    0 if one of two masks is empty, NaN if both are; nothing waits for the device.
    """
    op = "surface_dice"
    if not tolerance >= 0:
        raise RuntimeError(f"{op}: tolerance must be >= 0, got {tolerance}")
    axes, first, second = _surfaces(op, prediction, target, spacing, dims)
    near = [
        _count(here & (_distances_to(there, spacing, axes) <= tolerance), axes)
        for here, there in ((first, second), (second, first))
    ]
    share = (near[0] + near[1]).double() / (_count(first, axes) + _count(second, axes))
    return _with_empty(share, first, second, axes, 0.0)


def surface(mask: Tensor, *, dims: int = 2) -> Tensor:
    """The elements of a mask [*, H, W] (dims=2) or [*, D, H, W] (dims=3) with a neighbour outside of it across a face.

    bool, of the same shape. Elements at the edge of the map belong to the surface.
    """
    inside = mask if mask.dtype == torch.bool else mask != 0
    interior = inside
    for axis in range(-dims, 0):
        size = inside.shape[axis]
        for begin in (0, 2):  # the neighbour before and the one behind, outside beyond the edge
            padding = [0, 0] * (-axis - 1) + [1, 1]
            interior = interior & F.pad(inside, padding, value=False).narrow(axis, begin, size)
    return inside & ~interior


def _surfaces(
    op: str, prediction: Tensor, target: Tensor, spacing: Spacing, dims: int | None
) -> tuple[int, Tensor, Tensor]:
    """The number of axes and both surfaces."""
    axes = dims or (len(spacing) if isinstance(spacing, Sequence) else 2)
    if axes not in (2, 3):
        raise RuntimeError(f"{op}: spacing must have an element for each of 2 or 3 axes, got {spacing}")
    if isinstance(spacing, Sequence) and len(spacing) != axes:
        raise RuntimeError(f"{op}: spacing must have dims = {axes} elements, got {list(spacing)}")
    if prediction.shape != target.shape:
        raise RuntimeError(f"{op}: prediction must be {list(target.shape)} like target, got {list(prediction.shape)}")
    if target.dim() < axes:
        shape = "[*, H, W]" if axes == 2 else "[*, D, H, W]"
        raise RuntimeError(f"{op}: target must be {shape} for {axes} axes, got {list(target.shape)}")
    if prediction.device != target.device:
        raise RuntimeError(f"{op}: prediction must be on {target.device} like target, got {prediction.device}")
    return axes, surface(prediction, dims=axes), surface(target, dims=axes)


def _distances_to(surface: Tensor, spacing: Spacing, axes: int) -> Tensor:
    """Distance of every element to the surface, infinity where there is none."""
    return distance_transform(~surface, spacing, dims=axes, dtype=torch.float64)


def _count(mask: Tensor, axes: int) -> Tensor:
    return mask.flatten(-axes).sum(-1)


def _sum(distances: Tensor, where: Tensor, axes: int) -> Tensor:
    return torch.where(where, distances, 0.0).flatten(-axes).sum(-1)


def _with_empty(value: Tensor, first: Tensor, second: Tensor, axes: int, one_empty: float) -> Tensor:
    """`value` where both surfaces have elements; `one_empty` or NaN elsewhere."""
    a, b = first.flatten(-axes).any(-1), second.flatten(-axes).any(-1)
    return torch.where(a & b, value, torch.where(a | b, one_empty, math.nan))


def _percentile(distances: Tensor, where: Tensor, axes: int, percentile: float) -> Tensor:
    """For each map of the batch the percentile of its distances in the mask; any value where the mask is empty.

    Only the mask's elements are sorted, those of all maps at once: by distance, then stably by map.
    """
    batch = where.shape[:-axes]
    flat = where.reshape(batch.numel(), where.shape[-axes:].numel())  # [B, elements]
    owner, element = flat.nonzero(as_tuple=True)
    values, order = distances.reshape(flat.shape)[owner, element].sort()
    values = values[owner[order].sort(stable=True).indices]
    counts = flat.sum(1)
    starts = counts.cumsum(0) - counts
    rank = (counts - 1).clamp_min(0).double() * (percentile / 100)
    low = rank.floor()
    last = max(values.numel() - 1, 0)
    values = values if values.numel() else values.new_zeros(1)
    below = values[(starts + low.long()).clamp_max(last)]
    above = values[(starts + rank.ceil().long()).clamp_max(last)]
    # Of two infinities the difference is NaN.
    between = torch.where(above == below, below, below + (above - below) * (rank - low))
    return between.reshape(batch)
