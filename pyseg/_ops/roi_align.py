"""Fake kernels and autograd of `pyseg::roi_align` and `pyseg::multiscale_roi_align`.

Both are linear in the maps, so the gradient of a mean needs their sizes only: maps are kept for mode "max" and where
the boxes require a gradient. One private operator, `_roi_align_backward`, serves both. Its own derivative is refused.

Autocast changes nothing: 16-bit maps are read as they are, coordinates and sums are in float32.

The output is channels_last where a map is (by strides that can mean nothing else), otherwise contiguous, and so is
each map's gradient.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.memory_format import is_channels_last
from pyseg._ops.segmentation_statistics import FLOATS, check, no_double_backward

_ALIGN = torch.ops.pyseg.roi_align.default
_MULTISCALE = torch.ops.pyseg.multiscale_roi_align.default
_BACKWARD = torch.ops.pyseg._roi_align_backward.default


def _check_boxes(op: str, boxes: Tensor, rank: int, output_size: list[int], mode: str) -> None:
    expected = "[K, 7]" if rank == 5 else "[K, 5] or [K, 6]"
    message = f"boxes must be {expected}, got {list(boxes.shape)}"
    check(op, boxes.dim() == 2, message)
    check(op, boxes.shape[1] in ((7,) if rank == 5 else (5, 6)), message)
    check(op, boxes.dtype in FLOATS, f"boxes must be float32, float64, float16 or bfloat16, got {boxes.dtype}")
    sizes = f"output_size must be {rank - 2} positive integers, got {list(output_size)}"
    check(op, len(output_size) == rank - 2, sizes)
    check(op, mode in ("avg", "max"), f"mode must be avg or max, got {mode}")


def _fake(op: str, name: str, maps: list[Tensor], boxes: Tensor, output_size: list[int], mode: str) -> Tensor:
    check(op, len(maps) > 0, f"{name} must not be empty")
    rank = maps[0].dim()
    for each in maps:
        shape = f"{name} must be [N, C, H, W] or [N, C, D, H, W], got {list(each.shape)}"
        dtype = f"{name} must be float32, float64, float16 or bfloat16, got {each.dtype}"
        check(op, each.dim() in (4, 5), shape)
        check(op, each.dtype in FLOATS, dtype)
    _check_boxes(op, boxes, rank, output_size, mode)
    memory_format = torch.contiguous_format
    if any(is_channels_last(each) for each in maps):
        memory_format = torch.channels_last_3d if rank == 5 else torch.channels_last
    return torch.empty(
        [boxes.shape[0], maps[0].shape[1], *output_size],
        dtype=maps[0].dtype,
        device=maps[0].device,
        memory_format=memory_format,
    )


def _fake_align(
    input: Tensor,
    boxes: Tensor,
    output_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    return _fake("roi_align", "input", [input], boxes, output_size, mode)


def _fake_multiscale(
    features: list[Tensor],
    boxes: Tensor,
    output_size: list[int],
    spatial_scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
    least_level: int,
    most_level: int,
    canonical_size: float,
    canonical_level: float,
    epsilon: list[float],
) -> Tensor:
    return _fake("multiscale_roi_align", "features", features, boxes, output_size, mode)


def _fake_backward(
    grad: Tensor,
    features: list[Tensor],
    boxes: Tensor,
    sizes: list[int],
    channels_last: list[int],
    spatial_scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
    pyramid: list[float],
    need_features: bool,
    need_boxes: bool,
) -> tuple[list[Tensor], Tensor]:
    rank = grad.dim()
    _check_boxes("_roi_align_backward", boxes, rank, list(grad.shape[2:]), mode)
    grads = []
    for level, last in enumerate(channels_last):
        memory_format = torch.contiguous_format
        if last:
            memory_format = torch.channels_last_3d if rank == 5 else torch.channels_last
        size = sizes[level * rank : (level + 1) * rank]
        if need_features:
            grads.append(torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format))
        else:
            grads.append(grad.new_empty(0))
    return grads, boxes.new_empty(boxes.shape if need_boxes else 0)


torch.library.register_fake(_ALIGN, _fake_align)
torch.library.register_fake(_MULTISCALE, _fake_multiscale)
torch.library.register_fake(_BACKWARD, _fake_backward)


# ---- autograd ----


def _save(ctx: Any, maps: list[Tensor], boxes: Tensor, need_boxes: bool, mode: str) -> None:
    ctx.save_for_backward(boxes, *(maps if need_boxes or mode == "max" else ()))
    ctx.sizes = [size for each in maps for size in each.shape]
    ctx.channels_last = [int(is_channels_last(each)) for each in maps]


def _gradients(ctx: Any, grad: Tensor, pyramid: list[float], need_maps: bool, need_boxes: bool) -> Any:
    boxes, *maps = ctx.saved_tensors
    return _BACKWARD(grad, maps, boxes, ctx.sizes, ctx.channels_last, *ctx.arguments, pyramid, need_maps, need_boxes)


def _setup_align(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, boxes, _, spatial_scale, *rest = inputs
    ctx.arguments = ([spatial_scale], *rest)
    _save(ctx, [input], boxes, ctx.needs_input_grad[1], rest[-1])


def _align_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_input, need_boxes = ctx.needs_input_grad[:2]
    grads, of_boxes = _gradients(ctx, grad, [], need_input, need_boxes)
    return grads[0] if need_input else None, of_boxes if need_boxes else None, *[None] * 5


def _setup_multiscale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, _, *ctx.arguments, least, most, size, level, epsilon = inputs
    ctx.pyramid = [float(least), float(most), size, level, *epsilon]
    _save(ctx, features, boxes, ctx.needs_input_grad[1], ctx.arguments[-1])


def _multiscale_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_features, need_boxes = ctx.needs_input_grad[:2]
    need_any = any(need_features)
    grads, of_boxes = _gradients(ctx, grad, ctx.pyramid, need_any, need_boxes)
    of_features = [each if need else None for each, need in zip(grads, need_features, strict=True)]
    return of_features, of_boxes if need_boxes else None, *[None] * 10


torch.library.register_autograd(_ALIGN, _align_backward, setup_context=_setup_align)
torch.library.register_autograd(_MULTISCALE, _multiscale_backward, setup_context=_setup_multiscale)
torch.library.register_autograd(
    _BACKWARD, no_double_backward("roi_align"), setup_context=lambda ctx, inputs, output: None
)
