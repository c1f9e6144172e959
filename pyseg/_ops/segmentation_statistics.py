"""Fake kernels, autograd and autocast of `pyseg::segmentation_statistics`.

With p = activation(z), g the target and w the pixel's weight, the operator's columns are sums over the pixels of an
image and class: PG, P, G, PP, GG, PPG; POS, NEG, WG, W; NLL (csrc/loss/segmentation_math.h). Only those of p and its
logarithms have a gradient, and only with respect to the logits: targets and weights get none.

Autocast changes nothing: 16-bit logits are read as they are and all sums are in float32 and float64, which is what
torch's cross_entropy pays a copy of the logits in float32 for.

The gradient is channels_last where the logits are (and could not be taken for contiguous), otherwise contiguous.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels

COLUMNS = ("PG", "P", "G", "PP", "GG", "PPG", "POS", "NEG", "WG", "W", "NLL")
ACTIVATIONS = ("softmax", "sigmoid", "none")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)

_FORWARD = torch.ops.pyseg.segmentation_statistics.default
_BACKWARD = torch.ops.pyseg._segmentation_statistics_backward.default


# ---- shapes, shared by the operators on segmentation maps ----


def check(op: str, condition: Any, message: str) -> None:
    torch._check(condition, lambda: f"{op}: {message}")


def check_shape(op: str, name: str, tensor: Tensor, shape: list[Any]) -> None:
    message = f"{name} must be {shape}, got {list(tensor.shape)}"
    check(op, tensor.dim() == len(shape), message)
    for got, expected in zip(tensor.shape, shape, strict=True):
        check(op, got == expected, message)


def check_logits(op: str, logits: Tensor, activation: str) -> None:
    check(
        op, 3 <= logits.dim() <= 5, f"logits must be [N, C, *S] with S of 1 to 3 dimensions, got {list(logits.shape)}"
    )
    check(op, logits.dtype in FLOATS, f"logits must be float32, float64, float16 or bfloat16, got {logits.dtype}")
    check(op, activation in ACTIVATIONS, f"activation must be softmax, sigmoid or none, got {activation}")


def check_target(op: str, target: Tensor, logits: Tensor) -> bool:
    """Whether the target is dense."""
    check(op, target.device == logits.device, f"target must be on {logits.device} like logits, got {target.device}")
    dense = target.dim() == logits.dim()
    if dense:
        check(op, target.dtype in FLOATS + INTEGERS, f"target must be of numbers or bool, got {target.dtype}")
        check_shape(op, "target", target, list(logits.shape))
    else:
        check(
            op, target.dtype in INTEGERS, f"target must be of integers or bool where it is labels, got {target.dtype}"
        )
        check_shape(op, "target", target, [logits.shape[0], *logits.shape[2:]])
    return dense


def empty_like_logits(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In the memory format of the logits, if that is one of torch's and not also contiguous."""
    memory_format = torch.contiguous_format
    if not logits.is_contiguous():
        if logits.dim() == 4 and logits.is_contiguous(memory_format=torch.channels_last):
            memory_format = torch.channels_last
        elif logits.dim() == 5 and logits.is_contiguous(memory_format=torch.channels_last_3d):
            memory_format = torch.channels_last_3d
    return torch.empty(logits.shape, dtype=dtype or logits.dtype, device=logits.device, memory_format=memory_format)


def wide_dtype(logits: Tensor) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


LOG_SUM_CLASSES = 20  # from which on the CPU keeps log(sum(exp(z))) of a softmax with labels for the backward pass


def empty_log_sum(logits: Tensor, activation: str, dense: bool) -> Tensor:
    """What the forward pass keeps: [N, *S], or [0] where that is nothing."""
    kept = logits.device.type == "cpu" and activation == "softmax" and not dense and logits.shape[1] >= LOG_SUM_CLASSES
    dtype = wide_dtype(logits)
    return logits.new_empty([logits.shape[0], *logits.shape[2:]] if kept else [0], dtype=dtype)


def check_log_sum(op: str, log_sum: Tensor, logits: Tensor) -> None:
    dtype = wide_dtype(logits)
    check(op, log_sum.dtype == dtype, f"log_sum must be {str(dtype)[6:]}, got {log_sum.dtype}")
    pixels = [logits.shape[0], *logits.shape[2:]]
    check_shape(op, "log_sum", log_sum, [0] if log_sum.dim() == 1 else pixels)  # [0]: none was kept


def _check_arguments(op: str, logits: Tensor, target: Tensor, pixel_weight: Tensor | None, activation: str) -> None:
    check_logits(op, logits, activation)
    check_target(op, target, logits)
    if pixel_weight is not None:
        check(
            op,
            pixel_weight.dtype in FLOATS,
            f"pixel_weight must be of floating point, got {pixel_weight.dtype}",
        )
        check(op, pixel_weight.device == logits.device, f"pixel_weight must be on {logits.device} like logits")
        check_shape(op, "pixel_weight", pixel_weight, [logits.shape[0], *logits.shape[2:]])


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    activation: str,
    ignore_index: int | None,
    gamma: float,
    region: bool,
    pixel: bool,
    smoothing: bool,
) -> tuple[Tensor, Tensor]:
    _check_arguments("segmentation_statistics", logits, target, pixel_weight, activation)
    sums = logits.new_empty((logits.shape[0], logits.shape[1], len(COLUMNS)), dtype=torch.float64)
    return sums, empty_log_sum(logits, activation, target.dim() == logits.dim())


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    activation: str,
    ignore_index: int | None,
    gamma: float,
    region: bool,
    pixel: bool,
    smoothing: bool,
    log_sum: Tensor,
) -> Tensor:
    op = "_segmentation_statistics_backward"
    _check_arguments(op, logits, target, pixel_weight, activation)
    check_shape(op, "grad", grad, [logits.shape[0], logits.shape[1], len(COLUMNS)])
    check_log_sum(op, log_sum, logits)
    return empty_like_logits(logits)


torch.library.register_fake(_FORWARD, _fake_forward)
torch.library.register_fake(_BACKWARD, _fake_backward)


# ---- autograd ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, pixel_weight, *ctx.arguments = inputs
    ctx.set_materialize_grads(False)  # no map of zeros for log_sum
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, pixel_weight, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    *tensors, log_sum = ctx.saved_tensors
    of_logits = None if grad is None else _BACKWARD(grad, *tensors, *ctx.arguments, log_sum)
    return of_logits, *[None] * 8


def no_double_backward(op: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{op}: the gradient cannot be differentiated again")

    return backward


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, no_double_backward("segmentation_statistics"))
