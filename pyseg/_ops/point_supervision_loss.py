"""Fake kernels, autograd and vmap of `pyseg::point_supervision_loss`.

The operator returns an image's sums, [N, 7] float64 (COLUMNS), of which the four terms have a gradient, with respect to
the logits only; and what its backward pass needs of every class, [N, C, 5]. Autocast changes nothing: 16-bit logits are
read as they are and computed with in float32. Memory formats as in segmentation_statistics.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseg._ops.batched import register_vmap
from pyseg._ops.segmentation_statistics import (
    FLOATS,
    INTEGERS,
    check,
    check_logits,
    check_shape,
    check_target,
    empty_like_logits,
    no_double_backward,
)

COLUMNS = ("PRESENT", "ABSENT", "POINT", "OBJECTNESS", "PRESENT_COUNT", "ABSENT_COUNT", "POINT_COUNT")
_KEPT = 5  # of a class: csrc/loss/point_supervision_math.h
_MOST_CLASSES = 1024

_FORWARD = torch.ops.pyseg.point_supervision_loss.default
_BACKWARD = torch.ops.pyseg._point_supervision_loss_backward.default


def _check_arguments(
    op: str,
    logits: Tensor,
    target: Tensor,
    point_weight: Tensor | None,
    objectness: Tensor | None,
    image_labels: Tensor | None,
    background: Sequence[int],
) -> None:
    check_logits(op, logits, "softmax")
    classes = logits.shape[1]
    sizes = f"logits must have 2 to {_MOST_CLASSES} classes, got {list(logits.shape)}"
    check(op, classes >= 2, sizes)
    check(op, classes <= _MOST_CLASSES, sizes)
    check_target(op, target, logits)
    pixels = [logits.shape[0], *logits.shape[2:]]
    check_shape(op, "target", target, pixels)
    for name, weight in (("point_weight", point_weight), ("objectness", objectness)):
        if weight is not None:
            check(op, weight.dtype in FLOATS, f"{name} must be of floating point, got {weight.dtype}")
            check(op, weight.device == logits.device, f"{name} must be on {logits.device} like logits")
            check_shape(op, name, weight, pixels)
    if image_labels is not None:
        check(op, image_labels.dtype in INTEGERS, f"image_labels must be of integers or bool, got {image_labels.dtype}")
        check(op, image_labels.device == logits.device, f"image_labels must be on {logits.device} like logits")
        check_shape(op, "image_labels", image_labels, [logits.shape[0], classes])
    some = f"background must name some of the classes 0 to {classes - 1}"
    for c in background:
        check(op, c >= 0, f"{some}, got {list(background)}")
        check(op, c < classes, f"{some}, got {list(background)}")
    check(op, len(background) > 0, f"{some} and not all, got {list(background)}")
    check(op, len(set(background)) < classes, f"{some} and not all, got {list(background)}")


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    point_weight: Tensor | None,
    objectness: Tensor | None,
    image_labels: Tensor | None,
    background: Sequence[int],
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    op = "point_supervision_loss"
    _check_arguments(op, logits, target, point_weight, objectness, image_labels, background)
    images, classes = logits.shape[:2]
    terms = logits.new_empty((images, len(COLUMNS)), dtype=torch.float64)
    return terms, logits.new_empty((images, classes, _KEPT), dtype=torch.float64)


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    point_weight: Tensor | None,
    objectness: Tensor | None,
    background: Sequence[int],
    ignore_index: int | None,
    kept: Tensor,
) -> Tensor:
    op = "_point_supervision_loss_backward"
    _check_arguments(op, logits, target, point_weight, objectness, None, background)
    check_shape(op, "grad", grad, [logits.shape[0], len(COLUMNS)])
    check_shape(op, "kept", kept, [logits.shape[0], logits.shape[1], _KEPT])
    return empty_like_logits(logits)


torch.library.register_fake(_FORWARD, _fake_forward)
torch.library.register_fake(_BACKWARD, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, point_weight, objectness, _, ctx.background, ctx.ignore_index = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, point_weight, objectness, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    *tensors, kept = ctx.saved_tensors
    of_logits = None if grad is None else _BACKWARD(grad, *tensors, ctx.background, ctx.ignore_index, kept)
    return of_logits, *[None] * 6


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, no_double_backward("point_supervision_loss"))


# ---- vmap: its examples are further images ----


def _flattened(info: Any, tensors: Sequence[Tensor | None], in_dims: Sequence[int | None]) -> list[Tensor | None]:
    rows = [
        None if t is None else t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    return [None if t is None else t.flatten(0, 1) for t in rows]


def _batched_forward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    results = _FORWARD(*_flattened(info, arguments[:5], in_dims[:5]), *arguments[5:])
    return tuple(each.unflatten(0, (info.batch_size, -1)) for each in results), (0, 0)


def _batched_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    *tensors, kept = _flattened(info, (*arguments[:5], arguments[7]), (*in_dims[:5], in_dims[7]))
    return _BACKWARD(*tensors, *arguments[5:7], kept).unflatten(0, (info.batch_size, -1)), 0


register_vmap(_FORWARD, _batched_forward)
register_vmap(_BACKWARD, _batched_backward)
