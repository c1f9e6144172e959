"""Distances between surfaces from their definitions: every pair of surface elements is looked at."""

import itertools
import math

import torch
from torch import Tensor


def surface_elements(mask: Tensor) -> Tensor:
    """[K, dims] positions of the elements of one mask [H, W] or [D, H, W] that have a face neighbour outside of it."""
    found = []
    for position in itertools.product(*(range(size) for size in mask.shape)):
        if not mask[position]:
            continue
        for axis, step in itertools.product(range(mask.dim()), (-1, 1)):
            neighbour = list(position)
            neighbour[axis] += step
            if not 0 <= neighbour[axis] < mask.shape[axis] or not mask[tuple(neighbour)]:
                found.append(position)
                break
    return torch.tensor(found, dtype=torch.float64).reshape(len(found), mask.dim())


def surface_distances(prediction: Tensor, target: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """d(a, S_B) for every a in S_A and d(b, S_A) for every b in S_B, infinity where the other surface is empty."""
    first, second = (
        surface_elements(mask) * torch.tensor(spacing, dtype=torch.float64) for mask in (prediction, target)
    )
    pairs = (first[:, None] - second[None]).square().sum(-1).sqrt()  # [|S_A|, |S_B|]
    none = torch.tensor(math.inf, dtype=torch.float64)
    return (
        pairs.amin(1) if len(second) else none.expand(len(first)),
        pairs.amin(0) if len(first) else none.expand(len(second)),
    )


def hausdorff_distance(
    prediction: Tensor,
    target: Tensor,
    spacing: tuple[float, ...],
    *,
    percentile: float | None = None,
    directed: bool = False,
) -> float:
    """Largest distance, or the larger of the two directions' percentiles; of two masks [H, W] or [D, H, W]."""
    forward, backward = surface_distances(prediction, target, spacing)
    if len(forward) == 0 and len(backward) == 0:
        return math.nan
    if len(forward) == 0 or len(backward) == 0:
        return math.inf
    sides = [forward] if directed else [forward, backward]
    return max(side.quantile(1 if percentile is None else percentile / 100).item() for side in sides)


def average_surface_distance(
    prediction: Tensor, target: Tensor, spacing: tuple[float, ...], *, symmetric: bool = True
) -> float:
    """Mean over both directions' distances together, or over the prediction's alone."""
    forward, backward = surface_distances(prediction, target, spacing)
    if len(forward) == 0 or len(backward) == 0:
        return math.nan if len(forward) == len(backward) else math.inf
    return (torch.cat([forward, backward]) if symmetric else forward).mean().item()


def surface_dice(prediction: Tensor, target: Tensor, tolerance: float, spacing: tuple[float, ...]) -> float:
    """Share of both surfaces' elements that are within the tolerance."""
    both = torch.cat(surface_distances(prediction, target, spacing))
    return (both <= tolerance).double().mean().item()
