"""Fake kernel and autograd of `pyseg::_mean_field`: all iterations of a dense CRF.

Without iterations it is softmax(-unary / temperature), unlike torch's with the same bits for every number of threads,
and that has a gradient. pyseg/functional/dense_crf.py makes differentiable iterations of it and the filters.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg._ops.permutohedral_filter import check_lattice
from pyseg._ops.segmentation_statistics import FLOATS, check, check_shape

_MEAN_FIELD = torch.ops.pyseg._mean_field.default
TENSORS_OF_LATTICE = 9


def _fake(
    unary: Tensor,
    initial: Tensor | None,
    iterations: int,
    temperature: float,
    lattices: list[Tensor],
    sigmas: list[float],
    truncate: float,
    coarse: bool,
    scale_in: list[Tensor],
    scale_out: list[Tensor],
    compatibility: list[Tensor],
) -> Tensor:
    op, got = "_mean_field", list(unary.shape)
    check(op, unary.dtype in FLOATS, f"unary must be float32, float64, float16 or bfloat16, got {unary.dtype}")
    check(op, 3 <= unary.dim() <= 5, f"unary must be [N, C, *S] with S of 1 to 3 axes, got {got}")
    if initial is not None:
        check_shape(op, "initial", initial, got)
    check(op, iterations >= 0, f"iterations must not be negative, got {iterations}")
    check(op, 1e-30 <= temperature <= 1e30, f"temperature must be from 1e-30 to 1e30, got {temperature}")
    check(op, len(lattices) % TENSORS_OF_LATTICE == 0, f"lattices must be 9 tensors each, got {len(lattices)}")
    axes = unary.dim() - 2
    check(op, len(sigmas) % axes == 0, f"sigmas must be {axes} for each kernel, got {len(sigmas)}")
    for first in range(0, len(lattices), TENSORS_OF_LATTICE):
        check_lattice(op, tuple(lattices[first : first + TENSORS_OF_LATTICE]), unary.dtype)
    kernels = len(lattices) // TENSORS_OF_LATTICE + len(sigmas) // axes
    lengths = [len(scale_in), len(scale_out), len(compatibility)]
    check(
        op,
        lengths == [kernels] * 3,
        f"scale_in, scale_out and compatibility must have an element for each of {kernels} kernels, got {lengths}",
    )
    return unary.new_empty(unary.shape)


torch.library.register_fake(_MEAN_FIELD, _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, initial, iterations, ctx.temperature, *_ = inputs
    ctx.differentiable = initial is None and iterations == 0
    ctx.no_gradients = [[None] * len(argument) if isinstance(argument, list) else None for argument in inputs[1:]]
    ctx.save_for_backward(output if ctx.differentiable else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if not ctx.differentiable:
        raise RuntimeError("_mean_field: iterations have no gradient, dense_crf's differentiable ones do")
    (marginals,) = ctx.saved_tensors
    weighted = grad * marginals
    return (marginals * weighted.sum(1, keepdim=True) - weighted) / ctx.temperature, *ctx.no_gradients


torch.library.register_autograd(_MEAN_FIELD, _backward, setup_context=_setup_context)
