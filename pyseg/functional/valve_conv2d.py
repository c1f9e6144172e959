"""Valve filters: convolutions whose output is gated by a convolution of a region map."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyseg._ops.forward_mode import has_tangent
from pyseg._ops.valve_conv2d import check_valve
from pyseg.functional.atrous_conv2d import Pair, atrous_conv2d

Combine = Literal["multiply", "add"]

# Up to so many taps of the image's filters (C * kH * kW) valve_conv2d convolves in its own kernel: beyond, the products
# weigh more than the passes over K channels that are saved, and a convolution that is made for many channels is faster.
MOST_TAPS = {"cpu": 96, "cuda": 32}


def region_gate(
    features: Tensor,
    region: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    *,
    combine: Combine = "multiply",
    relu: bool = False,
) -> Tensor:
    r"""Features multiplied by (or added to) a convolution of a region map, in one pass.

        y[n, k, i, j] = relu?(features[n, k, i, j] * r[n, k, i, j])          combine="multiply"
        y[n, k, i, j] = relu?(features[n, k, i, j] + r[n, k, i, j])          combine="add"
        r[n, k, i, j] = bias[k] + sum_{c, u, v} weight[k, c, u, v] * m[n, c, i*s_h + u*d_h - p_h, j*s_w + v*d_w - p_w]

    m being the region, zero outside its map. r is the "relevance map" of valve filters (Eppel 2017, 1708.08711, and the
    program published with it: multiplied, biases on both sides, ReLU behind the product), which hand the result of one
    network to the next in 1710.05126. The sum is the variant of Eppel 2018 (1812.00291). r never exists in memory.

    Args:
        features: [N, K, H, W], such as the output of a convolution or of its batch norm. float32, float64, float16 or
            bfloat16, contiguous or channels_last; other strides are copied. The 16-bit types are computed in float32
            and rounded once.
        region: [N, R, H_r, W_r], R few channels: usually one, 1 inside the region and 0 outside. Any strides; bool and
            integers are taken as numbers.
        weight: [K, R, kH, kW]. bias: [K]. All of the features' dtype and device, except under autocast.
        stride, padding, dilation: of the region's convolution, one integer or (height, width). Its output must have
            the features' height and width: with a stride the region may be larger than the features.
        combine: "multiply" or "add".
        relu: clamp at zero, last. A NaN stays a NaN.

    Returns:
        [N, K, H, W], channels_last if the features are.

    Differentiable in features, region, weight and bias, any number of times (beyond the first by torch's own
    operators, which do store r) and in forward mode (by torch's); keeps features and region for that. The gradient of
    the region takes R * kH * kW more channels of its size for a moment. torch.vmap and batched gradients work.
    Deterministic: the same bits in every run and, on the CPU, for every number of threads.
    O(N * K * H * W * R * kH * kW) time.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit: names argument, expected and got.
    """
    geometry = [
        _pair("region_gate", *each) for each in (("stride", stride), ("padding", padding), ("dilation", dilation))
    ]
    additive, region = _is_additive("region_gate", combine), _as_numbers(region, features)
    if has_tangent(features, region, weight, bias):
        return _torch_gate(features, region, weight, bias, geometry, additive, relu)
    output: Tensor = torch.ops.pyseg.region_gate(features, region, weight, bias, *geometry, additive, relu)
    return output


def valve_conv2d(
    input: Tensor,
    region: Tensor,
    weight: Tensor,
    valve_weight: Tensor,
    bias: Tensor | None = None,
    valve_bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    *,
    valve_stride: Pair | None = None,
    valve_padding: Pair | None = None,
    valve_dilation: Pair | None = None,
    combine: Combine = "multiply",
    relu: bool = False,
) -> Tensor:
    r"""A convolution of an image, gated by a convolution of a region map: a layer with valve filters.

        y = relu?((conv2d(input, weight) + bias) * (conv2d(region, valve_weight) + valve_bias))

    or the sum of the two with combine="add" (Eppel 2017, 1708.08711; see region_gate, whose arguments the region's
    are). Every image filter has a valve filter that says where it counts: inside the region, outside, or at
    its border. In the papers it is the first layer of a network, with 3x3 valve filters.

    Args:
        input: [N, C, H_i, W_i], the image. weight: [K, C, kH, kW]. bias: [K].
        region: [N, R, H_r, W_r]. valve_weight: [K, R, kH_v, kW_v]. valve_bias: [K].
        stride, padding, dilation: of the image's convolution, one integer or (height, width).
        valve_stride, valve_dilation: of the region's; None: the image's.
        valve_padding: None: so that the windows' centres coincide, which is `padding` where the windows reach as far.

    Returns:
        [N, K, H, W], channels_last if `input` or `weight` is.

    What runs here: with up to 96 taps C * kH * kW on the CPU (a first layer: 27 for 3x3, 75 for 5x5) and 32 on CUDA
    one kernel does all, reading image and region and writing y; for training it keeps just these two, and convolves
    again in backward, which reads only the gradient of y. Otherwise atrous_conv2d makes the features, and region_gate
    gates them, without gradients in place. Dtypes, derivatives, determinism and errors as for region_gate; the
    gradients of the image and of the region are made of features that are convolved once more.
    O(N * K * H * W * (C * kH * kW + R * kH_v * kW_v)) time.
    """
    op = "valve_conv2d"
    for name, tensor in (("weight", weight), ("valve_weight", valve_weight)):
        if tensor.dim() != 4:
            raise RuntimeError(f"{op}: {name} must be [K, C, kH, kW], got {list(tensor.shape)}")
    image = [_pair(op, *each) for each in (("stride", stride), ("padding", padding), ("dilation", dilation))]
    valve = [
        image[0] if valve_stride is None else _pair(op, "valve_stride", valve_stride),
        [],
        image[2] if valve_dilation is None else _pair(op, "valve_dilation", valve_dilation),
    ]
    if valve_padding is None:
        valve[1] = _centred_padding(weight, valve_weight, image, valve)
    else:
        valve[1] = _pair(op, "valve_padding", valve_padding)
    additive, region = _is_additive(op, combine), _as_numbers(region, input)
    tangent = has_tangent(input, region, weight, bias, valve_weight, valve_bias)
    fitting = input.dim() == 4 and weight.shape[1] == input.shape[1]  # what is not is for the operator to name
    few = not fitting or math.prod(weight.shape[1:]) <= MOST_TAPS.get(input.device.type, 0)
    if few and not tangent:
        output: Tensor = torch.ops.pyseg.valve_conv2d(
            input, region, weight, bias, valve_weight, valve_bias, *image, *valve, additive, relu
        )
        return output
    autocast = torch.is_autocast_enabled(input.device.type)
    check_valve(op, input, region, weight, bias, valve_weight, valve_bias, [*image, *valve], autocast)
    if tangent:
        features = _torch_conv2d(input, weight, bias, image)
        return _torch_gate(features, region, valve_weight, valve_bias, valve, additive, relu)
    features = atrous_conv2d(input, weight, bias, (image[0][0], image[0][1]), tuple(image[1]), tuple(image[2]))
    parameters = [region, valve_weight, valve_bias]
    if _may_overwrite(features, *parameters):
        parameters = [None if each is None else each.to(features.dtype) for each in parameters]
        torch.ops.pyseg.region_gate_(features, *parameters, *valve, additive, relu)
        return features
    gated: Tensor = torch.ops.pyseg.region_gate(features, *parameters, *valve, additive, relu)
    return gated


def _pair(op: str, name: str, value: Pair) -> list[int]:
    if isinstance(value, int | torch.SymInt):
        return [value, value]
    if len(value) not in (1, 2):
        raise RuntimeError(f"{op}: {name} must be one or two integers, got {list(value)}")
    return [value[0], value[-1]]


def _is_additive(op: str, combine: str) -> bool:
    if combine not in ("multiply", "add"):
        raise RuntimeError(f"{op}: combine must be 'multiply' or 'add', got {combine!r}")
    return combine == "add"


def _as_numbers(region: Tensor, like: Tensor) -> Tensor:
    return region if region.is_floating_point() else region.to(like.dtype)


def _centred_padding(weight: Tensor, valve_weight: Tensor, image: list[list[int]], valve: list[list[int]]) -> list[int]:
    centred = []
    for axis in (0, 1):
        reach = (weight.shape[2 + axis] - 1) * image[2][axis]
        own = (valve_weight.shape[2 + axis] - 1) * valve[2][axis]
        double = 2 * image[1][axis] + own - reach
        if (double < 0 <= image[1][axis]) or double % 2:  # the operator refuses negative padding
            raise RuntimeError(
                f"valve_conv2d: valve_padding must be given where the windows' centres cannot coincide, got None for "
                f"weight {list(weight.shape)}, padding {image[1]} and valve_weight {list(valve_weight.shape)}"
            )
        centred.append(double // 2)
    return centred


def _may_overwrite(*tensors: Tensor | None) -> bool:
    """Whether nobody can see that features are overwritten: no gradients, no tracing, no transforms."""
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        return False
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None


def _torch_conv2d(map: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[list[int]]) -> Tensor:
    stride, padding, dilation = geometry
    return F.conv2d(map, weight, bias, stride, padding, dilation)


def _torch_gate(
    features: Tensor,
    region: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[list[int]],
    additive: bool,
    relu: bool,
) -> Tensor:
    """In torch's operators, which know derivatives in forward mode."""
    gate = _torch_conv2d(region, weight, bias, geometry)
    output = features + gate if additive else features * gate
    return output.relu() if relu else output
