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
) -> Tensor:
    _check_arguments("segmentation_statistics", logits, target, pixel_weight, activation)
    return logits.new_empty((logits.shape[0], logits.shape[1], len(COLUMNS)), dtype=torch.float64)


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
) -> Tensor:
    op = "_segmentation_statistics_backward"
    _check_arguments(op, logits, target, pixel_weight, activation)
    check_shape(op, "grad", grad, [logits.shape[0], logits.shape[1], len(COLUMNS)])
    return empty_like_logits(logits)


torch.library.register_fake(_FORWARD, _fake_forward)
torch.library.register_fake(_BACKWARD, _fake_backward)


# ---- autograd ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, pixel_weight, *ctx.arguments = inputs
    ctx.save_for_backward(logits, target, pixel_weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _BACKWARD(grad, *ctx.saved_tensors, *ctx.arguments), *[None] * 8


def no_double_backward(op: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{op}: the gradient cannot be differentiated again")

    return backward


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, no_double_backward("segmentation_statistics"))
