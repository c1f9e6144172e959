"""Fake kernel, autograd and vmap of `pyseg::gaussian_filter`, which is its own transpose: derivatives of every order.

Autocast changes nothing: 16-bit values are computed with in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pyseg._ops.segmentation_statistics import FLOATS, check

_FILTER = torch.ops.pyseg.gaussian_filter.default


def _fake(values: Tensor, sigma: list[float], truncate: float, normalize: bool) -> Tensor:
    op, got = "gaussian_filter", list(values.shape)
    check(op, values.dtype in FLOATS, f"values must be float32, float64, float16 or bfloat16, got {values.dtype}")
    check(op, 3 <= values.dim() <= 5, f"values must be [N, C, *S] with S of 1 to 3 axes, got {got}")
    check(
        op,
        len(sigma) == values.dim() - 2,
        f"sigma must have an element for each of the {values.dim() - 2} axes of values, got {list(sigma)}",
    )
    for s in sigma:
        check(op, 0 <= s < math.inf, f"sigma must be finite and not negative, got {s}")
    check(op, 0 < truncate < math.inf, f"truncate must be positive and finite, got {truncate}")
    return values.new_empty(values.shape)


torch.library.register_fake(_FILTER, _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _FILTER(grad, *ctx.arguments), None, None, None


torch.library.register_autograd(_FILTER, _backward, setup_context=_setup_context)


def _batched(info: Any, in_dims: tuple[Any, ...], values: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    values = values.movedim(in_dims[0], 0)
    batch = values.shape[:2]
    return _FILTER(values.flatten(0, 1), *arguments).unflatten(0, batch), 0


torch.library.register_vmap(_FILTER, _batched)
