"""RoIAlign from its definition: every point of every bin of every box by itself."""

import itertools
import math

import torch
from torch import Tensor


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: tuple[int, ...],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
) -> Tensor:
    """RoIAlign (He et al. 2017, section 3) of boxes [K, 5], [K, 6] (rotated) or, on volumes, [K, 7], in float64.

    Differentiable by PyTorch itself, by the boxes too. O(K * bins * points) Python steps.
    """
    maps = input.double()
    rows = [_box(maps, box, output_size, spatial_scale, sampling_ratio, aligned, mode) for box in boxes.double()]
    return torch.stack(rows) if rows else maps.new_zeros(0, input.shape[1], *output_size)


def multiscale_roi_align(
    features: list[Tensor],
    boxes: Tensor,
    output_size: tuple[int, int],
    spatial_scales: list[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
    levels: tuple[int, int],
    canonical_size: float = 224.0,
    canonical_level: float = 4.0,
    epsilon: tuple[float, float] = (0.0, 1e-6),
) -> Tensor:
    """Each box on its own level (Lin et al. 2017, equation 1), in float64; 0 where it has none."""
    rows = []
    for box in boxes.double():
        width, height = (box[3], box[4]) if len(box) == 6 else (box[3] - box[1], box[4] - box[2])
        area = float(width * height)
        level = -1
        if area >= 0:
            ratio = math.sqrt(area) / canonical_size + epsilon[0]
            log = math.log2(ratio) if ratio > 0 else -math.inf
            exact = max(-99, canonical_level + log + epsilon[1])
            level = int(max(levels[0], min(levels[1], math.floor(exact)))) - levels[0]
        if 0 <= level < len(features):
            scale = spatial_scales[level]
            arguments = (output_size, scale, sampling_ratio, aligned)
            rows.append(roi_align(features[level], box[None], *arguments, mode=mode)[0])
        else:
            rows.append(torch.zeros(features[0].shape[1], *output_size, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.zeros(0, features[0].shape[1], *output_size, dtype=torch.float64)


def _box(
    maps: Tensor, box: Tensor, output_size: tuple[int, ...], scale: float, ratio: int, aligned: bool, mode: str
) -> Tensor:
    dims = len(output_size)
    rotated = dims == 2 and len(box) == 6
    offset = 0.5 if aligned else 0.0
    # Axes in the order of the map's: (z,) y, x, of the box: x, y (, z).
    if rotated:
        lengths = [box[4] * scale, box[3] * scale]
    else:
        first, last = box[1 : 1 + dims].flip(0) * scale - offset, box[1 + dims :].flip(0) * scale - offset
        lengths = list(last - first)
    if not aligned:
        lengths = [length.clamp_min(1) for length in lengths]
    starts = [-length / 2 for length in lengths] if rotated else list(first)
    sizes = [length / bins for length, bins in zip(lengths, output_size, strict=True)]
    counts = [ratio if ratio > 0 else max(0, math.ceil(float(size.detach()))) for size in sizes]
    image = maps[int(box[0])]
    output = []
    for bin_ in itertools.product(*[range(bins) for bins in output_size]):
        values = []
        for point in itertools.product(*[range(count) for count in counts]):
            at = [
                starts[axis] + (bin_[axis] + (point[axis] + 0.5) / counts[axis]) * sizes[axis] for axis in range(dims)
            ]
            if rotated:
                angle = torch.deg2rad(box[5])
                y, x = at
                at = [
                    y * torch.cos(angle) - x * torch.sin(angle) + box[2] * scale - offset,
                    y * torch.sin(angle) + x * torch.cos(angle) + box[1] * scale - offset,
                ]
            values.append(_interpolate(image, at))
        stacked = torch.stack(values) if values else maps.new_zeros(1, image.shape[0])
        output.append(stacked.mean(0) if mode == "avg" else stacked.amax(0))
    return torch.stack(output, 1).reshape(-1, *output_size)


def _interpolate(image: Tensor, at: list[Tensor]) -> Tensor:
    """Linear interpolation of [C, *S] at a point: 0 beyond a pixel from the map, the border's value up to there."""
    zero = image.new_zeros(image.shape[0])
    corners = []
    for position, size in zip(at, image.shape[1:], strict=True):
        if size == 0 or not -1 <= float(position.detach()) <= size:
            return zero
        inside = position.clamp(0, size - 1)
        low = min(int(inside.detach()), max(size - 2, 0))
        weight = inside - low
        corners.append([(low, 1 - weight), (min(low + 1, size - 1), weight)])
    total = zero
    for corner in itertools.product(*corners):
        value = image
        for index, _ in corner:
            value = value[:, index]
        total = total + value * math.prod([weight for _, weight in corner], start=torch.ones((), dtype=image.dtype))
    return total
