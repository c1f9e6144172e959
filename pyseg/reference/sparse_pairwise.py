"""Sums over links from their definition, by dense matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor


def link_matrix(first: Tensor, second: Tensor, shape: Sequence[int], weights: Tensor | None = None) -> Tensor:
    """Symmetric [R, R] float64 of pairs of pixels [K, 1 + axes] (image, *position) in images (N, *S) of R pixels.

    W[i, j] = W[j, i] = the sum of the weights [K] of all pairs of i and j; nothing on the diagonal. O(R^2) of memory.
    """
    sizes = torch.tensor(shape)
    place = torch.arange(int(sizes.prod())).reshape(*shape)
    matrix = torch.zeros(place.numel(), place.numel(), dtype=torch.float64)
    for k, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        i, j = place[tuple(a)], place[tuple(b)]
        if i != j:
            weight = 1.0 if weights is None else weights[k].double()
            matrix[i, j] = matrix[i, j] + weight
            matrix[j, i] = matrix[j, i] + weight
    return matrix


def sparse_pairwise(values: Tensor, row_starts: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """out_i = sum over the entries k of row i of w_k v_{columns_k}, values [N, C, P] with rows n * P + p; float64."""
    images, channels, points = values.shape
    pixels = torch.arange(images * points)
    rows = pixels.repeat_interleave(row_starts.diff())
    matrix = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
    matrix = matrix.index_put((rows, columns.long()), weights.double(), accumulate=True)
    summed = matrix @ values.double().movedim(1, 2).flatten(0, 1)
    return summed.reshape(images, points, channels).movedim(2, 1)


def multi_view_crf(
    unary: Tensor,
    matrices: Sequence[Tensor],
    compatibility: Sequence[Tensor],
    *,
    iterations: int = 5,
    temperature: float = 1.0,
) -> Tensor:
    r"""Marginals [M, C, P] after n rounds of Q = softmax(-(U + sum_m mu_m K_m Q) / temperature) over all views at once.

    unary [M, C, P] energies of M views; matrices [M P, M P], the kernels between all pixels of all views (within
    a view: blocks on the diagonal); compatibility mu [C, C], costs.
    """
    views, classes, points = unary.shape
    wide = unary.double()
    marginals = (-wide / temperature).softmax(1)
    for _ in range(iterations):
        energy = wide
        flat = marginals.movedim(1, 2).flatten(0, 1)
        for matrix, costs in zip(matrices, compatibility, strict=True):
            message = matrix.double() @ flat @ costs.double().T
            energy = energy + message.reshape(views, points, classes).movedim(2, 1)
        marginals = (-energy / temperature).softmax(1)
    return marginals
