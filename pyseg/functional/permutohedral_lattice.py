"""High-dimensional Gaussian filtering on the permutohedral lattice."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyseg._ops import permutohedral_filter as _filter_op  # noqa: F401  registers the fake kernels
from pyseg._ops import permutohedral_lattice as _lattice_op  # noqa: F401
from pyseg._ops.forward_mode import refuse_tangents

Accuracy = Literal["fast", "high"]


class Level(NamedTuple):
    """How the filter of a level is computed; the product between vertices in standard deviations of the Gaussian."""

    scale: float  # of the lattice
    cutoff: float | None = None  # reach of the product between vertices; None: blur passes
    variance: float = 1.0  # of that product


# Splatting and slicing widen a kernel by 1 / (4 scale^2), cutting it off narrows it: a variance of 1 - 1 / (4 scale^2)
# and a tenth more has the least error with this reach (docs/dense_crf.md).
LEVELS = {"fast": Level(1.0), "high": Level(1.2, 2.42, 1.1 * (1 - 1 / (4 * 1.2**2)))}


class PermutohedralLattice(NamedTuple):
    """What `permutohedral_lattice` builds; the tensors of `torch.ops.pyseg.permutohedral_filter` in their order.

    For N images of P points in d dimensions, and M vertices of all images:
    """

    vertex: Tensor
    """[N, P, d + 1] int32: the vertices around a point; -1 where it is left out (CUDA: features out of range)."""
    weight: Tensor
    """[N, P, d + 1] float32 or float64: their barycentric weights, the only differentiable part."""
    row: Tensor
    """[M + 1] int32 (CUDA; empty on the CPU): where the entries of each vertex begin."""
    entry: Tensor
    """[N * P * (d + 1)] int32 (CUDA; empty on the CPU): positions in `weight`, by vertex."""
    neighbour: Tensor
    """[d + 1, M, 2] int32: the next vertices along each direction, -1 for none."""
    offset: Tensor
    """[N + 1] int64: the first vertex of each image, and their number."""
    kernel_row: Tensor
    """[M + 1] int64 (accuracy "high", else empty): compressed rows of the product between vertices."""
    kernel_vertex: Tensor
    """[entries] int32."""
    kernel_weight: Tensor
    """[entries] like `weight`."""
    key: Tensor
    """[M, d] int16: the coordinates of each vertex but the last, which is minus their sum."""


def permutohedral_lattice(
    features: Tensor, accuracy: Accuracy = "fast", *, max_vertices: int | None = None
) -> PermutohedralLattice:
    r"""Builds the lattice on which `permutohedral_filter` computes Gaussian filters over points in d dimensions.

    Every point lies in a simplex of d + 1 vertices of the lattice A*_d, and gets barycentric weights for them (Adams,
    Baek, Davis 2010, Fast High-Dimensional Filtering Using the Permutohedral Lattice, sections 3 and 4.1). A lattice
    depends on the features alone: build it once and filter with it as often as needed.

    Args:
        features: [N, d, *S], or the points of one image as [P, d]; d from 1 to 8. In standard deviations of the
            Gaussian: (x / 80, y / 80, r / 13, g / 13, b / 13). Any floating type; 16-bit ones are widened to float32.
        accuracy: "fast": blur along the d + 1 directions as in the paper. "high": a lattice finer by 1.2, and in
            place of the blur one sparse product with the exact Gaussian between vertices up to 2.42 standard deviations
            apart: about half the error, at several times the cost.
        max_vertices: the size M of results that do not depend on the data, padded; without it M is the number of
            vertices, which costs one synchronisation on CUDA. More vertices than that are an error on the CPU; on CUDA
            those beyond are left out, and `offset[-1]` says how many there were.

    Returns:
        A `PermutohedralLattice`, a pytree of tensors.

    Gradients reach the features through the weights: piecewise constant ones, as the filter is piecewise linear. The
    same bits for every number of threads; O(N P d^2) time; coordinates of vertices are packed whole into keys of 64 or
    128 bits.

    Raises:
        RuntimeError: wrong shape, dtype or accuracy; on the CPU features that are not finite or beyond about 10^4
            standard deviations, where coordinates of vertices leave 16 bits.
    """
    op = "permutohedral_lattice"
    refuse_tangents(op, features)
    if accuracy not in LEVELS:
        raise RuntimeError(f"{op}: accuracy must be fast or high, got {accuracy}")
    if features.dim() < 2:
        raise RuntimeError(f"{op}: features must be [N, d, *S] or [P, d], got {list(features.shape)}")
    points = features.mT[None] if features.dim() == 2 else features.flatten(2)
    scale, cutoff, variance = LEVELS[accuracy]
    vertex, weight, row, entry, neighbour, offset, key = torch.ops.pyseg.permutohedral_lattice(
        points, scale, -1 if max_vertices is None else max_vertices
    )
    if cutoff is None:
        kernel = (offset.new_empty(0), vertex.new_empty(0), weight.new_empty(0))
    else:
        float64 = weight.dtype == torch.float64
        kernel = torch.ops.pyseg.permutohedral_vertex_kernel(key, offset, scale, cutoff, variance, float64)
    return PermutohedralLattice(vertex, weight, row, entry, neighbour, offset, *kernel, key)


def permutohedral_filter(lattice: PermutohedralLattice, values: Tensor, *, transpose: bool = False) -> Tensor:
    r"""Gaussian filter of values at the lattice's points, not normalised: out_i = sum over j of k(f_i, f_j) v_j.

    k approximates exp(-|f_i - f_j|^2 / 2): values are splatted to the vertices, blurred there and interpolated back
    (Adams, Baek, Davis 2010, section 4). For weights that sum to one divide by the filter of ones.

    Args:
        lattice: of `permutohedral_lattice`.
        values: [N, C, *S] with as many elements in S as the lattice has points, or [P, C] for one image. Any floating
            type whose computing type (float64 for float64, else float32) is that of the lattice.
        transpose: the transposed filter, whose blur takes the directions in the opposite order ("fast").

    Returns:
        Like `values`.

    Gradients with respect to the values (the transposed filter, any order) and, once, to the lattice's weights and so
    to its features. The same bits for every number of threads, and on CUDA in every run: no atomics. O(N (P + M) C d)
    time ("fast").

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.
    """
    op = "permutohedral_filter"
    refuse_tangents(op, values, lattice.weight)
    if values.dim() < 2:
        raise RuntimeError(f"{op}: values must be [N, C, *S] or [P, C], got {list(values.shape)}")
    points = values.mT[None] if values.dim() == 2 else values.flatten(2)
    filtered: Tensor = torch.ops.pyseg.permutohedral_filter(points, *lattice[:9], transpose)
    return filtered[0].mT if values.dim() == 2 else filtered.reshape(values.shape)
