"""Fake kernels, autograd, autocast and vmap of `pyseg::atrous_conv2d` and its companions.

    y = relu?(scale[c] * (conv2d(x, w)[c] + bias[c]) + shift[c])

With g = dL/dy, gated to y > 0 where ReLU is on, s = scale and R = wgrad(g, x) (the weight gradient of the bare
convolution, not yet scaled):

    dL/dx = dgrad(g, s * w)      dL/dw = s * R          dL/dbias = s * sum(g)
    dL/dshift = sum(g)           dL/dscale[c] = sum(g * (conv + bias))[c] = <R[c], w[c]> + bias[c] * sum(g)[c]

so neither the convolution's output nor the scaled gradient is ever stored or computed again. dgrad and wgrad are both
bilinear, and their own derivatives are again the convolution, dgrad and wgrad: derivatives of every order work.

Memory formats, which the C++ kernels follow too: the output and the input's gradient are channels_last where `input`
or `weight` is (by strides that can mean nothing else), otherwise contiguous; the weight's gradient and the packed
weight are contiguous.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.memory_format import is_channels_last

_LIBRARY = torch.library.Library("pyseg", "FRAGMENT")  # type: ignore[no-untyped-call]
_FORWARD = torch.ops.pyseg.atrous_conv2d.default
_OUT = torch.ops.pyseg.atrous_conv2d_out.default
_BACKWARD = torch.ops.pyseg._atrous_conv2d_backward.default
_PACK = torch.ops.pyseg._atrous_conv2d_pack.default
_TO_CHANNELS_LAST = torch.ops.pyseg._to_channels_last.default
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Devices whose kernels are in this installation: a CPU-only build leaves CUDA tensors to torch.
DEVICES = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("pyseg::atrous_conv2d", key)
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cudnn_allows_tf32() -> bool:
    """Whether torch lets float32 convolutions use tf32: what its own cuDNN convolutions do.

    `torch.backends.cudnn.conv.fp32_precision` inherits from `torch.backends.fp32_precision` and follows the old
    `torch.backends.cudnn.allow_tf32`, whichever the user has set; the old switch, in contrast, raises when it is read
    after a new one was set. torch.compile and torch.export keep the value of the moment they trace.
    """
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


# ---- shapes ----


def _check(condition: Any, message: str) -> None:
    torch._check(condition, lambda: f"atrous_conv2d: {message}")


def _check_arguments(input: Tensor, weight: Tensor, padding: list[int], dilation: list[int], groups: int) -> None:
    shape = list(weight.shape)
    _check(input.dim() == 4, f"input must be [N, C_in, H, W], got {list(input.shape)}")
    _check(input.dtype in _FLOATS, f"input must be float32, float64, float16 or bfloat16, got {input.dtype}")
    _check_weight(weight)
    _check_like("weight", weight, input)
    _check(len(padding) == 2 and min(padding) >= 0, f"padding must be two integers >= 0, got {list(padding)}")
    _check(len(dilation) == 2 and min(dilation) >= 1, f"dilation must be two integers >= 1, got {list(dilation)}")
    channels, kernel = input.shape[1], shape[2]
    if groups == 1:
        expected = f"[C_out, {channels}, {kernel}, {kernel}]"
        _check(shape[1] == channels, f"weight must be {expected} for {channels} channels, got {shape}")
    else:
        _check(kernel == 3, f"weight must be [{channels}, 1, 3, 3] for {groups} groups, got {shape}")
        _check(groups == channels, f"groups must be 1 or C_in = {channels}, got {groups}")
        _check(shape[0] == channels, f"weight must be [{channels}, 1, 3, 3] for {groups} groups, got {shape}")
        _check(shape[1] == 1, f"weight must be [{channels}, 1, 3, 3] for {groups} groups, got {shape}")


def _check_weight(weight: Tensor) -> None:
    shape = list(weight.shape)
    expected = "[C_out, C_in / groups, 3, 3]" + ("" if weight.is_cuda else " or [C_out, C_in, 1, 1]")
    _check(weight.dim() == 4, f"weight must be {expected}, got {shape}")
    _check(shape[2] == 3 or (shape[2] == 1 and not weight.is_cuda), f"weight must be {expected}, got {shape}")
    _check(shape[3] == shape[2], f"weight must be {expected}, got {shape}")


def _check_like(name: str, tensor: Tensor, input: Tensor) -> None:
    _check(tensor.dtype == input.dtype, f"{name} must be {input.dtype} like input, got {tensor.dtype}")
    _check(tensor.device == input.device, f"{name} must be on {input.device} like input, got {tensor.device}")


def _output_shape(input: Tensor, weight: Tensor, padding: list[int], dilation: list[int]) -> list[int]:
    reach = [(weight.shape[2] - 1) * d for d in dilation]  # from the first tap to the last
    height = input.shape[2] + 2 * padding[0] - reach[0]
    width = input.shape[3] + 2 * padding[1] - reach[1]
    message = f"input must be at least {[r + 1 - 2 * p for r, p in zip(reach, padding, strict=True)]} in H and W"
    _check(height >= 0, f"{message}, got {list(input.shape[2:])}")
    _check(width >= 0, f"{message}, got {list(input.shape[2:])}")
    return [input.shape[0], weight.shape[0], height, width]


def _packed_shape(weight: Tensor) -> list[int]:
    c_out, c_in, *kernel = weight.shape
    return [3, 3, c_out, c_in] if weight.is_cuda else [(c_out + 15) // 16, kernel[0] * kernel[1], c_in, 16]


def _memory_format(*tensors: Tensor) -> torch.memory_format:
    if any(is_channels_last(tensor) for tensor in tensors):
        return torch.channels_last
    return torch.contiguous_format


def _empty(shape: list[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _forward_shape(
    input: Tensor,
    weight: Tensor,
    per_channel: dict[str, Tensor | None],
    padding: list[int],
    dilation: list[int],
    groups: int,
    packed: Tensor | None,
) -> list[int]:
    _check_arguments(input, weight, padding, dilation, groups)
    for name, tensor in per_channel.items():
        if tensor is not None:
            _check_like(name, tensor, input)
            _check(tensor.dim() == 1, f"{name} must be [{weight.shape[0]}], got {list(tensor.shape)}")
            _check(tensor.shape[0] == weight.shape[0], f"{name} must be [{weight.shape[0]}], got {list(tensor.shape)}")
    if packed is not None:
        expected, got = _packed_shape(weight), list(packed.shape)
        _check(groups == 1, f"packed must be None for groups = {groups}, got {got}")
        _check_like("packed", packed, input)
        _check(packed.dim() == 4, f"packed must be {expected}, got {got}")
        for dimension in range(4):
            _check(got[dimension] == expected[dimension], f"packed must be {expected}, got {got}")
    return _output_shape(input, weight, padding, dilation)


def _fake_forward(
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
    per_channel = {"bias": bias, "scale": scale, "shift": shift}
    shape = _forward_shape(input, weight, per_channel, padding, dilation, groups, packed)
    return _empty(shape, input, _memory_format(input, weight))


def _fake_out(
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
    out: Tensor,
) -> None:
    per_channel = {"bias": bias, "scale": scale, "shift": shift}
    shape = _forward_shape(input, weight, per_channel, padding, dilation, groups, packed)
    _check_like("out", out, input)
    _check(out.dim() == 4, f"out must be {shape}, got {list(out.shape)}")
    for dimension in range(4):
        _check(out.shape[dimension] == shape[dimension], f"out must be {shape}, got {list(out.shape)}")


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding: list[int],
    dilation: list[int],
    groups: int,
    exact: bool,
    allow_tf32: bool,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    _check_arguments(input, weight, padding, dilation, groups)
    shape = _output_shape(input, weight, padding, dilation)
    _check_like("grad_output", grad_output, input)
    _check(grad_output.dim() == 4, f"grad_output must be {shape}, got {list(grad_output.shape)}")
    for dimension in range(4):
        _check(
            grad_output.shape[dimension] == shape[dimension],
            f"grad_output must be {shape}, got {list(grad_output.shape)}",
        )
    return (
        _empty(list(input.shape), input, _memory_format(input, weight)) if need_input else input.new_empty(0),
        weight.new_empty(weight.shape if need_weight else 0),
    )


def _fake_pack(weight: Tensor) -> Tensor:
    _check_weight(weight)
    return weight.new_empty(_packed_shape(weight))


torch.library.register_fake(_FORWARD, _fake_forward)
torch.library.register_fake(_OUT, _fake_out)
torch.library.register_fake(_BACKWARD, _fake_backward)
torch.library.register_fake(_PACK, _fake_pack)
torch.library.register_fake(_TO_CHANNELS_LAST, lambda input: _empty(list(input.shape), input, torch.channels_last))


def as_channels_last(input: Tensor) -> Tensor:
    """A map [N, C, H, W] itself where it is channels_last, else a copy, without gradients on the CPU."""
    if input.is_contiguous(memory_format=torch.channels_last):
        return input
    if not input.is_cpu or input.dtype not in (torch.float32, torch.float64):
        return input.contiguous(memory_format=torch.channels_last)
    copied: Tensor = _TO_CHANNELS_LAST(input)
    return copied


# ---- autograd ----


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, scale, _, padding, dilation, groups, relu, exact, allow_tf32, _ = inputs
    ctx.save_for_backward(input, weight, bias, scale, output if relu else None)
    ctx.geometry = (padding, dilation, groups, exact, allow_tf32)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight, bias, scale, output = ctx.saved_tensors
    need_input, need_weight, need_bias, need_scale, need_shift = ctx.needs_input_grad[:5]
    if output is not None:  # one pass, and like torch's ReLU it lets a NaN through
        grad = torch.ops.aten.threshold_backward(grad, output, 0)

    grad_input: Any = None
    grad_weight = grad_bias = grad_scale = grad_shift = grad_input
    if need_bias or need_scale or need_shift:
        grad_shift = grad.sum((0, 2, 3))
        grad_bias = grad_shift if scale is None else grad_shift * scale
    if need_input or need_weight or need_scale:
        needed = (need_input, need_weight or need_scale)
        if scale is None:
            grad_input, grad_weight = _BACKWARD(grad, input, weight, *ctx.geometry, *needed)
        else:
            # In 16 bits neither scale * w nor R, which the scale has not made small yet, need be in range.
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            scale, weight = scale.to(wide), weight.to(wide)
            scaled = weight * scale[:, None, None, None]
            grad_input, raw = _BACKWARD(grad.to(wide), input.to(wide), scaled, *ctx.geometry, *needed)
            grad_input = grad_input.to(input.dtype)
            if need_weight:
                grad_weight = (raw * scale[:, None, None, None]).to(input.dtype)
            if need_scale:
                grad_scale = (raw * weight).sum((1, 2, 3))
                if bias is not None:
                    grad_scale = grad_scale + bias.to(wide) * grad_shift.to(wide)
                grad_scale = grad_scale.to(input.dtype)
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        grad_scale,
        grad_shift if need_shift else None,
        *[None] * 7,
    )


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_output, input, weight, padding, dilation, groups, exact, allow_tf32, *ctx.needed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_output, input, weight)
    ctx.geometry = (padding, dilation, groups, exact, allow_tf32)


def _double_backward(
    ctx: Any, grad_grad_input: Tensor | None, grad_grad_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dgrad(g, w) is linear in g and w, wgrad(g, x) in g and x; `u`, `v` are the gradients of their results."""
    grad_output, input, weight = ctx.saved_tensors
    padding, dilation, groups, exact, allow_tf32 = ctx.geometry
    need_grad_output, need_input, need_weight = ctx.needs_input_grad[:3]
    # What was not computed has a gradient without elements, or none.
    u, v = (t if needed else None for t, needed in zip((grad_grad_input, grad_grad_weight), ctx.needed, strict=True))

    def conv(x: Tensor, w: Tensor) -> Any:
        return _FORWARD(x, w, None, None, None, padding, dilation, groups, False, exact, allow_tf32, None)

    of_grad_output = of_input = of_weight = None
    if need_grad_output:
        terms = [conv(*pair) for pair in ((u, weight), (input, v)) if pair[0] is not None and pair[1] is not None]
        of_grad_output = sum(terms[1:], terms[0]) if terms else None
    if need_input and v is not None:
        of_input = _BACKWARD(grad_output, input, v, *ctx.geometry, True, False)[0]
    if need_weight and u is not None:
        of_weight = _BACKWARD(grad_output, u, weight, *ctx.geometry, False, True)[1]
    return of_grad_output, of_input, of_weight, *[None] * 7


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_forward)
torch.library.register_autograd(_BACKWARD, _double_backward, setup_context=_setup_backward)


