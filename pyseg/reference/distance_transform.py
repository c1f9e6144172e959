"""Distance transforms from their definitions, by comparing every element with every other."""

import numpy as np
import torch
from torch import Tensor


def distance_transform(
    input: Tensor,
    spacing: tuple[float, ...] = (1.0, 1.0),
    *,
    squared: bool = False,
    labels: bool = False,
    signed: bool = False,
    zero_background: bool = False,
) -> Tensor:
    r"""d[p] = min over q that p is measured to of || spacing * (p - q) ||, in float64; infinity where there is no q.

    input [*, H, W] or [*, D, H, W], as many axes as `spacing` has elements. p is measured to the zeros; with `labels`
    to all elements of another value (and is 0 where zero_background asks for it and p is zero); with `signed` to the
    elements on the other side, with a minus where p is zero itself. O(elements^2 / batch).
    """
    maps, squares = _pairs(input, spacing)
    values = maps if labels else (maps != 0).to(torch.uint8)
    if labels or signed:
        source = values[:, :, None] != values[:, None, :]
    else:
        source = (values == 0)[:, None, :].expand(-1, values.shape[1], -1)
    distances = torch.where(source, squares, torch.inf).amin(2)
    if signed:
        distances = torch.where(values == 0, -distances, distances)
    if zero_background:
        distances = torch.where(values == 0, 0, distances)
    if not squared:
        distances = distances.sign() * _root(distances.abs())
    return distances.reshape(input.shape)


def distance_to_two_nearest_objects(
    labels: Tensor, spacing: tuple[float, ...] = (1.0, 1.0), *, squared: bool = False
) -> tuple[Tensor, Tensor]:
    r"""The two smallest over all objects o (labels other than 0) of min over q in o of || spacing * (p - q) ||.

    labels [*, H, W] or [*, D, H, W], as many axes as `spacing` has elements; float64, infinity where there is none.
    O(objects * elements^2 / batch).
    """
    maps, squares = _pairs(labels, spacing)
    absent = torch.full(maps.shape, torch.inf, dtype=torch.float64)
    to_objects = [
        torch.where((maps == label)[:, None, :], squares, torch.inf).amin(2)
        for label in set(maps.flatten().tolist())
        if label != 0
    ]
    first, second = torch.stack([absent, absent, *to_objects]).sort(0).values[:2]
    if not squared:
        first, second = _root(first), _root(second)
    return first.reshape(labels.shape), second.reshape(labels.shape)


def _root(squares: Tensor) -> Tensor:
    """The nearest number to each square root: torch's own is that on some processors only."""
    return torch.from_numpy(np.sqrt(squares.numpy()))


def _pairs(input: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The maps as [N, elements], and the squared distances between any two elements [elements, elements]."""
    axes = input.shape[input.dim() - len(spacing) :]
    points = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in axes])  # [elements, dims]
    steps = (points[:, None] - points[None]) * torch.tensor(spacing, dtype=torch.float64)
    squares = steps.square().sum(2)
    return input.cpu().reshape(-1, points.shape[0]), squares
