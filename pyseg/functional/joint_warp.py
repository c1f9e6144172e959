"""Images and labels warped together: affine maps, elastic deformations, brightness and contrast in one pass."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyseg._ops import joint_warp as _op  # noqa: F401  registers the fake kernels
from pyseg._ops.forward_mode import refuse_tangents

Border = Literal["reflect", "replicate", "constant"]
CATMULL_ROM = -0.5


def joint_warp(
    image: Tensor,
    labels: Tensor | None = None,
    affine: Tensor | None = None,
    displacement: Tensor | None = None,
    *,
    gain: float | Tensor | None = None,
    bias: float | Tensor | None = None,
    size: Sequence[int] | None = None,
    border: Border = "reflect",
    fill: float = 0.0,
    label_border: Border | None = None,
    ignore_index: int | None = None,
    cubic: float = CATMULL_ROM,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Image and labels read at the same warped places, in one pass that also changes brightness and contrast.

        place(o)      = A [o; 1] + u(o)                    in elements of the image
        output[c, o]  = gain[c] * image[c](place(o)) + bias[c]       linear interpolation
        labels'[o]    = labels[nearest element of place(o)]

    with u the control points `displacement` interpolated by cubic convolution along each axis (Keys 1981; the outermost
    points repeat outside), which lie evenly over the output, the first and last on its first and last element. The
    field and the places are never stored.

    Args:
        image: [N, C, H, W] or [N, C, D, H, W], of float32, float64, float16, bfloat16 (16-bit types are computed in
            float32 and rounded once) or uint8. Any strides; sides to 2^24.
        labels: [N, *S] of integers or bool, which are copied, never mixed; or soft, [N, K, *S] of the image's dtype
            (float32 beside uint8), interpolated as the image is.
        affine: [N, d, d + 1], from indices of the output to indices of the image, axes in the image's order
            (`warp_matrix` makes it). Default: the identity.
        displacement: [N, d, *grid], one vector of d elements at each control point; any grid. Default: none.
        gain, bias: a number, [N] or [N, C]. uint8 to normalised floats: gain = 1 / (255 * std), bias = -mean / std.
        size: of the output, d integers; default: the image's.
        border: what lies outside the image: "reflect" (about the centres of the outermost elements), "replicate", or
            "constant": `fill`, in the image's values before gain and bias.
        label_border: the same for labels; default: "constant" where `ignore_index` is given, otherwise as the image's.
        ignore_index: of labels outside, for "constant" (0 if left out). Soft labels are 0 there.
        cubic: Keys' a. -1/2 (Catmull-Rom, MATLAB's bicubic) keeps straight lines between inner control points; -3/4 is
            torch's and OpenCV's bicubic.
        dtype: of the output of uint8 images: torch.uint8 (default; rounded to the nearest, cut to 0..255) or
            torch.float32.

    Returns:
        The image [N, C, *size], channels_last where it was, and the labels, [N, *size] or [N, K, *size], or None.

    affine, displacement, gain and bias are brought to the image's device; 16-bit and float32 images take float32 of
    them. No operation is fused with another, so that places have the same bits on every processor and on CUDA devices:
    labels agree exactly, images do too. A place that is whole copies its element, whatever lies beside it; NaN in
    `affine` or `displacement` reads the first element (or outside, for "constant").

    Differentiable any number of times in image and soft labels, not in the parameters. The gradient is deterministic:
    on the CPU added up in the order of the output's elements, on CUDA devices gathered after a sort of the places by
    element (which takes 16 bytes and a place an element of the output, and CUB's workspace). vmap works.
    O(N * C * 2^d * output) time, no memory but the outputs.

    Augmentation as in Ronneberger et al. 2015 (1505.04597), section 3.1: see `elastic_deform` and
    `pyseg.nn.JointAugmentation`.

    Raises:
        RuntimeError: an argument that does not fit: names argument, expected and got.
    """
    op = "joint_warp"
    refuse_tangents(op, image, labels)
    if image.dim() not in (4, 5):
        raise RuntimeError(f"{op}: image must be [N, C, H, W] or [N, C, D, H, W], got {list(image.shape)}")
    axes = image.dim() - 2
    accepted = (torch.uint8, torch.float32) if image.dtype == torch.uint8 else (image.dtype,)
    if dtype is not None and dtype not in accepted:
        raise RuntimeError(f"{op}: dtype must be one of {accepted}, got {dtype}")
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    if affine is None:
        affine = torch.eye(axes, axes + 1, dtype=wide, device=image.device).expand(image.shape[0], -1, -1)
    if label_border is None:
        label_border = border if ignore_index is None else "constant"
    output, warped = torch.ops.pyseg.joint_warp(
        image,
        labels,
        affine.to(image.device),
        None if displacement is None else displacement.to(image.device),
        _of_channels(op, "gain", gain, image, wide),
        _of_channels(op, "bias", bias, image, wide),
        list(image.shape[2:] if size is None else size),
        border,
        fill,
        label_border,
        0 if ignore_index is None else ignore_index,
        cubic,
        dtype == torch.float32,
    )
    return output, None if labels is None else warped


def _of_channels(op: str, name: str, factor: float | Tensor | None, image: Tensor, wide: torch.dtype) -> Tensor | None:
    """[N, C]."""
    if factor is None:
        return None
    if not isinstance(factor, Tensor):
        return torch.full(image.shape[:2], float(factor), dtype=wide, device=image.device)
    if factor.dim() == 1:
        factor = factor[:, None].expand(-1, image.shape[1])
    if factor.dim() != 2:
        raise RuntimeError(f"{op}: {name} must be a number, [N] or [N, C], got {list(factor.shape)}")
    return factor.to(image.device)


