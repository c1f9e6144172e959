"""Decompositions of the operators on boxes: RoIAlign with a fixed number of points, mask pasting and cropping.

They serve runtimes without RoIAlign, and what ONNX's RoiAlign cannot do: rotated boxes and volumes. Suppression is a
loop whose length is data: it has no decomposition.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pyseg._ops.segmentation_statistics import wide_dtype
from pyseg.export.table import cannot, decomposes


@decomposes("roi_align")
def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    """A fixed number of points of each box, gathered."""
    rows = boxes.to(wide_dtype(input))
    level = torch.zeros_like(rows[:, 0], dtype=torch.int64)
    return _sampled("roi_align", [input], rows, level, output_size, [spatial_scale], sampling_ratio, aligned, mode)


@decomposes("multiscale_roi_align")
def multiscale_roi_align(
    features: list[Tensor],
    boxes: Tensor,
    output_size: list[int],
    spatial_scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
    least_level: int,
    most_level: int,
    canonical_size: float,
    canonical_level: float,
    epsilon: list[float],
) -> Tensor:
    """The same, each box from its level's map; a level is as many limits as the box's size reaches."""
    rows = boxes.to(wide_dtype(features[0]))
    rotated = rows.shape[1] == 6
    area = rows[:, 3] * rows[:, 4] if rotated else (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])
    ratio = area.clamp_min(0).sqrt() / canonical_size + epsilon[0]
    level = torch.zeros_like(rows[:, 0], dtype=torch.int64)
    for limit in level_limits(least_level, most_level, canonical_level, epsilon[1]):
        level = level + (ratio >= limit).long()
    op, known = "multiscale_roi_align", (area >= 0) & (level < len(features))
    level = level.clamp_max(len(features) - 1)
    pooled = _sampled(op, features, rows, level, output_size, spatial_scales, sampling_ratio, aligned, mode)
    return torch.where(known.view(-1, 1, 1, 1), pooled, 0)


def level_limits(least: int, most: int, canonical_level: float, epsilon: float) -> list[float]:
    """What sqrt(area) / canonical_size must reach for each level above the least: 2 to the level."""
    return [2.0 ** (level - canonical_level - epsilon) for level in range(least + 1, most + 1)]


def _sampled(
    op: str,
    maps: Sequence[Tensor],
    rows: Tensor,
    level: Tensor,
    output_size: list[int],
    scales: Sequence[float],
    ratio: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    """[K, C, *output_size] from the map of each row's level: corners gathered from one table of all maps' elements."""
    if ratio <= 0:
        raise cannot(op, f"sampling_ratio must be positive where there is no RoiAlign for the boxes, got {ratio}")
    wide, axes = rows.dtype, len(output_size)

    def of_level(values: Sequence[float]) -> Tensor:
        return sum((level == i).to(wide) * value for i, value in enumerate(values))  # type: ignore[return-value]

    table = torch.cat([each.movedim(1, -1).flatten(0, -2) for each in maps]).to(wide)  # [elements, C]
    sizes = [of_level([each.shape[2 + axis] for each in maps]).long() for axis in range(axes)]
    before = itertools.accumulate([each.numel() // each.shape[1] for each in maps[:-1]], initial=0)
    start = sum((level == i).long() * first for i, first in enumerate(before))

    positions = _positions(rows, of_level(scales), output_size, ratio, aligned)
    inside = torch.ones_like(positions[0], dtype=torch.bool)
    corners = []
    for position, size in zip(positions, sizes, strict=True):
        last = (size - 1).view(-1, *[1] * axes)
        inside = inside & (position >= -1) & (position <= (last + 1).to(wide))
        place = torch.minimum(position.clamp_min(0), last.to(wide))
        low = place.floor().long()
        share = place - low.to(wide)
        corners.append(((low, 1 - share), (torch.minimum(low + 1, last), share)))
    total: Tensor | None = None
    for chosen in itertools.product(*corners):
        index, weight = rows[:, 0].long().view(-1, *[1] * axes), inside.to(wide)
        for (place, share), size in zip(chosen, sizes, strict=True):
            index, weight = index * size.view(-1, *[1] * axes) + place, weight * share
        index = index + start.view(-1, *[1] * axes)  # type: ignore[union-attr]
        term = table[index] * weight.unsqueeze(-1)
        total = term if total is None else total + term
    assert total is not None
    for axis, bins in enumerate(output_size):  # [K, bins, points, ..., C], innermost last
        total = total.unflatten(1 + 2 * axis, (bins, ratio))  # type: ignore[no-untyped-call]
    points = [2 + 2 * axis for axis in range(axes)]
    pooled = total.mean(points) if mode == "avg" else total.amax(points)
    return pooled.movedim(-1, 1).to(maps[0].dtype)


def _positions(rows: Tensor, scale: Tensor, output_size: list[int], ratio: int, aligned: bool) -> list[Tensor]:
    """The points' coordinates along each axis of the map, each [K, *(bins * ratio)]."""
    axes, offset = len(output_size), 0.5 if aligned else 0.0
    rotated = axes == 2 and rows.shape[1] == 6
    if rotated:
        lengths = [rows[:, 4] * scale, rows[:, 3] * scale]
    else:
        firsts = [rows[:, 1 + axis] * scale - offset for axis in reversed(range(axes))]
        lengths = [
            rows[:, 1 + axes + axis] * scale - offset - first
            for axis, first in zip(reversed(range(axes)), firsts, strict=True)
        ]
    if not aligned:
        lengths = [length.clamp_min(1) for length in lengths]
    if rotated:
        firsts = [length * -0.5 for length in lengths]
    shape = [rows.shape[0], *[bins * ratio for bins in output_size]]
    own = []
    for axis, (first, length, bins) in enumerate(zip(firsts, lengths, output_size, strict=True)):
        places = (torch.arange(bins * ratio, dtype=rows.dtype, device=rows.device) + 0.5) / (bins * ratio)
        along = first[:, None] + places * length[:, None]
        own.append(along.view(-1, *[1] * axis, bins * ratio, *[1] * (axes - 1 - axis)).expand(shape))
    if not rotated:
        return own
    y, x = own
    angle = torch.deg2rad(rows[:, 5]).view(-1, 1, 1)
    sine, cosine = angle.sin(), angle.cos()
    centre_x, centre_y = ((rows[:, 1 + i] * scale - offset).view(-1, 1, 1) for i in range(2))
    return [y * cosine - x * sine + centre_y, y * sine + x * cosine + centre_x]


