"""Fake kernels, autograd and autocast of `pyseg::pixel_cross_entropy`.

The loss of every pixel (softmax) or element (sigmoid, none), float32 for 16-bit logits. Autocast changes nothing:
16-bit logits are read as they are and computed with in float32. Only the logits have a gradient. Memory formats as in
segmentation_statistics.py; the loss of elements has that of the logits.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg._ops.segmentation_statistics import (
    FLOATS,
    check,
    check_log_sum,
    check_logits,
    check_shape,
    check_target,
    empty_like_logits,
    empty_log_sum,
    no_double_backward,
    wide_dtype,
)

_FORWARD = torch.ops.pyseg.pixel_cross_entropy.default
_BACKWARD = torch.ops.pyseg._pixel_cross_entropy_backward.default


def _check_arguments(
    op: str, logits: Tensor, target: Tensor, class_weight: Tensor | None, activation: str, label_smoothing: float
) -> None:
    check_logits(op, logits, activation)
    check_target(op, target, logits)
    check(op, 0 <= label_smoothing <= 1, f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if class_weight is not None:
        check(op, class_weight.dtype in FLOATS, f"class_weight must be of floating point, got {class_weight.dtype}")
        check(op, class_weight.device == logits.device, f"class_weight must be on {logits.device} like logits")
        check_shape(op, "class_weight", class_weight, [logits.shape[1]])


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    activation: str,
    ignore_index: int | None,
    gamma: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    _check_arguments("pixel_cross_entropy", logits, target, class_weight, activation, label_smoothing)
    dtype = wide_dtype(logits)
    if activation == "softmax":
        loss = logits.new_empty((logits.shape[0], *logits.shape[2:]), dtype=dtype)
    else:
        loss = empty_like_logits(logits, dtype)
    return loss, empty_log_sum(logits, activation, target.dim() == logits.dim())


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    activation: str,
    ignore_index: int | None,
    gamma: float,
    label_smoothing: float,
    log_sum: Tensor,
) -> Tensor:
    op = "_pixel_cross_entropy_backward"
    _check_arguments(op, logits, target, class_weight, activation, label_smoothing)
    shape = [logits.shape[0], *logits.shape[2:]] if activation == "softmax" else list(logits.shape)
    check_shape(op, "grad", grad, shape)
    check_log_sum(op, log_sum, logits)
    return empty_like_logits(logits)


torch.library.register_fake(_FORWARD, _fake_forward)
torch.library.register_fake(_BACKWARD, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, *ctx.arguments = inputs
    ctx.set_materialize_grads(False)  # no map of zeros for log_sum
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, class_weight, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    *tensors, log_sum = ctx.saved_tensors
    of_logits = None if grad is None else _BACKWARD(grad, *tensors, *ctx.arguments, log_sum)
    return of_logits, *[None] * 6


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, no_double_backward("pixel_cross_entropy"))
