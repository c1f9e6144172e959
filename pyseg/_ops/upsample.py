"""Fake kernels, autograd, autocast and vmap of `pyseg::bilinear_upsample`, `upsample_concat` and their gradient.

Interpolation is linear, its gradient the transpose: the gradient's own derivative is the operator again, so derivatives
of every order work and nothing is saved but sizes. One private operator, `_upsample_concat_backward`, serves both.

Autocast changes nothing but that maps of several dtypes become the widest of them, as in torch.cat.

The output is channels_last where an input is (by strides that can mean nothing else), otherwise contiguous, and so are
the inputs' gradients.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.batched import register_vmap
from pyseg._ops.memory_format import is_channels_last
from pyseg._ops.segmentation_statistics import FLOATS, check, check_shape

_LIBRARY = torch.library.Library("pyseg", "FRAGMENT")  # type: ignore[no-untyped-call]
_BILINEAR = torch.ops.pyseg.bilinear_upsample.default
_CONCAT = torch.ops.pyseg.upsample_concat.default
_BACKWARD = torch.ops.pyseg._upsample_concat_backward.default


# ---- shapes, shared with upsample_concat_depthwise ----


def is_last(*tensors: Tensor) -> bool:
    return any(is_channels_last(tensor) for tensor in tensors)


def new_map(like: Tensor, shape: list[Any], last: bool) -> Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def check_inputs(op: str, name: str, inputs: list[Tensor]) -> None:
    check(op, len(inputs) > 0, f"{name} must not be empty")
    first = inputs[0]
    for each in inputs:
        check(op, each.dim() == 4, f"{name} must be [N, C, H, W], got {list(each.shape)}")
        check(op, each.dtype in FLOATS, f"{name} must be float32, float64, float16 or bfloat16, got {each.dtype}")
        message = f"{name} must have the same N, got {list(each.shape)} beside {list(first.shape)}"
        check(op, each.shape[0] == first.shape[0], message)
        check(op, each.dtype == first.dtype, f"{name} must have one dtype, got {each.dtype} beside {first.dtype}")
        check(op, each.device == first.device, f"{name} must be on one device, got {each.device}")
        check(op, each.shape[2] > 0, f"{name} must have positive H and W, got {list(each.shape)}")
        check(op, each.shape[3] > 0, f"{name} must have positive H and W, got {list(each.shape)}")


def check_size(op: str, size: list[Any]) -> None:
    check(op, len(size) == 2, f"size must be two positive integers, got {list(size)}")
    for side in size:
        check(op, side > 0, f"size must have positive H and W, got {list(size)}")


def flat_sizes(inputs: list[Tensor]) -> list[Any]:
    return [size for each in inputs for size in each.shape]


def _check_scale_factors(op: str, factors: list[float] | None) -> None:
    valid = factors is None or (len(factors) == 2 and min(factors) > 0)
    check(op, valid, f"scale_factors must be None or two positive numbers, got {factors}")


def _fake_bilinear(input: Tensor, size: list[int], align_corners: bool, scale_factors: list[float] | None) -> Tensor:
    op = "bilinear_upsample"
    check_inputs(op, "input", [input])
    check_size(op, size)
    _check_scale_factors(op, scale_factors)
    return new_map(input, [*input.shape[:2], *size], is_last(input))


def _fake_concat(inputs: list[Tensor], size: list[int], align_corners: bool) -> Tensor:
    op = "upsample_concat"
    check_inputs(op, "inputs", inputs)
    check_size(op, size)
    channels = sum(each.shape[1] for each in inputs)
    return new_map(inputs[0], [inputs[0].shape[0], channels, *size], is_last(*inputs))


def _fake_backward(
    grad: Tensor, sizes: list[int], channels_last: bool, align_corners: bool, scale_factors: list[float] | None
) -> list[Tensor]:
    op = "_upsample_concat_backward"
    check(op, grad.dim() == 4, f"grad must be [N, C, H, W], got {list(grad.shape)}")
    check(op, len(sizes) > 0, f"sizes must have four numbers for each map, got {list(sizes)}")
    check(op, len(sizes) % 4 == 0, f"sizes must have four numbers for each map, got {list(sizes)}")
    check_shape(op, "grad", grad, [sizes[0], sum(sizes[1::4]), *grad.shape[2:]])
    _check_scale_factors(op, scale_factors)
    return [new_map(grad, list(sizes[i : i + 4]), channels_last) for i in range(0, len(sizes), 4)]


torch.library.register_fake(_BILINEAR, _fake_bilinear)
torch.library.register_fake(_CONCAT, _fake_concat)
torch.library.register_fake(_BACKWARD, _fake_backward)


# ---- autograd ----


def _setup_bilinear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, _, ctx.align_corners, ctx.scale_factors = inputs
    ctx.sizes, ctx.channels_last = list(input.shape), is_last(input)


def _bilinear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = _BACKWARD(grad, ctx.sizes, ctx.channels_last, ctx.align_corners, ctx.scale_factors)
    return grads[0], None, None, None


def _setup_concat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, _, ctx.align_corners = inputs
    ctx.sizes, ctx.channels_last = flat_sizes(maps), is_last(*maps)


def _concat_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = _BACKWARD(grad, ctx.sizes, ctx.channels_last, ctx.align_corners, None)
    return [each if need else None for each, need in zip(grads, ctx.needs_input_grad[0], strict=True)], None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, _, _, ctx.align_corners, ctx.scale_factors = inputs
    ctx.size = list(grad.shape[2:])


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    if ctx.scale_factors is not None:
        return _BILINEAR(grads[0], ctx.size, ctx.align_corners, ctx.scale_factors), None, None, None, None
    return _CONCAT(grads, ctx.size, ctx.align_corners), None, None, None, None


torch.library.register_autograd(_BILINEAR, _bilinear_backward, setup_context=_setup_bilinear)
torch.library.register_autograd(_CONCAT, _concat_backward, setup_context=_setup_concat)
torch.library.register_autograd(_BACKWARD, _double_backward, setup_context=_setup_backward)


# ---- autocast ----


def _concat_autocast(key: str) -> Any:
    autocast = getattr(torch._C.DispatchKey, key)

    def call(_: Any, inputs: list[Tensor], size: list[int], align_corners: bool) -> Any:
        widest = functools.reduce(torch.promote_types, [each.dtype for each in inputs])
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(autocast)):
            return _CONCAT([each.to(widest) for each in inputs], size, align_corners)

    return call


for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("upsample_concat", _concat_autocast(_key), _key, with_keyset=True)  # type: ignore[no-untyped-call]


# ---- vmap ----


def _vmap_bilinear(info: Any, in_dims: tuple[Any, ...], input: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    images = input.movedim(in_dims[0], 0)
    return _BILINEAR(images.flatten(0, 1), *arguments).unflatten(0, images.shape[:2]), 0


def batched_maps(batch: int, dims: list[int | None], maps: list[Tensor]) -> list[Tensor]:
    """[B, N, ...] of each, as images of one batch."""
    each = [m.expand(batch, *m.shape) if d is None else m.movedim(d, 0) for m, d in zip(maps, dims, strict=True)]
    return [m.flatten(0, 1) for m in each]


def _vmap_concat(info: Any, in_dims: tuple[Any, ...], inputs: list[Tensor], *arguments: Any) -> tuple[Tensor, int]:
    maps = batched_maps(info.batch_size, in_dims[0], inputs)
    return _CONCAT(maps, *arguments).unflatten(0, (info.batch_size, -1)), 0


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, sizes: list[int], *arguments: Any
) -> tuple[list[Tensor], list[int]]:
    images = grad.movedim(in_dims[0], 0)
    sizes = [size * info.batch_size if i % 4 == 0 else size for i, size in enumerate(sizes)]
    grads = _BACKWARD(images.flatten(0, 1), sizes, *arguments)
    return [each.unflatten(0, images.shape[:2]) for each in grads], [0] * len(grads)


register_vmap(_BILINEAR, _vmap_bilinear)
register_vmap(_CONCAT, _vmap_concat)
register_vmap(_BACKWARD, _vmap_backward)
