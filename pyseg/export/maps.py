"""Decompositions of the operators on feature maps: convolutions, interpolation, Gaussian filter."""

import torch
from torch import Tensor

from pyseg._ops.fuse_query import pixel_coordinates
from pyseg._ops.segmentation_statistics import wide_dtype
from pyseg.export.table import decomposes


@decomposes("atrous_conv2d")
def atrous_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    exact: bool,
    allow_tf32: bool,
    packed: Tensor | None,
) -> Tensor:
    """One convolution: the scale goes into weight and bias, which a runtime computes once when it loads a file."""
    wide = wide_dtype(input)
    if scale is not None:
        weight = (weight.to(wide) * scale.to(wide)[:, None, None, None]).to(input.dtype)
        bias = None if bias is None else (bias.to(wide) * scale.to(wide)).to(input.dtype)
    if shift is not None:
        bias = shift if bias is None else bias + shift
    output = torch.ops.aten.convolution(input, weight, bias, [1, 1], padding, dilation, False, [0, 0], groups)
    return output.relu() if relu else output


@decomposes("_atrous_conv2d_pack")
def _atrous_conv2d_pack(weight: Tensor) -> Tensor:
    """Nothing reads it: the convolution above takes the weight itself."""
    c_out, c_in, *kernel = weight.shape
    return weight.new_zeros(((c_out + 15) // 16, kernel[0] * kernel[1], c_in, 16))


@decomposes("_to_channels_last")
def _to_channels_last(input: Tensor) -> Tensor:
    return input.clone()


@decomposes("bilinear_upsample")
def bilinear_upsample(
    input: Tensor, size: list[int], align_corners: bool, scale_factors: list[float] | None = None
) -> Tensor:
    """Interpolation of ATen; by scale factors where these, not the sizes, say where to look."""
    if scale_factors is not None and not align_corners:
        return torch.ops.aten.upsample_bilinear2d.vec(input, None, align_corners, scale_factors)
    return torch.ops.aten.upsample_bilinear2d.vec(input, size, align_corners, None)


@decomposes("upsample_concat")
def upsample_concat(inputs: list[Tensor], size: list[int], align_corners: bool) -> Tensor:
    """Interpolations and a concatenation."""
    return torch.cat([_resized(each, size, align_corners) for each in inputs], 1)


@decomposes("upsample_concat_depthwise")
def upsample_concat_depthwise(
    inputs: list[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    size: list[int],
    dilations: list[int],
    align_corners: bool,
) -> Tensor:
    """The concatenated maps, and a depthwise convolution for each rate."""
    features = upsample_concat(inputs, size, align_corners)
    wide = wide_dtype(features)
    filters = weight.to(wide) if scale is None else weight.to(wide) * scale.to(wide)[:, :, None, None]
    outputs = []
    for rate, dilation in enumerate(dilations):
        kernel = filters[rate].unsqueeze(1).to(features.dtype)
        bias = None if shift is None else shift[rate].to(features.dtype)
        around = [dilation, dilation]
        outputs.append(
            torch.ops.aten.convolution(features, kernel, bias, [1, 1], around, around, False, [0, 0], features.shape[1])
        )
    return torch.stack(outputs)


def _resized(input: Tensor, size: list[int], align_corners: bool) -> Tensor:
    if all(isinstance(side, int) for side in (*size, *input.shape[2:])) and list(input.shape[2:]) == list(size):
        return input
    return bilinear_upsample(input, size, align_corners)


@decomposes("gaussian_filter")
def gaussian_filter(values: Tensor, sigma: list[float], truncate: float, normalize: bool) -> Tensor:
    """A convolution along each axis; in float64, which onnxruntime has no convolution for, a product with a matrix."""
    maps = values.to(wide_dtype(values)).flatten(0, 1).unsqueeze(1)  # [N * C, 1, *S]
    for axis, s in enumerate(sigma):
        if s == 0:
            continue
        radius = int(truncate * s + 0.5)
        places = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
        taps = (places.square() / (-2 * s * s)).exp()
        whole = taps.sum() if normalize else torch.ones_like(places[0])
        if maps.dtype == torch.float64:
            place = torch.arange(maps.shape[2 + axis], dtype=maps.dtype, device=maps.device)
            apart = (place[:, None] - place).abs()
            matrix = torch.where(apart <= radius, (apart.square() / (-2 * s * s)).exp() / whole, 0)
            maps = (maps.movedim(2 + axis, -1) @ matrix).movedim(-1, 2 + axis)
        else:
            maps = _along(maps, taps / whole, axis, radius)
    return maps.reshape(values.shape).to(values.dtype)


def _along(maps: Tensor, taps: Tensor, axis: int, radius: int) -> Tensor:
    axes = maps.dim() - 2
    shape = [taps.shape[0] if i == axis else 1 for i in range(axes)]
    padding = [radius if i == axis else 0 for i in range(axes)]
    ones, zeros = [1] * axes, [0] * axes
    return torch.ops.aten.convolution(maps, taps.view(1, 1, *shape), None, ones, padding, ones, False, zeros, 1)


@decomposes("fuse_query")
def fuse_query(
    input: Tensor, weight: Tensor, offset: Tensor, coordinates: Tensor, normalize: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    """A matrix product, scaled in each pixel, and an affine function of its centre."""
    wide, height, width = wide_dtype(input), input.shape[2], input.shape[3]
    maps = input.to(wide)
    output = (weight.to(wide) @ maps.flatten(2)).unflatten(2, (height, width))  # type: ignore[no-untyped-call]
    scale = maps.new_zeros(0)
    if normalize:
        scale = maps.square().sum(1).sqrt().clamp_min(1e-12).reciprocal()
        output = output * scale.unsqueeze(1)
    pixels = pixel_coordinates(height, width, wide, input.device)
    ramp = (coordinates.to(wide) @ pixels.flatten(1)).unflatten(1, (height, width))  # type: ignore[no-untyped-call]
    output = output + (offset.to(wide)[:, :, None, None] + ramp)
    return (output.relu() if relu else output).to(input.dtype), scale


@decomposes("region_gate")
def region_gate(
    features: Tensor,
    region: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    additive: bool,
    relu: bool,
) -> Tensor:
    """The region's convolution, and a product or sum."""
    gate = _convolved(region, weight, bias, stride, padding, dilation)
    maps = features.to(gate.dtype)
    output = maps + gate if additive else maps * gate
    return (output.relu() if relu else output).to(features.dtype)


@decomposes("valve_conv2d")
def valve_conv2d(
    input: Tensor,
    region: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valve_weight: Tensor,
    valve_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    valve_stride: list[int],
    valve_padding: list[int],
    valve_dilation: list[int],
    additive: bool,
    relu: bool,
) -> Tensor:
    """Two convolutions, and a product or sum."""
    features = _convolved(input, weight, bias, stride, padding, dilation)
    valve = (valve_stride, valve_padding, valve_dilation)
    return region_gate(features, region, valve_weight, valve_bias, *valve, additive, relu).to(input.dtype)


def _convolved(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """In float32 or float64."""
    wide = wide_dtype(maps)
    shift = None if bias is None else bias.to(wide)
    return torch.ops.aten.convolution(
        maps.to(wide), weight.to(wide), shift, stride, padding, dilation, False, [0, 0], 1
    )
