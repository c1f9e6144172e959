"""Fake kernels, autograd, autocast and vmap of `pyseg::fuse_query`, a product and the map that is added to it.

    z = s * (W x)     y = relu?(z + offset + ramp)     s: one over the norm of a pixel of x, or 1

With g = dL/dy, gated to y > 0 where ReLU is on:

    dL/doffset = sum(g)     dL/dcoordinates: from sum(g), sum(g u), sum(g v) over the pixels, u and v their centres
    dL/dW = sum(s g x^T)    dL/dx = h - s^2 x <x, h>  with h = W^T (s g), or h alone where nothing is normalised

so neither the product nor the normalised map is kept. s, up to 1e12, is for float32 and float64: 16-bit maps are
normalised before the operator. Derivatives of higher order are those of the same formula in
torch's operators, which is evaluated only where they are asked for (create_graph=True).

Under autocast the map and its weights are in autocast's dtype; what is added to the product is taken as it comes.

The output is channels_last where `input` is (by strides that can mean nothing else), otherwise contiguous, and so is
the input's gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.batched import register_vmap
from pyseg._ops.segmentation_statistics import FLOATS, check, check_shape, no_double_backward, wide_dtype
from pyseg._ops.upsample import is_last, new_map

_LIBRARY = torch.library.Library("pyseg", "FRAGMENT")  # type: ignore[no-untyped-call]
_FORWARD = torch.ops.pyseg.fuse_query.default
_BACKWARD = torch.ops.pyseg._fuse_query_backward.default
COORDINATES = 8


# ---- shapes ----


def _check_input(op: str, input: Tensor, weight: Tensor) -> None:
    shape = list(input.shape)
    check(op, input.dtype in FLOATS, f"input must be float32, float64, float16 or bfloat16, got {input.dtype}")
    check(op, input.dim() == 4, f"input must be [N, C, H, W] with positive H and W, got {shape}")
    check(op, input.shape[2] > 0, f"input must be [N, C, H, W] with positive H and W, got {shape}")
    check(op, input.shape[3] > 0, f"input must be [N, C, H, W] with positive H and W, got {shape}")
    message = f"weight must be [K, {shape[1]}] for {shape[1]} channels of input, got {list(weight.shape)}"
    check(op, weight.dim() == 2, message)
    check(op, weight.shape[1] == input.shape[1], message)
    check(op, weight.dtype == input.dtype, f"weight must be {input.dtype} like input, got {weight.dtype}")
    check(op, weight.device == input.device, "weight must be on the device of input")


def _fake_forward(
    input: Tensor, weight: Tensor, offset: Tensor, coordinates: Tensor, normalize: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    op = "fuse_query"
    _check_input(op, input, weight)
    check(
        op,
        not normalize or input.dtype.itemsize > 2,
        f"normalize needs an input of float32 or float64, got {input.dtype}",
    )
    images, _, height, width = input.shape
    channels = weight.shape[0]
    check_shape(op, "offset", offset, [images, channels])
    check_shape(op, "coordinates", coordinates, [channels, COORDINATES])
    scale = input.new_empty([images, height, width] if normalize else [0], dtype=wide_dtype(input))
    return new_map(input, [images, channels, height, width], is_last(input)), scale


def _fake_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    scale: Tensor | None,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "_fuse_query_backward"
    _check_input(op, input, weight)
    images, _, height, width = input.shape
    channels, dtype = weight.shape[0], wide_dtype(input)
    check_shape(op, "grad", grad, [images, channels, height, width])
    return (
        new_map(input, list(input.shape), is_last(input)) if need_input else grad.new_empty([0]),
        grad.new_empty(weight.shape if need_weight else [0]),
        grad.new_empty([images, channels], dtype=dtype),
        grad.new_empty([channels, COORDINATES], dtype=dtype),
    )


torch.library.register_fake(_FORWARD, _fake_forward)
torch.library.register_fake(_BACKWARD, _fake_backward)


# ---- autograd ----


def pixel_coordinates(height: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """[8, height, width]: xmin, ymin, xmax, ymax, xcentre and ycentre of each pixel in [-1, 1], 1/width, 1/height."""

    def centres(n: int) -> Tensor:
        return (torch.arange(n, dtype=dtype, device=device) * 2 + (1 - n)) / n

    u, v = centres(width).expand(height, width), centres(height).unsqueeze(1).expand(height, width)
    x, y = torch.full_like(u, 1 / width), torch.full_like(v, 1 / height)
    return torch.stack([u - x, v - y, u + x, v + y, u, v, x, y])


def composed(input: Tensor, weight: Tensor, offset: Tensor, coordinates: Tensor, normalize: bool, relu: bool) -> Tensor:
    """The operator's output in torch's operators, which know derivatives of every order and in forward mode."""
    pixels = pixel_coordinates(input.shape[2], input.shape[3], input.dtype, input.device)
    x = F.normalize(input, dim=1) if normalize else input
    y = F.conv2d(x, weight[:, :, None, None]) + offset.to(input.dtype)[:, :, None, None]
    y = y + torch.einsum("kc,chw->khw", coordinates.to(input.dtype), pixels)
    return y.relu() if relu else y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, offset, coordinates, ctx.normalize, ctx.relu = inputs
    result, scale = output
    ctx.save_for_backward(
        input, weight, offset, coordinates, result if ctx.relu else None, scale if ctx.normalize else None
    )


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    *inputs, output, scale = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        # Views, so that a weight that was itself made from the input counts as another argument.
        views = [each.view_as(each) for each in inputs]
        wanted = [view for view, need in zip(views, needed, strict=True) if need]
        y = composed(views[0], views[1], views[2], views[3], ctx.normalize, ctx.relu)
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return *(next(grads) if need else None for need in needed), None, None
    input, weight, offset, coordinates = inputs
    grads = _BACKWARD(grad, input, weight, output, scale, needed[0], needed[1])
    wide = (grads[0], grads[1], grads[2].to(offset.dtype), grads[3].to(coordinates.dtype))
    return *(each if need else None for each, need in zip(wide, needed, strict=True)), None, None


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, no_double_backward("_fuse_query_backward"))


# ---- autocast ----


def _autocast(op: torch._ops.OpOverload, device: str, key: str, casts: int) -> Any:
    """The first `casts` arguments in autocast's dtype; the products within are in the dtype that then arrives."""
    autocast = getattr(torch._C.DispatchKey, key)

    def call(_: Any, *arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        narrow = [each.to(dtype) if each.dtype != torch.float64 else each for each in arguments[:casts]]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(autocast)):
            return op(*narrow, *arguments[casts:])

    return call


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _op, _casts in ((_FORWARD, 2), (_BACKWARD, 0)):
        _rule = _autocast(_op, _device, _key, _casts)
        _LIBRARY.impl(_op._opname, _rule, _key, with_keyset=True)  # type: ignore[no-untyped-call]


# ---- vmap ----


def _each_sample(op: torch._ops.OpOverload) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        results = [
            op(*[a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


for _op in (_FORWARD, _BACKWARD):
    register_vmap(_op, _each_sample(_op))
