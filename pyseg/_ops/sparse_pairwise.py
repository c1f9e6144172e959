"""Fake kernels, autograd and vmap of `pyseg::sparse_pairwise`, sums over the links of pixels.

With A the matrix of the weights w, row i column j, y = A v:

    dL/dv = A^T dL/dy            the operator on the transpose's rows
    dL/dw_k = <dL/dy_i, v_j>     `_sparse_pairwise_backward_weight`, bilinear too

whose own derivatives are the operator again: gradients of every order. Autocast changes nothing: 16-bit values are
widened within.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.permutohedral_lattice import wide_type
from pyseg._ops.segmentation_statistics import FLOATS, check, check_shape

_PAIRWISE = torch.ops.pyseg.sparse_pairwise.default
_BACKWARD_WEIGHT = torch.ops.pyseg._sparse_pairwise_backward_weight.default
_ADD = torch.ops.pyseg._sparse_pairwise_add.default
_ROWS = 5  # tensors


def _check_values(op: str, name: str, values: Tensor) -> None:
    check(op, values.dtype in FLOATS, f"{name} must be float32, float64, float16 or bfloat16, got {values.dtype}")
    check(op, values.dim() == 3, f"{name} must be [N, C, P], got {list(values.shape)}")


def _check_rows(op: str, values: Tensor, length: Any, starts: Tensor, columns: Tensor, prefix: str) -> None:
    images, _, points = values.shape
    check_shape(op, prefix + "starts", starts, [images * points + 1])
    check_shape(op, "columns" if prefix == "row_" else prefix + "columns", columns, [length])


def _check_weights(op: str, values: Tensor, weights: Tensor) -> None:
    expected = wide_type(values.dtype)
    check(op, weights.dim() == 1, f"weights must be [L], got {list(weights.shape)}")
    check(op, weights.dtype == expected, f"weights must be {expected}, got {weights.dtype}")


def _empty_like(values: Tensor) -> Tensor:
    """In the layout that the kernels return: channels or pixels side by side."""
    turned = values.mT
    if not values.is_contiguous() and turned.is_contiguous():
        return values.new_empty(turned.shape).mT
    return values.new_empty(values.shape)


def _fake_pairwise(
    values: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    transpose_starts: Tensor,
    transpose_columns: Tensor,
    transpose_entries: Tensor,
    transpose: bool,
) -> Tensor:
    op = "sparse_pairwise"
    _check_values(op, "values", values)
    _check_weights(op, values, weights)
    _check_rows(op, values, weights.shape[0], row_starts, columns, "row_")
    _check_rows(op, values, weights.shape[0], transpose_starts, transpose_columns, "transpose_")
    check_shape(op, "transpose_entries", transpose_entries, [weights.shape[0]])
    return _empty_like(values)


def _fake_backward_weight(
    left: Tensor,
    right: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    transpose_starts: Tensor,
    transpose_columns: Tensor,
    transpose_entries: Tensor,
) -> Tensor:
    op = "_sparse_pairwise_backward_weight"
    _check_values(op, "left", left)
    check_shape(op, "right", right, list(left.shape))
    _check_rows(op, left, columns.shape[0], row_starts, columns, "row_")
    return left.new_empty(columns.shape, dtype=wide_type(left.dtype))


def _fake_add(
    base: Tensor, factor: Tensor, values: Tensor, weights: Tensor, row_starts: Tensor, columns: Tensor
) -> Tensor:
    op = "_sparse_pairwise_add"
    _check_values(op, "values", values)
    check_shape(op, "base", base, list(values.shape))
    check_shape(op, "factor", factor, [values.shape[1]])
    _check_weights(op, values, weights)
    _check_rows(op, values, weights.shape[0], row_starts, columns, "row_")
    return _empty_like(values)


torch.library.register_fake(_PAIRWISE, _fake_pairwise)
torch.library.register_fake(_BACKWARD_WEIGHT, _fake_backward_weight)
torch.library.register_fake(_ADD, _fake_add)


# ---- autograd ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, weights, *rows, ctx.transpose = inputs
    needs_values, needs_weights, *_ = ctx.needs_input_grad
    ctx.save_for_backward(values if needs_weights else None, weights if needs_values else None, *rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, weights, *rows = ctx.saved_tensors
    needs_values, needs_weights, *_ = ctx.needs_input_grad
    pair = (values, grad) if ctx.transpose else (grad, values)  # at the row, at the column
    return (
        _PAIRWISE(grad, weights, *rows, not ctx.transpose) if needs_values else None,
        _BACKWARD_WEIGHT(*pair, *rows) if needs_weights else None,
        *[None] * (_ROWS + 1),
    )


def _setup_context_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_weight(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    left, right, *rows = ctx.saved_tensors
    needs_left, needs_right, *_ = ctx.needs_input_grad
    return (
        _PAIRWISE(right, grad, *rows, False) if needs_left else None,
        _PAIRWISE(left, grad, *rows, True) if needs_right else None,
        *[None] * _ROWS,
    )


def _no_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError("_sparse_pairwise_add: it has no gradient, sparse_pairwise does")


torch.library.register_autograd(_PAIRWISE, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD_WEIGHT, _backward_weight, setup_context=_setup_context_weight)
torch.library.register_autograd(_ADD, _no_gradient)


def _batched(info: Any, in_dims: tuple[Any, ...], values: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    """Many values on the same links are channels of it."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        raise RuntimeError("sparse_pairwise: vmap must be over values alone, links are those of a whole batch")
    values = values.movedim(in_dims[0], 1)  # [N, B, C, P]
    return _PAIRWISE(values.flatten(1, 2), *arguments).unflatten(1, values.shape[1:3]), 1


torch.library.register_vmap(_PAIRWISE, _batched)
