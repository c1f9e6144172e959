"""atrous_conv2d from its definition, one tap at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def atrous_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    r"""y[n, o, i, j] = epilogue(sum_{c, u, v} weight[o, c, u, v] * x[n, c, i*s_h + u*d_h - p_h, j*s_w + v*d_w - p_w]).

    x is zero outside the map, c runs over the channels of o's group, epilogue(z) = relu?(scale[o] * (z + bias[o]) +
    shift[o]). input [N, C_in, H, W], weight [C_out, C_in / groups, kH, kW]; any floating dtype, in which it computes.
    Differentiable by torch's autograd. O(N * C_out * C_in / groups * kH * kW * H_out * W_out).
    """
    c_out, _, k_h, k_w = weight.shape
    batch = input.shape[0]
    (p_h, p_w), (d_h, d_w), (s_h, s_w) = padding, dilation, stride
    padded = F.pad(input, (p_w, p_w, p_h, p_h))
    h_out = (padded.shape[2] - d_h * (k_h - 1) - 1) // s_h + 1
    w_out = (padded.shape[3] - d_w * (k_w - 1) - 1) // s_w + 1
    images = padded.reshape(batch, groups, input.shape[1] // groups, *padded.shape[2:])  # [N, G, C_in / G, H, W]
    filters = weight.reshape(groups, c_out // groups, *weight.shape[1:])  # [G, C_out / G, C_in / G, kH, kW]
    output = input.new_zeros(batch, c_out, h_out, w_out)
    for u in range(k_h):
        for v in range(k_w):
            rows = slice(u * d_h, u * d_h + (h_out - 1) * s_h + 1, s_h)
            columns = slice(v * d_w, v * d_w + (w_out - 1) * s_w + 1, s_w)
            tap = torch.einsum("ngchw,goc->ngohw", images[..., rows, columns], filters[..., u, v])
            output = output + tap.flatten(1, 2)
    if bias is not None:
        output = output + bias[:, None, None]
    if scale is not None:
        output = output * scale[:, None, None]
    if shift is not None:
        output = output + shift[:, None, None]
    return output.relu() if relu else output
