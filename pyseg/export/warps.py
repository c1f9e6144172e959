"""Decompositions of the operators that read maps at computed places: joint_warp and warp_to_view."""

import itertools
import math

import torch
from torch import Tensor

from pyseg._ops.segmentation_statistics import wide_dtype
from pyseg.export.table import decomposes, replaces

# ---- joint_warp: the kernels' order of operations, so that places round alike ----


@decomposes("joint_warp")
def joint_warp(
    image: Tensor,
    labels: Tensor | None,
    affine: Tensor,
    displacement: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    size: list[int],
    border: str,
    fill: float,
    label_border: str,
    ignore_index: int,
    cubic: float,
    float_output: bool,
) -> tuple[Tensor, Tensor]:
    """Places by arithmetic, elements by gathers."""
    wide = wide_dtype(image) if image.is_floating_point() else torch.float32
    axes = len(size)
    places = _affine_places(affine.to(wide), size)
    if displacement is not None:
        field = displacement.to(wide)
        for axis, side in enumerate(size):
            field = _cubic_along(field, 2 + axis, side, cubic)
        places = [place + field[:, axis] for axis, place in enumerate(places)]
    output = _interpolated(image.to(wide), places, border, fill)
    if gain is not None:
        output = output * gain.to(wide).reshape(*gain.shape, *[1] * axes)
    if bias is not None:
        output = output + bias.to(wide).reshape(*bias.shape, *[1] * axes)
    if image.dtype != torch.uint8:
        output = output.to(image.dtype)
    elif not float_output:
        output = (torch.where(output > 0, output, 0).clamp_max(255) + 0.5).to(torch.uint8)
    if labels is None:
        return output, image.new_zeros(0)
    if labels.is_floating_point():
        return output, _interpolated(labels.to(wide), places, label_border, 0.0).to(labels.dtype)
    return output, _nearest(labels, places, label_border, ignore_index)


def _affine_places(affine: Tensor, size: list[int]) -> list[Tensor]:
    """Along each axis [N, *size]."""
    axes = len(size)
    own = [
        torch.arange(side, dtype=affine.dtype, device=affine.device).view(-1, *[1] * (axes - 1 - axis))
        for axis, side in enumerate(size)
    ]
    entries = affine.reshape(-1, axes, axes + 1, *[1] * axes)
    places = []
    for row in range(axes):
        place = entries[:, row, 0] * own[0]
        for axis in range(1, axes - 1):
            place = place + entries[:, row, axis] * own[axis]
        places.append((place + entries[:, row, axes]) + entries[:, row, axes - 1] * own[-1])
    return places


def _cubic_along(points: Tensor, dim: int, side: int, cubic: float) -> Tensor:
    """Control points interpolated along one dimension to `side` elements; the outermost repeat."""
    count = points.shape[dim]
    at = torch.arange(side, dtype=points.dtype, device=points.device)
    at = at * ((count - 1) / (side - 1) if side > 1 else 0.0)
    cell = at.long().clamp_max(max(count - 2, 0))
    t = (at - cell.to(at.dtype)).view(-1, *[1] * (points.dim() - 1 - dim))
    before, left, right, after = (points.index_select(dim, (cell + step).clamp(0, count - 1)) for step in (-1, 0, 1, 2))
    left_slope, right_slope, rise = cubic * (before - right), cubic * (left - after), right - left
    c2, c3 = 3 * rise - (2 * left_slope + right_slope), (left_slope + right_slope) - 2 * rise
    return left + t * (left_slope + t * (c2 + t * c3))


def _brought_inside(at: Tensor, size: int, border: str) -> Tensor:
    """From 0 to size - 1, one more on either side for a constant border; NaN to the lowest."""
    beyond = 1.0 if border == "constant" else 0.0
    low, high = -beyond, size - 1 + beyond
    if border == "reflect" and size > 1:
        period = 2 * (size - 1)
        distance = at.abs()
        distance = torch.where(distance < 2.0**30, distance, 2.0**30)
        rest = distance - (distance * (1 / period)).trunc() * period
        back = period - rest
        at = torch.where(rest < back, rest, back)
    at = torch.where(at > low, at, low)
    return torch.where(at < high, at, high)


def _interpolated(maps: Tensor, places: list[Tensor], border: str, fill: float) -> Tensor:
    """[N, C, *size], linear. An element of weight 0 counts as 0."""
    corners = []
    for place, side in zip(places, maps.shape[2:], strict=True):
        at = _brought_inside(place, side, border)
        first = at.trunc().clamp(0, max(side - 2, 0))
        taps = [(first.long(), (1 - (at - first).abs()).clamp_min(0))]
        if side > 1:
            taps.append((first.long() + 1, (1 - (at - first - 1).abs()).clamp_min(0)))
        corners.append(taps)
    values, known = [], []
    for chosen in itertools.product(*corners):
        weight = math.prod(share for _, share in chosen)
        assert isinstance(weight, Tensor)
        element = _elements(maps, [index for index, _ in chosen])
        values.append(torch.where(weight.unsqueeze(1) == 0, 0, weight.unsqueeze(1) * element))
        known.append(weight)
    if border == "constant":
        values.append((torch.stack(known).sum(0) * -fill + fill).unsqueeze(1))
    return sum(values)  # type: ignore[return-value]


