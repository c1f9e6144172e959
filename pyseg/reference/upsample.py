"""bilinear_upsample, upsample_concat and upsample_concat_depthwise from their definitions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _interpolation_matrix(size: int, out: int, align_corners: bool, scale_factor: float | None) -> Tensor:
    """[out, size]: row i holds the weights of element i of the output."""
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        if out == size:
            at = float(i)
        elif align_corners:
            at = i * (size - 1) / (out - 1) if out > 1 else 0.0
        else:
            at = max((i + 0.5) * (1 / scale_factor if scale_factor else size / out) - 0.5, 0.0)
        low = min(int(at), size - 1)
        high = min(low + 1, size - 1)
        weight = min(at - low, 1.0)
        matrix[i, low] += 1 - weight
        matrix[i, high] += weight
    return matrix


def bilinear_upsample(
    input: Tensor,
    size: tuple[int, int],
    align_corners: bool = False,
    scale_factors: tuple[float, float] | None = None,
) -> Tensor:
    r"""y[n, c, i, j] = sum_{u, v} A[i, u] * B[j, v] * x[n, c, u, v], A and B the two axes' interpolation matrices.

    Coordinates follow from the scale factors where given, else from the sizes. input [N, C, H, W]; any floating dtype,
    in which it computes. Differentiable by torch's autograd.
    """
    factors = scale_factors or (None, None)
    rows, columns = (
        _interpolation_matrix(input.shape[2 + axis], size[axis], align_corners, factors[axis]).to(input)
        for axis in range(2)
    )
    return torch.einsum("iu,ncuv,jv->ncij", rows, input, columns)


def upsample_concat(inputs: Sequence[Tensor], size: tuple[int, int], align_corners: bool = True) -> Tensor:
    """All inputs [N, C_i, H_i, W_i] at one size, one after the other: [N, sum of C_i, *size]."""
    return torch.cat([bilinear_upsample(x, size, align_corners) for x in inputs], 1)


def upsample_concat_depthwise(
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int],
    size: tuple[int, int],
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    align_corners: bool = True,
) -> Tensor:
    r"""y[r, n, c, i, j] = scale[r, c] * sum_{a, b} weight[r, c, a, b] * x[n, c, i + (a-1)*d_r, j + (b-1)*d_r] + shift[r, c].

    x = upsample_concat(inputs), zero outside the map; a and b from 0 to 2. weight [R, C, 3, 3], scale and shift [R, C].
    """
    x = upsample_concat(inputs, size, align_corners)
    height, width = size
    outputs = []
    for r, d in enumerate(dilations):
        padded = torch.nn.functional.pad(x, (d, d, d, d))
        y = torch.zeros_like(x)
        for a in range(3):
            for b in range(3):
                window = padded[:, :, a * d : a * d + height, b * d : b * d + width]
                y = y + weight[r, :, a, b, None, None] * window
        if scale is not None:
            y = y * scale[r, :, None, None]
        if shift is not None:
            y = y + shift[r, :, None, None]
        outputs.append(y)
    return torch.stack(outputs)