def refuse_gradient(*tensors: Tensor | None) -> None:
    """Raises where a result written into `out` would have to carry a gradient, as torch's own operators do."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "atrous_conv2d: out does not support automatic differentiation, got a tensor that requires grad"
        )


def _out_autograd(keyset: Any, *args: Any) -> None:
    refuse_gradient(*[argument for argument in args if isinstance(argument, Tensor)])
    with torch._C._AutoDispatchBelowAutograd():
        _OUT.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    # What autograd has saved of `out` before this write is no longer what it was.
    torch.autograd.graph.increment_version(args[-1])


def _pack_autograd(keyset: Any, weight: Tensor) -> Any:
    """The packed weight is a cache of `weight`, which is an argument of the operator too and carries the gradient."""
    with torch._C._AutoDispatchBelowAutograd():
        return _PACK.redispatch(keyset & torch._C._after_autograd_keyset, weight)


_LIBRARY.impl("atrous_conv2d_out", _out_autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
_LIBRARY.impl("_atrous_conv2d_pack", _pack_autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


# ---- autocast ----


def _register_autocast(op: torch._ops.OpOverload, device: str, key: str) -> None:
    """All tensors in autocast's dtype, as for torch's conv2d. (torch.library.register_autocast wants a fixed dtype.)"""
    autocast = getattr(torch._C.DispatchKey, key)
    names = [argument.name for argument in op._schema.arguments]
    packed_index = names.index("packed")
    kept = {i for i, name in enumerate(names) if name in ("packed", "out")}  # a cast `out` would take the result away

    def cast(argument: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.device.type != device:
            return argument
        eligible = argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(torch.get_autocast_dtype(device)) if eligible else argument

    def cast_and_call(_: Any, *args: Any) -> Any:
        arguments = [argument if i in kept else cast(argument) for i, argument in enumerate(args)]
        packed, weight = arguments[packed_index], arguments[1]
        if packed is not None and packed.dtype != weight.dtype:
            arguments[packed_index] = None  # made from the weight before the cast: the operator packs anew
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(autocast)):
            return op(*arguments)

    _LIBRARY.impl(op._opname, cast_and_call, key, with_keyset=True)  # type: ignore[no-untyped-call]


for _op in (_FORWARD, _OUT):
    _register_autocast(_op, "cpu", "AutocastCPU")
    _register_autocast(_op, "cuda", "AutocastCUDA")


# ---- vmap ----


def _each_sample(op: torch._ops.OpOverload, batch_size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    def sample(argument: Any, dim: Any, index: int) -> Any:
        return argument.select(dim, index) if isinstance(dim, int) else argument

    for index in range(batch_size):
        yield op(*[sample(argument, dim, index) for argument, dim in zip(args, in_dims, strict=True)])


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    if in_dims[0] is None or any(isinstance(dim, int) for dim in in_dims[1:]):
        return torch.stack(list(_each_sample(_FORWARD, info.batch_size, in_dims, args))), 0
    # Only the images differ: those of all samples are one batch.
    images = args[0].movedim(in_dims[0], 0)
    return _FORWARD(images.flatten(0, 1), *args[1:]).unflatten(0, images.shape[:2]), 0


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = _each_sample(_BACKWARD, info.batch_size, in_dims, args)
    return tuple(torch.stack(gradients) for gradients in zip(*results, strict=True)), (0, 0)


torch.library.register_vmap(_FORWARD, _vmap_forward)
torch.library.register_vmap(_BACKWARD, _vmap_backward)