def _nearest(labels: Tensor, places: list[Tensor], border: str, ignore_index: int) -> Tensor:
    inside, indices = torch.ones_like(places[0], dtype=torch.bool), []
    for place, side in zip(places, labels.shape[1:], strict=True):
        at = _brought_inside(place, side, border)
        inside = inside & (at >= -0.5) & (at < side - 0.5)
        indices.append((at + 0.5).long().clamp(0, side - 1))
    taken = _elements(labels.unsqueeze(1), indices).squeeze(1)
    if labels.dtype == torch.bool:  # onnxruntime has no Where of bool
        return (taken & inside) | ~inside if ignore_index else taken & inside
    return torch.where(inside, taken, torch.full_like(taken, ignore_index))


def _elements(maps: Tensor, indices: list[Tensor]) -> Tensor:
    """maps[n, :, *indices[n]] as [N, C, *size]: rows of a table of all images' elements."""
    table = maps.movedim(1, -1).flatten(0, -2)
    row = torch.arange(maps.shape[0], device=maps.device).view(-1, *[1] * (indices[0].dim() - 1))
    for index, side in zip(indices, maps.shape[2:], strict=True):
        row = row * side + index
    return table[row].movedim(-1, 1)


# ---- warp_to_view ----


@decomposes("warp_to_view")
def warp_to_view(
    scores: Tensor,
    depth: Tensor,
    key_intrinsics: Tensor,
    source_intrinsics: Tensor,
    pose: Tensor,
    source_depth: Tensor | None,
    absolute_tolerance: float,
    relative_tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Geometry in float64, as the kernels'; elements by gathers; the views of a keyframe added up."""
    height, width = scores.shape[2:]
    keys = depth.shape[0]
    views = scores.shape[0] // max(keys, 1)

    def of_views(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(1).expand(-1, views, *tensor.shape[1:]).flatten(0, 1)

    matrix, shift = _projection(of_views(key_intrinsics.double()), source_intrinsics.double(), pose.double())
    z = of_views(depth.double())
    v = torch.arange(depth.shape[1], dtype=torch.float64, device=depth.device).view(-1, 1)
    u = torch.arange(depth.shape[2], dtype=torch.float64, device=depth.device)
    m = matrix.view(-1, 3, 3, 1, 1)
    x, y, away = (
        z * (m[:, row, 0] * u + (m[:, row, 1] * v + m[:, row, 2])) + shift[:, row].view(-1, 1, 1) for row in range(3)
    )
    x, y = x * away.reciprocal(), y * away.reciprocal()
    seen = (z > 0) & (away > 0) & (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    # Places of pixels that are not seen may be NaN: they read the first element.
    x, y = (torch.where(seen, at, 0).clamp(0, side - 1) for at, side in ((x, width), (y, height)))
    if source_depth is not None:
        near = _elements(source_depth.double().unsqueeze(1), [(y + 0.5).long(), (x + 0.5).long()]).squeeze(1)
        close = (away - near).abs() <= absolute_tolerance + relative_tolerance * near
        seen = seen & (near > 0) & (near <= torch.finfo(torch.float64).max) & close
    wide = wide_dtype(scores)
    left, top = x.long().clamp_max(max(width - 2, 0)), y.long().clamp_max(max(height - 2, 0))
    right, bottom = (left + 1).clamp_max(width - 1), (top + 1).clamp_max(height - 1)
    x_share, y_share = ((at - low.double()).to(wide).unsqueeze(1) for at, low in ((x, left), (y, top)))
    maps = scores.to(wide)
    upper, lower = (
        (1 - x_share) * _elements(maps, [row, left]) + x_share * _elements(maps, [row, right]) for row in (top, bottom)
    )
    warped = torch.where(seen.unsqueeze(1), (1 - y_share) * upper + y_share * lower, 0)
    total = warped.reshape(keys, views, *warped.shape[1:]).sum(1)
    return total.to(scores.dtype), seen.reshape(keys, views, *depth.shape[1:]).to(torch.uint8).sum(1).to(torch.uint8)


def _projection(key: Tensor, source: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """K_s R K_k^-1 [N, 3, 3] and K_s t [N, 3] of cameras [[fx, s, cx], [0, fy, cy], [0, 0, 1]]."""
    fx, s, cx, fy, cy = key[:, 0, 0], key[:, 0, 1], key[:, 0, 2], key[:, 1, 1], key[:, 1, 2]
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    rows = [1 / fx, -s / (fx * fy), (s * cy / fy - cx) / fx, zero, 1 / fy, -cy / fy, zero, zero, one]
    inverse = torch.stack(rows, 1).view(-1, 3, 3)
    rows = [source[:, 0, 0], source[:, 0, 1], source[:, 0, 2], zero, source[:, 1, 1], source[:, 1, 2], zero, zero, one]
    to_image = torch.stack(rows, 1).view(-1, 3, 3)
    matrix = to_image @ (pose[:, :3, :3] @ inverse)
    return matrix, (to_image @ pose[:, :3, 3:]).squeeze(2)


@replaces(torch.ops.aten.view.dtype)
def view_dtype(self: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of 0 and 1 as bool: what a warp hands out as seen; ONNX's exporter has no form of it."""
    return self != 0 if (self.dtype, dtype) == (torch.uint8, torch.bool) else NotImplemented