# ---- masks ----


@decomposes("paste_masks")
def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, output: str, padding: int
) -> Tensor:
    """Interpolation is separable: rows [K, H, m_h] times masks times columns [K, m_w, W]."""
    wide = wide_dtype(masks)
    rows, columns = (
        _pasted_axis(boxes, axis, masks.shape[1 + i], masks.shape[2], size, padding, wide)
        for i, (axis, size) in enumerate(((1, height), (0, width)))
    )
    values = (rows @ masks.to(wide) @ columns.mT).to(masks.dtype)
    if output == "values":
        return values
    above = values > threshold
    if output == "bool":
        return above
    bits = torch.nn.functional.pad(above.to(torch.int32), (0, 7)).unfold(2, 8, 8)
    places = torch.arange(7, -1, -1, device=masks.device)
    return (bits * torch.bitwise_left_shift(torch.ones_like(places), places)).sum(3).to(torch.uint8)


def _pasted_axis(
    boxes: Tensor, axis: int, size: int, mask_width: int, image_size: int, padding: int, wide: torch.dtype
) -> Tensor:
    """Weights [K, image_size, size] of a mask's elements in the image's pixels along one axis."""
    corners = boxes if boxes.dtype == torch.float64 else boxes.float()
    low, high = corners[:, axis], corners[:, 2 + axis]
    half, centre = (high - low) * 0.5, (high + low) * 0.5
    reach = half * ((mask_width + 2 * padding) / mask_width)
    first, last = (centre - reach).long()[:, None], (centre + reach).long()[:, None]
    pixel = torch.arange(image_size, device=boxes.device)
    framed = size + 2 * padding
    place = (pixel - first + 0.5).to(wide) * framed / (last - first + 1).clamp_min(1).to(wide) - 0.5
    place = place.clamp(0, framed - 1).unsqueeze(2) - padding
    element = torch.arange(size, dtype=wide, device=boxes.device)
    weights = (1 - (place - element).abs()).clamp_min(0)
    return torch.where(((pixel >= first) & (pixel <= last)).unsqueeze(2), weights, 0)


@decomposes("crop_masks")
def crop_masks(masks: Tensor, boxes: Tensor, size: list[int], sampling_ratio: int, aligned: bool) -> Tensor:
    """RoIAlign of the masks as float32."""
    maps = (masks != 0).to(torch.float32).unsqueeze(1)
    pooled: Tensor = torch.ops.pyseg.roi_align(maps, boxes, size, 1.0, sampling_ratio, aligned, "avg")
    return pooled.squeeze(1)


@decomposes("paste_masks_rle")
def paste_masks_rle(*arguments: object) -> tuple[Tensor, Tensor]:
    """Raises: there is no such thing."""
    raise cannot("paste_masks", "run lengths are bytes of COCO's files, not tensors of a network: paste bool masks")
