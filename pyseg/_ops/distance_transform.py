"""Fake kernels and vmap of `pyseg::distance_transform` and `pyseg::distance_to_two_nearest_objects`.

Neither has a gradient: distances are piecewise constant in a mask or a label map.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels

_TRANSFORM = torch.ops.pyseg.distance_transform.default
_TWO_NEAREST = torch.ops.pyseg.distance_to_two_nearest_objects.default
_MODES = ("mask", "signed", "labels", "objects")


def _check_grid(op: str, name: str, tensor: Tensor, spacing: list[float]) -> None:
    dims = len(spacing)
    torch._check(
        dims in (2, 3), lambda: f"{op}: spacing must have an element for each of 2 or 3 axes, got {list(spacing)}"
    )
    torch._check(
        all(step > 0 and math.isfinite(step) for step in spacing),
        lambda: f"{op}: spacing must be positive and finite, got {list(spacing)}",
    )
    shape = "[*, H, W]" if dims == 2 else "[*, D, H, W]"
    torch._check(
        tensor.dim() >= dims, lambda: f"{op}: {name} must be {shape} for {dims} axes, got {list(tensor.shape)}"
    )


def _check_labels(op: str, name: str, tensor: Tensor) -> None:
    wrong = tensor.is_floating_point() or tensor.is_complex()
    torch._check(not wrong, lambda: f"{op}: {name} must be integers as labels, got {tensor.dtype}")


def _fake_transform(
    input: Tensor, spacing: list[float], mode: str, squared: bool, return_indices: bool, float64: bool
) -> tuple[Tensor, Tensor]:
    op = "distance_transform"
    torch._check(mode in _MODES, lambda: f"{op}: mode must be mask, signed, labels or objects, got {mode}")
    _check_grid(op, "input", input, spacing)
    if mode in ("labels", "objects"):
        _check_labels(op, "input", input)
    torch._check(
        not input.is_complex(), lambda: f"{op}: input must be bool, integers or real numbers, got {input.dtype}"
    )
    dims = len(spacing)
    batch = input.dim() - dims
    shape = [*input.shape[:batch], dims, *input.shape[batch:]] if return_indices else [0]
    return (
        input.new_empty(input.shape, dtype=torch.float64 if float64 else torch.float32),
        input.new_empty(shape, dtype=torch.int64),
    )


def _fake_two_nearest(labels: Tensor, spacing: list[float], squared: bool, float64: bool) -> tuple[Tensor, Tensor]:
    op = "distance_to_two_nearest_objects"
    _check_grid(op, "labels", labels, spacing)
    _check_labels(op, "labels", labels)
    dtype = torch.float64 if float64 else torch.float32
    return labels.new_empty(labels.shape, dtype=dtype), labels.new_empty(labels.shape, dtype=dtype)


torch.library.register_fake(_TRANSFORM, _fake_transform)
torch.library.register_fake(_TWO_NEAREST, _fake_two_nearest)


def _transform_batched(info: Any, in_dims: tuple[Any, ...], input: Tensor, *arguments: Any) -> Any:
    # The rank of one example: the batch of vmap must not pass for an axis of the image.
    _check_grid("distance_transform", "input", input.select(in_dims[0], 0), arguments[0])
    distances, indices = _TRANSFORM(input.movedim(in_dims[0], 0), *arguments)
    return (distances, indices), (0, 0 if indices.dim() > 1 else None)


def _two_nearest_batched(info: Any, in_dims: tuple[Any, ...], labels: Tensor, *arguments: Any) -> Any:
    _check_grid("distance_to_two_nearest_objects", "labels", labels.select(in_dims[0], 0), arguments[0])
    return _TWO_NEAREST(labels.movedim(in_dims[0], 0), *arguments), (0, 0)


torch.library.register_vmap(_TRANSFORM, _transform_batched)
torch.library.register_vmap(_TWO_NEAREST, _two_nearest_batched)
