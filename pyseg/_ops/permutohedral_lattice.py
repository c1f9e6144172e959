"""Fake kernels and autograd of `pyseg::permutohedral_lattice` and `pyseg::permutohedral_vertex_kernel`.

The number of vertices is data: in traced code it is a size of its own, unless max_vertices gives it. Of the results
only the weights have a gradient, which is piecewise constant in the features (Adams, Baek, Davis 2010, section 4.1:
barycentric coordinates are linear within a simplex). Autocast changes nothing: 16-bit features are widened.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg._ops.segmentation_statistics import FLOATS, check, check_shape, no_double_backward

_LATTICE = torch.ops.pyseg.permutohedral_lattice.default
_BACKWARD = torch.ops.pyseg._permutohedral_lattice_backward.default
_KERNEL = torch.ops.pyseg.permutohedral_vertex_kernel.default
MOST_FEATURES = 8


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """What values of this type are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_features(op: str, features: Tensor, scale: float) -> None:
    got = list(features.shape)
    message = f"features must be [N, d, P] with d from 1 to {MOST_FEATURES}, got {got}"
    check(op, features.dtype in FLOATS, f"features must be float32, float64, float16 or bfloat16, got {features.dtype}")
    check(op, features.dim() == 3, message)
    check(op, features.shape[1] >= 1, message)
    check(op, features.shape[1] <= MOST_FEATURES, message)
    check(op, 0 < scale < float("inf"), f"scale must be positive and finite, got {scale}")


def _fake_lattice(
    features: Tensor, scale: float, max_vertices: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "permutohedral_lattice"
    _check_features(op, features, scale)
    check(op, max_vertices >= -1, f"max_vertices must be -1 or from 0 to 2^31 - 1, got {max_vertices}")
    images, d, points = features.shape
    vertices: Any = max_vertices
    if max_vertices < 0:
        vertices = torch.library.get_ctx().new_dynamic_size()
    rows = features.device.type == "cuda"

    def integers(*shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return features.new_empty(shape, dtype=dtype)

    return (
        integers(images, points, d + 1),
        features.new_empty((images, points, d + 1), dtype=wide_type(features.dtype)),
        integers(vertices + 1 if rows else 0),
        integers(images * points * (d + 1) if rows else 0),
        integers(d + 1, vertices, 2),
        integers(images + 1, dtype=torch.int64),
        integers(vertices, d, dtype=torch.int16),
    )


def _fake_backward(grad_weight: Tensor, features: Tensor, scale: float) -> Tensor:
    op = "_permutohedral_lattice_backward"
    _check_features(op, features, scale)
    images, d, points = features.shape
    check_shape(op, "grad_weight", grad_weight, [images, points, d + 1])
    return features.new_empty((images, d, points))


def _fake_kernel(
    key: Tensor, offset: Tensor, scale: float, cutoff: float, variance: float, float64: bool
) -> tuple[Tensor, Tensor, Tensor]:
    op = "permutohedral_vertex_kernel"
    check(op, key.dim() == 2, f"key must be [M, d], got {list(key.shape)}")
    check(op, scale > 0.5, f"scale must be above 1/2 and finite, got {scale}")
    check(op, 0 < cutoff < 1e4, f"cutoff must be from 0 to 10000, got {cutoff}")
    check(op, 0 < variance < float("inf"), f"variance must be positive and finite, got {variance}")
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        key.new_empty((key.shape[0] + 1,), dtype=torch.int64),
        key.new_empty((entries,), dtype=torch.int32),
        key.new_empty((entries,), dtype=torch.float64 if float64 else torch.float32),
    )


torch.library.register_fake(_LATTICE, _fake_lattice)
torch.library.register_fake(_BACKWARD, _fake_backward)
torch.library.register_fake(_KERNEL, _fake_kernel)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, ctx.scale, _ = inputs
    ctx.save_for_backward(features)
    ctx.set_materialize_grads(False)  # all others are of integers


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    (features,) = ctx.saved_tensors
    return None if grads[1] is None else _BACKWARD(grads[1], features, ctx.scale), None, None


torch.library.register_autograd(_LATTICE, _backward, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, no_double_backward("permutohedral_lattice"))


def _batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    # Each example would have a number of vertices of its own.
    raise RuntimeError("permutohedral_lattice: vmap must not be over features, which have a batch of their own")


torch.library.register_vmap(_LATTICE, _batched)
