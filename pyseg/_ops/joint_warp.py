"""Fake kernels, autograd and vmap of `pyseg::joint_warp` and its gradient.

Interpolation is linear in the image and in soft labels: the gradient needs the parameters only, and its own derivative
is the operator again. Places, gain and bias take no gradient.

Autocast changes nothing: 16-bit images are read as they are, places and sums are in float32.

The output is channels_last where its input is (by strides that can mean nothing else), otherwise contiguous, and so is
each gradient.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.batched import register_vmap
from pyseg._ops.memory_format import is_channels_last
from pyseg._ops.segmentation_statistics import FLOATS, INTEGERS, check, check_shape

BORDERS = ("reflect", "replicate", "constant")
_WARP = torch.ops.pyseg.joint_warp.default
_BACKWARD = torch.ops.pyseg._joint_warp_backward.default


# ---- shapes ----


def _new_map(like: Tensor, dtype: torch.dtype, shape: list[Any], last: bool) -> Tensor:
    memory_format = torch.contiguous_format
    if last:
        memory_format = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _check_arguments(
    op: str,
    name: str,
    image: Tensor,
    affine: Tensor,
    displacement: Tensor | None,
    factors: dict[str, Tensor | None],
    size: list[int],
    borders: dict[str, str],
) -> int:
    """The number of axes."""
    check(op, image.dim() in (4, 5), f"{name} must be [N, C, H, W] or [N, C, D, H, W], got {list(image.shape)}")
    axes = image.dim() - 2
    check(op, len(size) == axes, f"size must be {axes} integers, got {list(size)}")
    for side in (*size, *image.shape[2:]):
        check(op, side > 0, f"{name} and size must have positive sides, got {list(image.shape)} and {list(size)}")
    check_shape(op, "affine", affine, [image.shape[0], axes, axes + 1])
    if displacement is not None:
        message = f"displacement must be [N, {axes}] and a grid of {axes} axes, got {list(displacement.shape)}"
        check(op, displacement.dim() == axes + 2, message)
        check(op, displacement.shape[0] == image.shape[0], message)
        check(op, displacement.shape[1] == axes, message)
    for each, factor in factors.items():
        if factor is not None:
            check_shape(op, each, factor, list(image.shape[:2]))
    for each, border in borders.items():
        check(op, border in BORDERS, f"{each} must be reflect, replicate or constant, got {border}")
    return axes


def _fake_warp(
    image: Tensor,
    labels: Tensor | None,
    affine: Tensor,
    displacement: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    size: list[int],
    border: str,
    fill: float,
    label_border: str,
    ignore_index: int,
    cubic: float,
    float_output: bool,
) -> tuple[Tensor, Tensor]:
    op = "joint_warp"
    known = (*FLOATS, torch.uint8)
    check(op, image.dtype in known, f"image must be float32, float64, float16, bfloat16 or uint8, got {image.dtype}")
    factors, borders = {"gain": gain, "bias": bias}, {"border": border, "label_border": label_border}
    _check_arguments(op, "image", image, affine, displacement, factors, size, borders)
    dtype = torch.float32 if image.dtype == torch.uint8 and float_output else image.dtype
    output = _new_map(image, dtype, [*image.shape[:2], *size], is_channels_last(image))
    if labels is None:
        return output, image.new_empty(0)
    if labels.is_floating_point():
        check_shape(op, "labels", labels, [image.shape[0], labels.shape[1], *image.shape[2:]])
        return output, _new_map(labels, labels.dtype, [*labels.shape[:2], *size], is_channels_last(labels))
    check(op, labels.dtype in INTEGERS, f"labels must be of integers, bool or floating point, got {labels.dtype}")
    check_shape(op, "labels", labels, [image.shape[0], *image.shape[2:]])
    return output, labels.new_empty([labels.shape[0], *size])


def _fake_backward(
    grad: Tensor,
    affine: Tensor,
    displacement: Tensor | None,
    gain: Tensor | None,
    image_size: list[int],
    border: str,
    cubic: float,
    channels_last: bool,
) -> Tensor:
    op = "_joint_warp_backward"
    check(op, grad.dtype in FLOATS, f"grad must be float32, float64, float16 or bfloat16, got {grad.dtype}")
    _check_arguments(op, "grad", grad, affine, displacement, {"gain": gain}, image_size, {"border": border})
    return _new_map(grad, grad.dtype, [*grad.shape[:2], *image_size], channels_last)


torch.library.register_fake(_WARP, _fake_warp)
torch.library.register_fake(_BACKWARD, _fake_backward)


# ---- autograd ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, labels, affine, displacement, gain, bias, _, ctx.border, _, ctx.label_border, _, ctx.cubic, _ = inputs
    for name, tensor in (("affine", affine), ("displacement", displacement), ("gain", gain), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"joint_warp: {name} takes no gradient; detach it")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(affine, displacement, gain)
    ctx.image_size, ctx.image_last = list(image.shape[2:]), is_channels_last(image)
    ctx.labels_last = labels is not None and is_channels_last(labels)
    if labels is None or not labels.is_floating_point():
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor | None, labels_grad: Tensor | None) -> tuple[Any, ...]:
    affine, displacement, gain = ctx.saved_tensors
    of_image = of_labels = None
    if grad is not None and ctx.needs_input_grad[0]:
        of_image = _BACKWARD(grad, affine, displacement, gain, ctx.image_size, ctx.border, ctx.cubic, ctx.image_last)
    if labels_grad is not None and ctx.needs_input_grad[1]:
        arguments = (affine, displacement, None, ctx.image_size, ctx.label_border, ctx.cubic, ctx.labels_last)
        of_labels = _BACKWARD(labels_grad, *arguments)
    return of_image, of_labels, *[None] * 11


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, affine, displacement, gain, _, ctx.border, ctx.cubic, _ = inputs
    ctx.save_for_backward(affine, displacement, gain)
    ctx.size = list(grad.shape[2:])


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    affine, displacement, gain = ctx.saved_tensors
    arguments = (ctx.size, ctx.border, 0.0, ctx.border, 0, ctx.cubic, False)
    return _WARP(grad, None, affine, displacement, gain, None, *arguments)[0], *[None] * 7


torch.library.register_autograd(_WARP, _backward, setup_context=_setup)
torch.library.register_autograd(_BACKWARD, _double_backward, setup_context=_setup_backward)


# ---- vmap: samples are images of one batch ----


def _as_images(batch: int, dims: tuple[Any, ...], tensors: tuple[Any, ...]) -> list[Any]:
    """[B, N, ...] of each as [B * N, ...]."""
    each = zip(dims, tensors, strict=True)
    samples = [None if t is None else t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for d, t in each]
    return [None if t is None else t.flatten(0, 1) for t in samples]


def _vmap_warp(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    batch = info.batch_size
    tensors = _as_images(batch, in_dims[:6], inputs[:6])
    image, labels = _WARP(*tensors, *inputs[6:])
    labels = labels.new_empty(batch, 0) if inputs[1] is None else labels.unflatten(0, (batch, -1))
    return (image.unflatten(0, (batch, -1)), labels), (0, 0)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
    tensors = _as_images(info.batch_size, in_dims[:4], inputs[:4])
    return _BACKWARD(*tensors, *inputs[4:]).unflatten(0, (info.batch_size, -1)), 0


register_vmap(_WARP, _vmap_warp)
register_vmap(_BACKWARD, _vmap_backward)
