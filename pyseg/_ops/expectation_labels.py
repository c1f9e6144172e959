"""Fake kernel and vmap of `pyseg::expectation_labels`. A choice of labels has no gradient, and no bias is given one.

Autocast changes nothing: 16-bit logits are read as they are and compared in float32.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.batched import register_vmap
from pyseg._ops.segmentation_statistics import check, check_logits, check_shape, wide_dtype

_OP = torch.ops.pyseg.expectation_labels.default
MOST_CLASSES = 2048
_NAME = "expectation_labels"


def _fake(
    logits: Tensor,
    present: Tensor,
    valid: Tensor | None,
    background_bias: float,
    foreground_bias: float,
    background_share: float,
    foreground_share: float,
    exclude_absent: bool,
    sweeps: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    check_logits(_NAME, logits, "none")
    n, classes, *size = logits.shape
    check(
        _NAME,
        1 <= classes <= MOST_CLASSES,
        f"logits must have 1 to {MOST_CLASSES} classes, got {list(logits.shape)}",
    )
    for name, mask, shape in (("present", present, [n, classes]), ("valid", valid, [n, *size])):
        if mask is not None:
            check(_NAME, mask.dtype == torch.bool, f"{name} must be bool, got {mask.dtype}")
            check(_NAME, mask.device == logits.device, f"{name} must be on the device of logits")
            check_shape(_NAME, name, mask, shape)
    for name, value, most in (
        ("background_bias", background_bias, 1e30),
        ("foreground_bias", foreground_bias, 1e30),
        ("background_share", background_share, 1),
        ("foreground_share", foreground_share, 1),
    ):
        check(_NAME, 0 <= value <= most, f"{name} must be from 0 to {most:g}, got {value}")
    check(_NAME, sweeps >= 0, f"sweeps must be at least 0, got {sweeps}")
    return (
        logits.new_empty([n, *size], dtype=torch.int64),
        logits.new_empty([n, classes], dtype=wide_dtype(logits)),
    )


torch.library.register_fake(_OP, _fake)


# ---- autograd: the bias is a float, but a constant ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
    return (None,) * 10


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


# ---- vmap ----


def _batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """The examples of vmap are further images."""
    tensors = [
        None if t is None else t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(arguments[:3], in_dims[:3], strict=True)
    ]
    results = _OP(*(None if t is None else t.flatten(0, 1) for t in tensors), *arguments[3:])
    return tuple(each.reshape(info.batch_size, len(each) // info.batch_size, *each.shape[1:]) for each in results), (
        0,
        0,
    )


register_vmap(_OP, _batched)