def warp_matrix(
    image_size: Sequence[int],
    size: Sequence[int] | None = None,
    *,
    rotation: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    flip: Tensor | None = None,
    translation: Tensor | None = None,
) -> Tensor:
    r"""[N, d, d + 1], float64: the `affine` of joint_warp that turns, scales, mirrors and moves about the centres.

        place = centre of the image + translation + R diag(+-1 / scale) (o - centre of the output)

    Args:
        image_size, size: sides of image and output (the same if left out), axes in their order, (D,) H, W.
        rotation: degrees, a number or [N]; of volumes [N, 3], about the axes D, H, W one after the other, or [N] about
            D. Positive turns the picture counterclockwise as it is usually drawn, with H pointing down.
        scale: more than 1 enlarges; a number, [N] or [N, d].
        flip: [N, d] bool, axes to mirror.
        translation: [N, d], what the output's centre reads, in elements away from the image's centre.

    Whole quarter turns and flips between sides that fit are exact copies.
    """
    axes = len(image_size)
    given = [t for t in (rotation, scale, flip, translation) if isinstance(t, Tensor) and t.dim() > 0]
    count = max((len(t) for t in given), default=1)
    angles = torch.as_tensor(rotation, dtype=torch.float64).deg2rad()
    angles = angles.reshape(-1, 1) if angles.dim() < 2 else angles
    turned = torch.eye(axes, dtype=torch.float64).expand(count, axes, axes)
    # Without rounding the cosine of a right angle is 6e-17.
    cosines, sines = angles.cos().round(decimals=15), angles.sin().round(decimals=15)
    planes = [(axes - 2, axes - 1), (0, 2), (0, 1)][: angles.shape[1]]
    for column, (first, second) in enumerate(planes):
        turn = torch.eye(axes, dtype=torch.float64).repeat(len(angles), 1, 1)
        turn[:, first, first] = turn[:, second, second] = cosines[:, column]
        turn[:, first, second], turn[:, second, first] = sines[:, column], -sines[:, column]
        turned = turned @ turn
    factors = 1 / torch.as_tensor(scale, dtype=torch.float64)
    factors = factors.reshape(-1, 1) if factors.dim() < 2 else factors
    if flip is not None:
        factors = torch.where(flip, -factors, factors)
    linear = turned * factors.expand(count, axes)[:, None, :]
    centre, out_centre = (
        (torch.tensor([float(side) for side in sides], dtype=torch.float64) - 1) / 2
        for sides in (image_size, image_size if size is None else size)
    )
    offset = centre - linear @ out_centre
    if translation is not None:
        offset = offset + translation.to(torch.float64)
    return torch.cat([linear, offset[..., None]], -1)


def elastic_deform(
    image: Tensor,
    labels: Tensor | None = None,
    *,
    sigma: float | Sequence[float] = 10.0,
    grid: int | Sequence[int] = 3,
    generator: torch.Generator | None = None,
    border: Border = "reflect",
    fill: float = 0.0,
    label_border: Border | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""U-Net's elastic deformation of images and their labels (Ronneberger et al. 2015, 1505.04597, section 3.1).

    Displacement vectors are drawn from a normal distribution on a coarse grid, for each image its own, and
    interpolated bicubically (tricubically) for every pixel: "smooth deformations using random displacement vectors on a
    coarse 3 by 3 grid ... sampled from a Gaussian distribution with 10 pixels standard deviation".

    Args:
        sigma: standard deviation in pixels (10), or one for each axis, for voxels that are not cubes.
        grid: control points along every axis (3), or for each.
        generator: on the CPU, where the vectors are drawn whatever the image's device, so that each device gives the
            same result for a seed. Default: torch's.
        image, labels, border, fill, label_border, ignore_index: as in `joint_warp`, and so is all else.
    """
    if image.dim() not in (4, 5):
        raise RuntimeError(f"elastic_deform: image must be [N, C, H, W] or [N, C, D, H, W], got {list(image.shape)}")
    displacement = random_displacement(image.shape[0], image.dim() - 2, sigma, grid, generator)
    return joint_warp(
        image,
        labels,
        displacement=displacement,
        border=border,
        fill=fill,
        label_border=label_border,
        ignore_index=ignore_index,
    )


def random_displacement(
    images: int,
    axes: int,
    sigma: float | Sequence[float] = 10.0,
    grid: int | Sequence[int] = 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """[N, d, *grid], float32 on the CPU: normal vectors of deviation sigma, for joint_warp's `displacement`."""
    op = "elastic_deform"
    deviations = [float(s) for s in sigma] if isinstance(sigma, Sequence) else [float(sigma)] * axes
    counts = list(grid) if isinstance(grid, Sequence) else [grid] * axes
    if len(deviations) != axes or not all(0 <= s < math.inf for s in deviations):
        raise RuntimeError(f"{op}: sigma must be a number or {axes}, not negative, got {sigma}")
    if len(counts) != axes or not all(count >= 1 for count in counts):
        raise RuntimeError(f"{op}: grid must be a positive integer or {axes}, got {grid}")
    drawn = torch.randn(images, axes, *counts, generator=generator)
    return drawn * torch.tensor(deviations).reshape(-1, *[1] * axes)
