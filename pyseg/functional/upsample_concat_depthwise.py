"""Interpolation, concatenation and dilated depthwise convolutions of a pyramid in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyseg._ops import upsample_concat_depthwise as _op  # noqa: F401  registers the fake kernels
from pyseg._ops.forward_mode import refuse_tangents
from pyseg.functional.bilinear_upsample import Size, output_size


def upsample_concat_depthwise(
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int] = (1, 2, 4, 8),
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    size: Size | None = None,
    align_corners: bool = True,
) -> Tensor:
    r"""R dilated depthwise 3x3 convolutions of concatenated maps of several resolutions, with R folded batch norms.

        output[r, n, c, i, j] = scale[r, c] * z[r, n, c, i, j] + shift[r, c]
        z[r, n, c, i, j] = sum_{a, b} weight[r, c, a, b] * u[n, c, i + (a - 1) * d_r, j + (b - 1) * d_r]
        u = upsample_concat(inputs, size, align_corners), zero outside the map

    the depthwise halves of the separable convolutions of Joint Pyramid Upsampling (Wu et al. 2019, FastFCN, 1903.11816,
    figure 4 and section 3.3). u never exists in memory: maps are read at their own resolutions, and outputs are
    written once.

    Args:
        inputs: [N, C_i, H_i, W_i] each; C is the sum of C_i. float32, float64, float16 or bfloat16, all the same; any
            strides. The 16-bit types are computed in float32 and rounded once.
        weight: [R, C, 3, 3], of the inputs' dtype or, beside 16-bit inputs, float32; so scale and shift.
        dilations: R positive integers, at most 16; padding is the dilation.
        scale, shift: [R, C], a folded batch norm: gamma / sqrt(var + eps) and beta - mean * scale. None: 1 and 0.
        size: of the output, one integer or (height, width); by default the first input's.
        align_corners: as in bilinear_upsample; True is what FastFCN uses.

    Returns:
        [R, N, C, *size]; each of the R parts is channels_last where an input is, otherwise contiguous.

    Differentiable any number of times in inputs, weight, scale and shift. Only the inputs are kept for that; the
    gradient interpolates again, and its memory beyond the gradients is 10 * N * R * C sums and, on CUDA, one
    [N, C, *size] for the maps that are interpolated. Deterministic: the same bits in every run and, on the CPU, for
    every number of threads. torch.vmap and batched gradients work. O(N * R * C * H * W * 9) time.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit: names argument, expected and got.
    """
    op, maps = "upsample_concat_depthwise", list(inputs)
    refuse_tangents(op, *maps, weight, scale, shift)
    sides = output_size(op, maps, size)
    return torch.ops.pyseg.upsample_concat_depthwise(maps, weight, scale, shift, sides, list(dilations), align_corners)
