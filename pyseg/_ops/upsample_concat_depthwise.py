"""Fake kernels, autograd, autocast and vmap of `pyseg::upsample_concat_depthwise` and its gradient.

    y[r] = scale[r] * conv_r(u, weight[r]) + shift[r]

u being the inputs, interpolated and concatenated, and conv_r the depthwise convolution of dilation r. With g = dL/dy
and S[r] = wgrad_r(g[r], u), the weight gradient of the bare convolution:

    dL/du = sum over r of dgrad_r(g[r], scale[r] * weight[r])          dL/dinput: its interpolation, transposed
    dL/dweight = scale * S      dL/dscale = <S, weight>      dL/dshift = sum of g

so only the inputs are kept. The private operator returns the inputs' gradients, S and the sums of g. It is bilinear in
(g, weight) and in (g, inputs), and its own derivatives are again it and the operator: derivatives of every order work.
16-bit gradients are read as they are; sums and parameters are in float32.

Autocast: inputs take autocast's dtype, as those of torch's convolutions do; weight, scale and shift stay in float32.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg._ops.batched import register_vmap
from pyseg._ops.segmentation_statistics import check, check_shape
from pyseg._ops.upsample import batched_maps, check_inputs, check_size, is_last, new_map

MOST_RATES = 16

_LIBRARY = torch.library.Library("pyseg", "FRAGMENT")  # type: ignore[no-untyped-call]
_FORWARD = torch.ops.pyseg.upsample_concat_depthwise.default
_BACKWARD = torch.ops.pyseg._upsample_concat_depthwise_backward.default


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- shapes ----


def _check_dilations(op: str, dilations: list[int]) -> None:
    valid = 1 <= len(dilations) <= MOST_RATES and min(dilations) > 0
    check(op, valid, f"dilations must be 1 to {MOST_RATES} positive integers, got {list(dilations)}")


def _check_parameter(op: str, name: str, tensor: Tensor, shape: list[Any], input: Tensor) -> None:
    check_shape(op, name, tensor, shape)
    message = f"{name} must be {input.dtype} like the inputs or what they are computed in, got {tensor.dtype}"
    check(op, tensor.dtype in (input.dtype, _computed_in(input.dtype)), message)
    check(op, tensor.device == input.device, f"{name} must be on {input.device} like the inputs, got {tensor.device}")


def _fake_forward(
    inputs: list[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    size: list[int],
    dilations: list[int],
    align_corners: bool,
) -> Tensor:
    op = "upsample_concat_depthwise"
    check_inputs(op, "inputs", inputs)
    check_size(op, size)
    _check_dilations(op, dilations)
    first, rates, channels = inputs[0], len(dilations), sum(each.shape[1] for each in inputs)
    _check_parameter(op, "weight", weight, [rates, channels, 3, 3], first)
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None:
            _check_parameter(op, name, tensor, [rates, channels], first)
    images = first.shape[0]
    output = new_map(first, [rates * images, channels, *size], is_last(*inputs))
    return output.view(rates, images, channels, *size)


def _fake_backward(
    grad: Tensor,
    inputs: list[Tensor],
    weight: Tensor,
    dilations: list[int],
    align_corners: bool,
    need_inputs: bool,
    need_weight: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    op = "_upsample_concat_depthwise_backward"
    check_inputs(op, "inputs", inputs)
    _check_dilations(op, dilations)
    first, rates, channels = inputs[0], len(dilations), sum(each.shape[1] for each in inputs)
    check(op, grad.dim() == 5, f"grad must be [R, N, C, H, W], got {list(grad.shape)}")
    check_shape(op, "grad", grad, [rates, first.shape[0], channels, *grad.shape[3:]])
    check(op, grad.dtype == first.dtype, f"grad must be {first.dtype} like the inputs, got {grad.dtype}")
    _check_parameter(op, "weight", weight, [rates, channels, 3, 3], first)
    last, dtype = is_last(*inputs), _computed_in(first.dtype)
    grads = [new_map(each, list(each.shape), last) if need_inputs else each.new_empty(0) for each in inputs]
    of_weight = weight.new_empty([rates, channels, 3, 3] if need_weight else [0], dtype=dtype)
    return grads, of_weight, weight.new_empty([rates, channels] if need_weight else [0], dtype=dtype)


torch.library.register_fake(_FORWARD, _fake_forward)
torch.library.register_fake(_BACKWARD, _fake_backward)


# ---- autograd ----


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, weight, scale, shift, _, ctx.dilations, ctx.align_corners = inputs
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(weight, scale, *maps)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, scale, *maps = ctx.saved_tensors
    need_maps, need_weight, need_scale, need_shift = ctx.needs_input_grad[:4]
    wide = _computed_in(grad.dtype)
    filters = weight.to(wide)
    scaled = filters if scale is None else filters * scale.to(wide)[:, :, None, None]
    grads, of_weight, sums = _BACKWARD(
        grad, maps, scaled, ctx.dilations, ctx.align_corners, any(need_maps), need_weight or need_scale or need_shift
    )
    grad_weight: Any = None
    grad_scale = grad_weight
    if need_scale:
        grad_scale = (of_weight * filters).sum((2, 3)).to(scale.dtype)
    if need_weight:
        raw = of_weight if scale is None else of_weight * scale.to(wide)[:, :, None, None]
        grad_weight = raw.to(weight.dtype)
    grad_shift = sums.to(ctx.shift_dtype) if need_shift else None
    of_maps = [each if need else None for each, need in zip(grads, need_maps, strict=True)]
    return of_maps, grad_weight, grad_scale, grad_shift, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, maps, weight, ctx.dilations, ctx.align_corners, *ctx.needed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, weight, *maps)


def _double_backward(ctx: Any, of_grads: Any, of_weight: Tensor | None, of_sums: Tensor | None) -> tuple[Any, ...]:
    """The results are linear in grad, and in weight (the inputs' gradients) or the inputs (the weight's)."""
    grad, weight, *maps = ctx.saved_tensors
    need_grad, need_maps, need_weight = ctx.needs_input_grad[:3]
    need_inputs, need_filters = ctx.needed
    u = None
    if need_inputs and of_grads is not None and any(each is not None for each in of_grads):
        u = [torch.zeros_like(m) if each is None else each for each, m in zip(of_grads, maps, strict=True)]
    v, w = (each if need_filters else None for each in (of_weight, of_sums))
    size, arguments = list(grad.shape[3:]), (ctx.dilations, ctx.align_corners)

    of_grad = of_filters = None
    of_maps: list[Tensor | None] = [None] * len(maps)
    if need_grad:
        terms = []
        if u is not None:
            terms.append(_FORWARD(u, weight, None, None, size, *arguments))
        if v is not None or w is not None:
            filters = torch.zeros_like(weight) if v is None else v
            terms.append(_FORWARD(maps, filters, None, w, size, *arguments))
        of_grad = sum(terms[1:], terms[0]) if terms else None
    if need_weight and u is not None:
        of_filters = _BACKWARD(grad, u, weight, *arguments, False, True)[1].to(weight.dtype)
    if any(need_maps) and v is not None:
        grads = _BACKWARD(grad, maps, v, *arguments, True, False)[0]
        of_maps = [each if need else None for each, need in zip(grads, need_maps, strict=True)]
    return of_grad, of_maps, of_filters, None, None, None, None


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_forward)
torch.library.register_autograd(_BACKWARD, _double_backward, setup_context=_setup_backward)


# ---- autocast ----


def _register_autocast(device: str, key: str) -> None:
    autocast = getattr(torch._C.DispatchKey, key)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device))

    def wide(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()

    def call(_: Any, inputs: list[Tensor], weight: Tensor, scale: Any, shift: Any, *rest: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(autocast)):
            return _FORWARD([cast(each) for each in inputs], wide(weight), wide(scale), wide(shift), *rest)

    _LIBRARY.impl("upsample_concat_depthwise", call, key, with_keyset=True)  # type: ignore[no-untyped-call]


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


# ---- vmap ----


def _sample(tensor: Any, dim: int | None, index: int) -> Any:
    return tensor if dim is None else tensor.select(dim, index)


def _samples(tensors: list[Tensor], dims: list[int | None], index: int) -> list[Tensor]:
    return [_sample(tensor, dim, index) for tensor, dim in zip(tensors, dims, strict=True)]


def _vmap_forward(
    info: Any, in_dims: tuple[Any, ...], inputs: list[Tensor], weight: Tensor, scale: Any, shift: Any, *rest: Any
) -> tuple[Tensor, int]:
    batch, parameters, dims = info.batch_size, [weight, scale, shift], list(in_dims[1:4])
    if all(dim is None for dim in dims):  # only the images differ: those of all samples are one batch
        output = _FORWARD(batched_maps(batch, in_dims[0], inputs), *parameters, *rest)
        return output.unflatten(1, (batch, -1)), 1
    outputs = [_FORWARD(_samples(inputs, in_dims[0], i), *_samples(parameters, dims, i), *rest) for i in range(batch)]
    return torch.stack(outputs), 0


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, inputs: list[Tensor], weight: Tensor, *rest: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """One call for each sample: each has sums over images of its own."""
    grads, of_weight, of_shift = zip(
        *[
            _BACKWARD(
                _sample(grad, in_dims[0], i),
                _samples(inputs, in_dims[1], i),
                _sample(weight, in_dims[2], i),
                *rest,
            )
            for i in range(info.batch_size)
        ],
        strict=True,
    )
    of_maps = [torch.stack(each) for each in zip(*grads, strict=True)]
    return (of_maps, torch.stack(of_weight), torch.stack(of_shift)), ([0] * len(of_maps), 0, 0)


register_vmap(_FORWARD, _vmap_forward)
register_vmap(_BACKWARD, _vmap_backward)
