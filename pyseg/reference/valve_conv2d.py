"""valve_conv2d and region_gate from their definitions."""

from torch import Tensor

from pyseg.reference.atrous_conv2d import atrous_conv2d

Pair = tuple[int, int]


def region_gate(
    features: Tensor,
    region: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    *,
    combine: str = "multiply",
    relu: bool = False,
) -> Tensor:
    """relu?(features * r) with r = conv2d(region, weight) + bias, or features + r; any floating dtype.

    features [N, K, H, W], region [N, R, H_r, W_r], weight [K, R, kH, kW], bias [K]. Differentiable by torch's autograd.
    """
    gate = atrous_conv2d(region, weight, bias, stride, padding, dilation)
    output = features * gate if combine == "multiply" else features + gate
    return output.relu() if relu else output


def valve_conv2d(
    input: Tensor,
    region: Tensor,
    weight: Tensor,
    valve_weight: Tensor,
    bias: Tensor | None = None,
    valve_bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    *,
    valve_stride: Pair = (1, 1),
    valve_padding: Pair = (0, 0),
    valve_dilation: Pair = (1, 1),
    combine: str = "multiply",
    relu: bool = False,
) -> Tensor:
    """region_gate of conv2d(input, weight) + bias; input [N, C, H_i, W_i], weight [K, C, kH, kW], bias [K]."""
    features = atrous_conv2d(input, weight, bias, stride, padding, dilation)
    geometry = (valve_stride, valve_padding, valve_dilation)
    return region_gate(features, region, valve_weight, valve_bias, *geometry, combine=combine, relu=relu)
