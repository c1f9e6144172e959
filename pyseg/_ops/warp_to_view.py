"""Fake kernels, autograd and vmap of `pyseg::warp_to_view` and its gradient.

Both are linear in the scores: the gradient is the transpose, its own derivative the operator again, so derivatives of
every order work and nothing is saved but the geometry's arguments, from which the backward pass finds it once more.
Depth maps and cameras are constants: they get no gradient.

Autocast changes nothing: 16-bit scores are read as they are, sums are in float32.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.batched import register_vmap
from pyseg._ops.memory_format import is_channels_last
from pyseg._ops.segmentation_statistics import FLOATS, check, check_shape
from pyseg._ops.upsample import batched_maps, new_map

_WARP = torch.ops.pyseg.warp_to_view.default
_BACKWARD = torch.ops.pyseg._warp_to_view_backward.default


# ---- shapes ----


def _check_geometry(
    op: str, sides: list[Any], depth: Tensor, cameras: tuple[Tensor, Tensor, Tensor], source_depth: Tensor | None
) -> None:
    """sides: [N, H, W] of the views."""
    check(op, depth.dim() == 3, f"depth must be [K, H, W], got {list(depth.shape)}")
    check(op, depth.dtype in FLOATS, f"depth must be float32, float64, float16 or bfloat16, got {depth.dtype}")
    keys = depth.shape[0]
    views = f"scores must have as many views of each of {keys} keyframes, got {sides[0]}"
    check(op, sides[0] == sides[0] // max(keys, 1) * keys, views)
    key_intrinsics, source_intrinsics, pose = cameras
    for name, matrix, shape in (
        ("key_intrinsics", key_intrinsics, [keys, 3, 3]),
        ("source_intrinsics", source_intrinsics, [sides[0], 3, 3]),
        ("pose", pose, [sides[0], 4, 4]),
    ):
        dtype = f"{name} must be float32 or float64, got {matrix.dtype}"
        check(op, matrix.dtype in (torch.float32, torch.float64), dtype)
        check_shape(op, name, matrix, shape)
    if source_depth is not None:
        dtype = f"source_depth must be float32, float64, float16 or bfloat16, got {source_depth.dtype}"
        check(op, source_depth.dtype in FLOATS, dtype)
        check_shape(op, "source_depth", source_depth, sides)


def _fake_warp(
    scores: Tensor,
    depth: Tensor,
    key_intrinsics: Tensor,
    source_intrinsics: Tensor,
    pose: Tensor,
    source_depth: Tensor | None,
    absolute_tolerance: float,
    relative_tolerance: float,
) -> tuple[Tensor, Tensor]:
    op = "warp_to_view"
    check(op, scores.dim() == 4, f"scores must be [N, C, H, W], got {list(scores.shape)}")
    check(op, scores.dtype in FLOATS, f"scores must be float32, float64, float16 or bfloat16, got {scores.dtype}")
    n, channels, height, width = scores.shape
    _check_geometry(op, [n, height, width], depth, (key_intrinsics, source_intrinsics, pose), source_depth)
    output = new_map(scores, [depth.shape[0], channels, *depth.shape[1:]], is_channels_last(scores))
    return output, scores.new_empty(depth.shape, dtype=torch.uint8)


def _fake_backward(
    grad: Tensor,
    depth: Tensor,
    key_intrinsics: Tensor,
    source_intrinsics: Tensor,
    pose: Tensor,
    source_depth: Tensor | None,
    height: int,
    width: int,
    channels_last: bool,
    absolute_tolerance: float,
    relative_tolerance: float,
) -> Tensor:
    op = "_warp_to_view_backward"
    check(op, pose.dim() == 3, f"pose must be [N, 4, 4], got {list(pose.shape)}")
    n = pose.shape[0]
    _check_geometry(op, [n, height, width], depth, (key_intrinsics, source_intrinsics, pose), source_depth)
    check(op, grad.dim() == 4, f"grad must be [K, C, H, W], got {list(grad.shape)}")
    check_shape(op, "grad", grad, [depth.shape[0], grad.shape[1], *depth.shape[1:]])
    return new_map(grad, [n, grad.shape[1], height, width], channels_last)


torch.library.register_fake(_WARP, _fake_warp)
torch.library.register_fake(_BACKWARD, _fake_backward)


# ---- autograd ----


def _setup_warp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, *geometry, ctx.absolute, ctx.relative = inputs
    ctx.save_for_backward(*geometry)
    ctx.height, ctx.width = scores.shape[2:]
    ctx.channels_last = is_channels_last(scores)


def _warp_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    sides = (ctx.height, ctx.width, ctx.channels_last)
    return _BACKWARD(grad, *ctx.saved_tensors, *sides, ctx.absolute, ctx.relative), *[None] * 7


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *geometry, _, _, _, ctx.absolute, ctx.relative = inputs
    ctx.save_for_backward(*geometry)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _WARP(grad, *ctx.saved_tensors, ctx.absolute, ctx.relative)[0], *[None] * 10


torch.library.register_autograd(_WARP, _warp_backward, setup_context=_setup_warp)
torch.library.register_autograd(_BACKWARD, _double_backward, setup_context=_setup_backward)


# ---- vmap ----


def _batched(info: Any, in_dims: tuple[Any, ...], tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Samples as images of one batch."""
    present = [(tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=True) if tensor is not None]
    flat = iter(batched_maps(info.batch_size, [dim for _, dim in present], [tensor for tensor, _ in present]))
    return [None if tensor is None else next(flat) for tensor in tensors]


def _vmap_warp(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    total, seen = _WARP(*_batched(info, in_dims[:6], list(inputs[:6])), *inputs[6:])
    return (total.unflatten(0, (info.batch_size, -1)), seen.unflatten(0, (info.batch_size, -1))), (0, 0)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
    grads = _BACKWARD(*_batched(info, in_dims[:6], list(inputs[:6])), *inputs[6:])
    return grads.unflatten(0, (info.batch_size, -1)), 0


register_vmap(_WARP, _vmap_warp)
register_vmap(_BACKWARD, _vmap_backward)
