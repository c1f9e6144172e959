"""Fake kernels, autograd and vmap of `pyseg::permutohedral_filter`.

    y = W B W^T v,   W [P, M] with d + 1 weights a row, B the blur (or a symmetric kernel) between the M vertices

so dL/dv = W B^T W^T dL/dy: the same filter, its blur in the opposite order. The weights' gradient, in which they occur
on both sides, is an operator of its own. Autocast changes nothing: 16-bit values are widened within.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg._ops.permutohedral_lattice import wide_type
from pyseg._ops.segmentation_statistics import FLOATS, check, check_shape, no_double_backward

_FILTER = torch.ops.pyseg.permutohedral_filter.default
_BACKWARD_WEIGHT = torch.ops.pyseg._permutohedral_filter_backward_weight.default
_LATTICE = 9  # tensors


def check_lattice(op: str, lattice: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """What traced code can check of vertex, weight, row, entry, neighbour, offset and the kernel's three."""
    vertex, weight = lattice[:2]
    check(op, vertex.dim() == 3, f"vertex must be [N, P, d + 1], got {list(vertex.shape)}")
    check_shape(op, "weight", weight, list(vertex.shape))
    check(op, weight.dtype == wide_type(dtype), f"weight must be {wide_type(dtype)}, got {weight.dtype}")


def _check(op: str, name: str, values: Tensor, lattice: tuple[Tensor, ...]) -> None:
    check(op, values.dtype in FLOATS, f"{name} must be float32, float64, float16 or bfloat16, got {values.dtype}")
    check_lattice(op, lattice, values.dtype)
    images, points, _ = lattice[0].shape
    message = f"{name} must be [{images}, C, {points}], got {list(values.shape)}"
    check(op, values.dim() == 3, message)
    check(op, values.shape[0] == images, message)
    check(op, values.shape[2] == points, message)


def _fake_filter(
    values: Tensor,
    vertex: Tensor,
    weight: Tensor,
    row: Tensor,
    entry: Tensor,
    neighbour: Tensor,
    offset: Tensor,
    kernel_row: Tensor,
    kernel_vertex: Tensor,
    kernel_weight: Tensor,
    reverse: bool,
) -> Tensor:
    lattice = (vertex, weight, row, entry, neighbour, offset, kernel_row, kernel_vertex, kernel_weight)
    _check("permutohedral_filter", "values", values, lattice)
    return values.new_empty(values.shape)


def _fake_backward_weight(
    grad: Tensor,
    values: Tensor,
    vertex: Tensor,
    weight: Tensor,
    row: Tensor,
    entry: Tensor,
    neighbour: Tensor,
    offset: Tensor,
    kernel_row: Tensor,
    kernel_vertex: Tensor,
    kernel_weight: Tensor,
    reverse: bool,
) -> Tensor:
    lattice = (vertex, weight, row, entry, neighbour, offset, kernel_row, kernel_vertex, kernel_weight)
    op = "_permutohedral_filter_backward_weight"
    _check(op, "values", values, lattice)
    check_shape(op, "grad", grad, list(values.shape))
    return weight.new_empty(weight.shape)


torch.library.register_fake(_FILTER, _fake_filter)
torch.library.register_fake(_BACKWARD_WEIGHT, _fake_backward_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, *lattice, ctx.reverse = inputs
    needs_weight = ctx.needs_input_grad[2]
    ctx.save_for_backward(values if needs_weight else None, *lattice)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, *lattice = ctx.saved_tensors
    needs_values, _, needs_weight, *_ = ctx.needs_input_grad
    return (
        _FILTER(grad, *lattice, not ctx.reverse) if needs_values else None,
        None,
        _BACKWARD_WEIGHT(grad, values, *lattice, ctx.reverse) if needs_weight else None,
        *[None] * (_LATTICE - 2 + 1),
    )


torch.library.register_autograd(_FILTER, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD_WEIGHT, no_double_backward("permutohedral_filter"))


def _batched(info: Any, in_dims: tuple[Any, ...], values: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    """Many values on one lattice are channels of it."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        raise RuntimeError("permutohedral_filter: vmap must be over values alone, lattices have a batch of their own")
    values = values.movedim(in_dims[0], 1)  # [N, B, C, P]
    return _FILTER(values.flatten(1, 2), *arguments).unflatten(1, values.shape[1:3]), 1


torch.library.register_vmap(_FILTER, _batched)
