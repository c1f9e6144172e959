"""Boxes of feature maps, resampled to one size: RoIAlign, on one map and on a pyramid of them."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyseg._ops import roi_align as _op  # noqa: F401  registers the fake kernels
from pyseg._ops.forward_mode import refuse_tangents

Boxes = Tensor | Sequence[Tensor]


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: Literal["avg", "max"] = "avg",
) -> Tensor:
    r"""RoIAlign (He et al. 2017, Mask R-CNN, section 3): each box cut into bins, each bin the mean of points in it.

        output[k, c, i, j] = mean over the points (y, x) of bin (i, j) of box k of input[n_k, c](y, x)

    with bilinear interpolation at the points; what torchvision.ops.roi_align computes, with its arguments. Points lie
    at (p + (i + 1/2) / n) * length for each of n points of bin p. Up to a pixel beyond the map the border's value
    counts, farther out 0. The mean is separable: weights of rows and columns are computed once for each box, not for
    each channel and point.

    Args:
        input: [N, C, H, W], or volumes [N, C, D, H, W]; float32, float64, float16 or bfloat16, of any strides.
        boxes: in the coordinates of the image, that is the map's divided by spatial_scale; any floating dtype.
            [K, 5]: batch index, x1, y1, x2, y2. [K, 6]: batch index, centre x, centre y, width, height, angle in
            degrees, counter-clockwise. Of volumes [K, 7]: batch index, x1, y1, z1, x2, y2, z2. Or a list with a tensor
            for each image, without the batch index.
        output_size: bins along each axis of the map; one number for all axes.
        spatial_scale: size of the map over that of the image.
        sampling_ratio: points of a bin along each axis; 0 or less: as many as its length in elements, rounded up.
        aligned: take half a pixel off the coordinates (element centres lie at 1/2); without it boxes count as one
            pixel long at least.
        mode: "max" takes the largest of the points instead of their mean; those off the map count as 0, a NaN is
            larger than all.

    Returns:
        [K, C, *output_size], in input's dtype; channels_last where `input` is. Coordinates and sums are in float32
        (float64 for float64 input), for 16-bit input and boxes too. Inverted boxes of aligned=True give what
        torchvision gives, zeros for adaptive sampling; so do boxes off the map.

    Differentiable by `input` and by `boxes` (Jiang et al. 2018, 1807.11590, for means over points: points move with
    their box, their number stays); the gradient of a maximum goes to its first point. Not twice. Deterministic, the
    same bits for every number of threads. Time is O(K * C * elements that a bin reads); channels_last maps are read as
    they are, of others the parts that boxes cover are rearranged, 24 MiB of scratch or 16 channels at a time.

    Raises:
        RuntimeError: a shape, dtype or value that does not fit; on the CPU a box that is not finite or whose batch
            index is out of range. (On CUDA the outputs of such boxes are NaN.)
    """
    maps = input.dim() - 2
    rows = _as_rows("roi_align", boxes, input)
    refuse_tangents("roi_align", input, rows)
    return torch.ops.pyseg.roi_align(
        input, rows, _sizes(output_size, maps), float(spatial_scale), sampling_ratio, aligned, mode
    )


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: Literal["avg", "max"] = "avg",
    levels: tuple[int, int] | None = None,
    canonical_size: float = 224,
    canonical_level: float = 4,
    epsilon: tuple[float, float] | None = None,
) -> Tensor:
    r"""`roi_align` on the level of a feature pyramid that fits each box, all levels in one call.

        level = floor(canonical_level + log2(sqrt(width * height) / canonical_size + epsilon[0]) + epsilon[1])

    (Lin et al. 2017, Feature Pyramid Networks, equation 1), within `levels`; features[level - levels[0]] is read.

    Args:
        features: maps [N, C, H_l, W_l], finest first, of one dtype; each of any strides. At most 16 on CUDA.
        boxes: as for `roi_align`, [K, 5] or [K, 6], or a list.
        spatial_scales: size of each map over that of the image.
        levels: the first and the last level; None: -log2 of the first and the last scale.
        canonical_size, canonical_level: a box of this size belongs to this level.
        epsilon: what keeps sizes that are powers of two from falling a level. None: (0, 1e-6), torchvision's;
            detectron2's is (1e-8, 0).
        output_size, sampling_ratio, aligned, mode: as for `roi_align`.

    Returns:
        [K, C, *output_size], in the order of the boxes; channels_last where a map is. A box of negative area belongs
        to no level: its output is 0. Gradients, determinism, errors are those of `roi_align`; the level of a box is
        constant for the gradient.
    """
    op = "multiscale_roi_align"
    if len(features) == 0:
        raise RuntimeError(f"{op}: features must not be empty")
    scales = [float(scale) for scale in spatial_scales]
    least, most = _levels(scales) if levels is None else levels
    rows = _as_rows(op, boxes, features[0])
    refuse_tangents(op, *features, rows)
    return torch.ops.pyseg.multiscale_roi_align(
        list(features),
        rows,
        _sizes(output_size, 2),
        scales,
        sampling_ratio,
        aligned,
        mode,
        least,
        most,
        float(canonical_size),
        float(canonical_level),
        [0.0, 1e-6] if epsilon is None else list(epsilon),
    )


def _levels(scales: list[float]) -> tuple[int, int]:
    if not scales or min(scales) <= 0:
        raise RuntimeError(f"multiscale_roi_align: spatial_scales must be positive, got {scales}")
    return int(-math.log2(scales[0])), int(-math.log2(scales[-1]))


def _sizes(output_size: int | Sequence[int], dims: int) -> list[int]:
    return [output_size] * dims if isinstance(output_size, int | torch.SymInt) else list(output_size)


def _as_rows(op: str, boxes: Boxes, like: Tensor) -> Tensor:
    """[K, 1 + coordinates] of a list with a tensor [L, coordinates] for each image."""
    if isinstance(boxes, Tensor):
        return boxes
    for each in boxes:
        if not isinstance(each, Tensor) or each.dim() != 2:
            got = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise RuntimeError(f"{op}: boxes must be a list of tensors [L, coordinates], got {got}")
    if len(boxes) == 0:
        return like.new_zeros((0, 5 if like.dim() == 4 else 7), dtype=torch.float32)
    rows = torch.cat(list(boxes))
    if rows.dtype in (torch.float16, torch.bfloat16):  # which cannot count the images
        rows = rows.float()
    index = torch.cat([rows.new_full((each.shape[0], 1), float(image)) for image, each in enumerate(boxes)])
    return torch.cat([index, rows], 1)
