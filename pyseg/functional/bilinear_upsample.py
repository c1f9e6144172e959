"""Bilinear interpolation of feature maps: one to a size, and several to one size, concatenated."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyseg._ops import upsample as _op  # noqa: F401  registers the fake kernels
from pyseg._ops.forward_mode import refuse_tangents

Size = int | Sequence[int]


def bilinear_upsample(
    input: Tensor,
    size: Size | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
) -> Tensor:
    r"""torch.nn.functional.interpolate(mode="bilinear"): the same results, a gradient without atomics.

        output[n, c, i, j] = sum over a, b in {0, 1} of w_a(i) * w_b(j) * input[n, c, floor(y_i) + a, floor(x_j) + b]

        y_i = i * (H - 1) / (H_out - 1)             align_corners=True: the corners' centres meet
        y_i = max(0, (i + 1/2) * H / H_out - 1/2)   align_corners=False: the maps' borders meet

    with w_1(i) = y_i - floor(y_i), w_0 = 1 - w_1, and x alike; an index beyond the last element is the last. An axis
    that keeps its size is copied.

    Args:
        input: [N, C, H, W]. float32, float64, float16 or bfloat16; the 16-bit types are computed in float32 and rounded
            once. Any strides; channels_last and contiguous are the fastest.
        size: of the output, one integer or (height, width).
        scale_factor: how many times larger the output is, instead of size: floor(H * scale_factor). Without
            align_corners, 1 / scale_factor then stands for H / H_out above, as it does in torch. A number or two.
        align_corners: see above.

    Returns:
        [N, C, H_out, W_out], channels_last where input is.

    Coordinates are in double precision (torch's are in the dtype computed in). Differentiable any number of times; the
    gradient is a gather, with the same bits in every run and, on the CPU, for every number of threads. vmap works, and
    so do batched gradients.
    O(N * C * H_out * W_out) time, no memory but the output.

    Raises:
        RuntimeError: an argument that does not fit: names argument, expected and got.
    """
    op = "bilinear_upsample"
    refuse_tangents(op, input)
    if input.dim() != 4:
        raise RuntimeError(f"{op}: input must be [N, C, H, W], got {list(input.shape)}")
    if (size is None) == (scale_factor is None):
        raise RuntimeError(f"{op}: one of size and scale_factor must be given, got {size} and {scale_factor}")
    factors: list[float] | None = None
    if scale_factor is not None:
        factors = [float(f) for f in (scale_factor if isinstance(scale_factor, Sequence) else (scale_factor,) * 2)]
        if len(factors) != 2 or not all(0 < f < math.inf for f in factors):
            raise RuntimeError(f"{op}: scale_factor must be one or two positive numbers, got {scale_factor}")
        size = [torch.sym_int(side * f) for side, f in zip(input.shape[2:], factors, strict=True)]
    return torch.ops.pyseg.bilinear_upsample(input, _pair(op, size), align_corners, factors)


def upsample_concat(inputs: Sequence[Tensor], size: Size | None = None, align_corners: bool = True) -> Tensor:
    r"""Feature maps brought to one size by bilinear interpolation and concatenated, each straight into its place.

        output[:, C_1 + .. + C_{i-1} : C_1 + .. + C_i] = bilinear_upsample(inputs[i], size, align_corners=align_corners)

    The front of Joint Pyramid Upsampling (Wu et al. 2019, FastFCN, 1903.11816, section 3.3) and of feature pyramids'
    heads. Maps that have the size already are copied; torch's interpolate and cat write the others twice.

    Args:
        inputs: [N, C_i, H_i, W_i] each, of one dtype (under autocast the widest of theirs is taken).
        size: of the output, one integer or (height, width); by default the first input's.
        align_corners: as in bilinear_upsample; True is what FastFCN uses.

    Returns:
        [N, sum of C_i, *size], channels_last where an input is.

    Gradients, determinism, complexity and errors as bilinear_upsample.
    """
    op = "upsample_concat"
    maps = list(inputs)
    refuse_tangents(op, *maps)
    return torch.ops.pyseg.upsample_concat(maps, output_size(op, maps, size), align_corners)


def output_size(op: str, maps: list[Tensor], size: Size | None) -> list[int]:
    """That of the first map unless given."""
    if size is not None:
        return _pair(op, size)
    if not maps:
        raise RuntimeError(f"{op}: inputs must not be empty")
    if maps[0].dim() != 4:
        raise RuntimeError(f"{op}: inputs must be [N, C, H, W], got {list(maps[0].shape)}")
    return list(maps[0].shape[2:])


def _pair(op: str, size: Size | None) -> list[int]:
    pair = list(size) if isinstance(size, Sequence) else [size, size]
    if len(pair) != 2 or not all(isinstance(side, int | torch.SymInt) for side in pair):
        raise RuntimeError(f"{op}: size must be one or two integers, got {size}")
    return pair  # type: ignore[return-value]
