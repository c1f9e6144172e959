"""Fake kernels, autograd, autocast and vmap of `pyseg::valve_conv2d`, `pyseg::region_gate` and their gradients.

    y = relu?(f * r) or relu?(f + r),  r = conv2d(region, V) + b,  f the features; for valve_conv2d conv2d(x, W) + c

With g = dL/dy, where ReLU is on gated to y > 0:

    multiplied: dL/df = g * r, dL/dr = g * f      added: dL/df = dL/dr = g

and from there on those of two convolutions. region_gate keeps the features, valve_conv2d only its arguments: backward
convolves again, which costs less than storing and reading two maps of K channels. Where the gradient of the image or
the region of valve_conv2d is wanted, its features are made once more by torch and the rest is region_gate's.
Derivatives of higher order are those of the same formulas in torch's own operators.

Memory formats: results are channels_last where the features are (valve_conv2d: where the image or its weight is, by
strides that can mean nothing else), otherwise contiguous.

Autocast: all tensors take autocast's dtype, as those of torch's convolutions do.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg._ops.batched import register_vmap
from pyseg._ops.memory_format import is_channels_last
from pyseg._ops.segmentation_statistics import check, check_shape

_LIBRARY = torch.library.Library("pyseg", "FRAGMENT")  # type: ignore[no-untyped-call]
_GATE = torch.ops.pyseg.region_gate.default
_GATE_IN_PLACE = torch.ops.pyseg.region_gate_.default
_GATE_BACKWARD = torch.ops.pyseg._region_gate_backward.default
_VALVE = torch.ops.pyseg.valve_conv2d.default
_VALVE_BACKWARD = torch.ops.pyseg._valve_conv2d_backward.default
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Pair = list[int]
Gradient = Tensor | None

# ---- shapes ----


def _check_like(op: str, name: str, tensor: Tensor, first: Tensor, any_dtype: bool = False) -> None:
    message = f"{name} must be {first.dtype} like the first argument, got {tensor.dtype}"
    check(op, any_dtype or tensor.dtype == first.dtype, message)
    message = f"{name} must be on {first.device} like the first argument, got {tensor.device}"
    check(op, tensor.device == first.device, message)


def _output_shape(
    op: str,
    names: tuple[str, str, str],
    prefix: str,
    map: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Pair, Pair, Pair],
    first: Tensor,
    any_dtype: bool = False,
) -> list[Any]:
    """[N, K, H, W] of the convolution of `map`; checks its arguments."""
    map_name, weight_name, bias_name = names
    check(op, map.dim() == 4, f"{map_name} must be [N, C, H, W], got {list(map.shape)}")
    channels = map.shape[1]
    message = f"{weight_name} must be [K, {channels}, kH, kW] for {map_name} of {channels} channels, got "
    check(op, weight.dim() == 4, f"{message}{list(weight.shape)}")
    check(op, weight.shape[1] == channels, f"{message}{list(weight.shape)}")
    for name, tensor in ((map_name, map), (weight_name, weight)):
        _check_like(op, name, tensor, first, any_dtype)
    if bias is not None:
        _check_like(op, bias_name, bias, first, any_dtype)
        check_shape(op, bias_name, bias, [weight.shape[0]])
    for name, pair, least in zip(("stride", "padding", "dilation"), geometry, (1, 0, 1), strict=True):
        message = f"{prefix}{name} must be two integers from {least} to 2^29 - 1, got {list(pair)}"
        check(op, len(pair) == 2 and min(pair) >= least, message)
    stride, padding, dilation = geometry
    sides = []
    for axis in (0, 1):
        reach = (weight.shape[2 + axis] - 1) * dilation[axis] + 1
        extent = map.shape[2 + axis] + 2 * padding[axis]
        message = f"{map_name} with padding {list(padding)} must reach over {reach} rows or columns of taps"
        check(op, extent >= reach, f"{message}, got {list(map.shape)}")
        sides.append((extent - reach) // stride[axis] + 1)
    return [map.shape[0], weight.shape[0], *sides]


def _check_gate(
    op: str,
    features: Tensor,
    region: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Pair, Pair, Pair],
) -> list[Any]:
    check(
        op, features.dtype in _FLOATS, f"features must be float32, float64, float16 or bfloat16, got {features.dtype}"
    )
    check(op, features.dim() == 4, f"features must be [N, K, H, W], got {list(features.shape)}")
    shape = _output_shape(op, ("region", "weight", "bias"), "", region, weight, bias, geometry, features)
    message = f"features must be {shape} like the output of the region's convolution, got {list(features.shape)}"
    for got, expected in zip(features.shape, shape, strict=True):
        check(op, got == expected, message)
    return shape


def check_valve(
    op: str,
    input: Tensor,
    region: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valve_weight: Tensor,
    valve_bias: Tensor | None,
    geometry: list[Pair],
    any_dtype: bool = False,
) -> list[Any]:
    """[N, K, H, W]; `any_dtype`: where autocast is going to convert the tensors."""
    check(op, input.dtype in _FLOATS, f"input must be float32, float64, float16 or bfloat16, got {input.dtype}")
    image = (geometry[0], geometry[1], geometry[2])
    valve = (geometry[3], geometry[4], geometry[5])
    names = ("region", "valve_weight", "valve_bias")
    shape = _output_shape(op, ("input", "weight", "bias"), "", input, weight, bias, image, input, any_dtype)
    gate = _output_shape(op, names, "valve_", region, valve_weight, valve_bias, valve, input, any_dtype)
    for got, expected in zip(gate, shape, strict=True):
        check(op, got == expected, f"region and valve_weight must give {shape} like input and weight, got {gate}")
    return shape


def _new_map(like: Tensor, shape: list[Any], last: bool) -> Tensor:
    format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def _fake_gate(features: Tensor, region: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    stride, padding, dilation, *_ = arguments
    shape = _check_gate("region_gate", features, region, weight, bias, (stride, padding, dilation))
    return _new_map(features, shape, is_channels_last(features))


def _fake_gate_in_place(features: Tensor, region: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> None:
    stride, padding, dilation, *_ = arguments
    _check_gate("region_gate_", features, region, weight, bias, (stride, padding, dilation))


def _fake_gate_backward(
    grad: Tensor, features: Tensor, region: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "_region_gate_backward"
    stride, padding, dilation, _, _, need_features, need_region, need_weight = arguments
    shape = _check_gate(op, features, region, weight, bias, (stride, padding, dilation))
    _check_like(op, "grad", grad, features)
    check_shape(op, "grad", grad, shape)
    return (
        _new_map(features, shape, is_channels_last(features)) if need_features else features.new_empty(0),
        region.new_empty(region.shape if need_region else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_weight else 0),
    )


def _fake_valve(input: Tensor, region: Tensor, *arguments: Any) -> Tensor:
    weight, bias, valve_weight, valve_bias, *geometry, _, _ = arguments
    shape = check_valve("valve_conv2d", input, region, weight, bias, valve_weight, valve_bias, geometry)
    return _new_map(input, shape, is_channels_last(input) or is_channels_last(weight))


def _fake_valve_backward(
    grad: Tensor, input: Tensor, region: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "_valve_conv2d_backward"
    weight, bias, valve_weight, valve_bias, *geometry, _, _ = arguments
    shape = check_valve(op, input, region, weight, bias, valve_weight, valve_bias, geometry)
    _check_like(op, "grad", grad, input)
    check_shape(op, "grad", grad, shape)
    channels = weight.shape[0]
    return (
        weight.new_empty(weight.shape),
        weight.new_empty(channels),
        weight.new_empty(valve_weight.shape),
        weight.new_empty(channels),
    )


torch.library.register_fake(_GATE, _fake_gate)
torch.library.register_fake(_GATE_IN_PLACE, _fake_gate_in_place)
torch.library.register_fake(_GATE_BACKWARD, _fake_gate_backward)
torch.library.register_fake(_VALVE, _fake_valve)
torch.library.register_fake(_VALVE_BACKWARD, _fake_valve_backward)

# ---- autograd ----


def _convolution(map: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[Pair]) -> Tensor:
    return torch.ops.aten.convolution(map, weight, bias, *geometry, False, [0, 0], 1)


def _convolution_backward(
    grad: Tensor, map: Tensor, weight: Tensor, geometry: list[Pair], needed: list[bool]
) -> tuple[Gradient, Gradient, Gradient]:
    if not any(needed):
        return None, None, None
    arguments = ([weight.shape[0]], *geometry, False, [0, 0], 1, needed)
    of_map, of_weight, of_bias = torch.ops.aten.convolution_backward(grad, map, weight, *arguments)
    return of_map, of_weight, of_bias


def _gate_backward(
    grad: Tensor,
    features: Tensor,
    region: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[Pair],
    additive: bool,
    relu: bool,
    needed: list[bool],
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    """`needed`: of features, region, weight, bias; the others are None."""
    need_features, need_region, need_weight, need_bias = needed
    if not torch.is_grad_enabled():
        wanted = (need_features, need_region, need_weight or need_bias)
        results = _GATE_BACKWARD(grad, features, region, weight, bias, *geometry, additive, relu, *wanted)
        of_features, of_region, of_weight, of_bias = (r if n else None for r, n in zip(results, needed, strict=True))
        return of_features, of_region, of_weight, of_bias
    gate = _convolution(region, weight, bias, geometry)
    if relu:
        output = features + gate if additive else features * gate
        grad = grad.masked_fill(output <= 0, 0)
    of_gate = grad if additive else grad * features
    of_features = (grad if additive else grad * gate) if need_features else None
    return of_features, *_convolution_backward(of_gate, region, weight, geometry, needed[1:])


def _setup_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, stride, padding, dilation, ctx.additive, ctx.relu = inputs
    ctx.save_for_backward(*tensors)
    ctx.geometry = [stride, padding, dilation]


def _backward_of_gate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    features, region, weight, bias = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:4])
    grads = _gate_backward(grad, features, region, weight, bias, ctx.geometry, ctx.additive, ctx.relu, needed)
    return *grads, *[None] * 5


def _setup_valve(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, geometry = inputs[:6], inputs[6:12]
    ctx.additive, ctx.relu = inputs[12:]
    ctx.save_for_backward(*tensors)
    ctx.geometry = list(geometry)


def _backward_of_valve(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, region, weight, bias, valve_weight, valve_bias = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:6])
    need_input, need_region, need_weight, need_bias, need_valve, need_valve_bias = needed
    rest = [None] * 8
    if not (torch.is_grad_enabled() or need_input or need_region):
        results = _VALVE_BACKWARD(
            grad, input, region, weight, bias, valve_weight, valve_bias, *ctx.geometry, ctx.additive, ctx.relu
        )
        return (None, None, *[r if n else None for r, n in zip(results, needed[2:], strict=True)], *rest)
    image, valve = ctx.geometry[:3], ctx.geometry[3:]
    features = _convolution(input, weight, bias, image)
    of_features, of_region, of_valve, of_valve_bias = _gate_backward(
        grad,
        features,
        region,
        valve_weight,
        valve_bias,
        valve,
        ctx.additive,
        ctx.relu,
        [need_input or need_weight or need_bias, need_region, need_valve, need_valve_bias],
    )
    of_input = of_weight = of_bias = None
    if of_features is not None:
        wanted = [need_input, need_weight, need_bias]
        of_input, of_weight, of_bias = _convolution_backward(of_features, input, weight, image, wanted)
    return of_input, of_region, of_weight, of_bias, of_valve, of_valve_bias, *rest


torch.library.register_autograd(_GATE, _backward_of_gate, setup_context=_setup_gate)
torch.library.register_autograd(_VALVE, _backward_of_valve, setup_context=_setup_valve)


def _in_place_autograd(keyset: Any, features: Tensor, *arguments: Any) -> None:
    tensors = [features, *[each for each in arguments if isinstance(each, Tensor)]]
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        raise RuntimeError("region_gate_: must be called without gradients, got a tensor that requires grad")
    with torch._C._AutoDispatchBelowAutograd():
        _GATE_IN_PLACE.redispatch(keyset & torch._C._after_autograd_keyset, features, *arguments)
    torch.autograd.graph.increment_version(features)


_LIBRARY.impl("region_gate_", _in_place_autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]

# ---- autocast ----


def _register_autocast(op: torch._ops.OpOverload, device: str, key: str) -> None:
    autocast = getattr(torch._C.DispatchKey, key)

    def cast(argument: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.device.type != device:
            return argument
        eligible = argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(torch.get_autocast_dtype(device)) if eligible else argument

    def call(_: Any, *arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(autocast)):
            return op(*[cast(each) for each in arguments])

    _LIBRARY.impl(op._opname, call, key, with_keyset=True)  # type: ignore[no-untyped-call]


for _op in (_GATE, _VALVE):
    _register_autocast(_op, "cpu", "AutocastCPU")
    _register_autocast(_op, "cuda", "AutocastCUDA")

# ---- vmap ----


def _each_sample(op: torch._ops.OpOverload, size: int, dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    def sample(argument: Any, dim: Any, index: int) -> Any:
        return argument.select(dim, index) if isinstance(dim, int) else argument

    return [op(*[sample(a, d, index) for a, d in zip(arguments, dims, strict=True)]) for index in range(size)]


def _register_forward_vmap(op: torch._ops.OpOverload) -> None:
    def rule(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        if any(isinstance(dim, int) for dim in dims[2:]) or not all(isinstance(dim, int) for dim in dims[:2]):
            return torch.stack(_each_sample(op, size, dims, arguments)), 0
        # Only the two maps differ: those of all samples are one batch.
        maps = [each.movedim(dim, 0) for each, dim in zip(arguments[:2], dims[:2], strict=True)]
        output = op(*[each.flatten(0, 1) for each in maps], *arguments[2:])
        return output.unflatten(0, maps[0].shape[:2]), 0

    register_vmap(op, rule)


def _register_backward_vmap(op: torch._ops.OpOverload) -> None:
    def rule(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = _each_sample(op, info.batch_size, dims, arguments)
        return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0, 0, 0, 0)

    register_vmap(op, rule)


_register_forward_vmap(_GATE)
_register_forward_vmap(_VALVE)
_register_backward_vmap(_GATE_BACKWARD)
_register_backward_vmap(_VALVE_BACKWARD)
