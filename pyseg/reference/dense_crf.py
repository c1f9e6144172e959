"""Fully connected CRF by brute force over all pairs of pixels (Kraehenbuehl and Koltun 2011, 1210.5644)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pairwise_matrix(features: Tensor, normalization: str = "symmetric") -> Tensor:
    r"""K[i, j] = exp(-|f_i - f_j|^2 / 2) for features [d, P] or [N, d, P] in standard deviations; normalised, float64.

    With n = K 1: "before" K / n_j, "after" K / n_i, "symmetric" K / sqrt(n_i n_j). O(P^2) of memory.
    """
    points = features.double().mT
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    kernel = (-distances.square() / 2).exp()
    norm = kernel.sum(-1)
    if normalization == "before":
        return kernel / norm[..., None, :]
    if normalization == "after":
        return kernel / norm[..., :, None]
    if normalization == "symmetric":
        return kernel / (norm[..., None, :] * norm[..., :, None]).sqrt()
    return kernel


def pairwise_energy(marginals: Tensor, matrices: Sequence[Tensor], compatibility: Sequence[Tensor]) -> Tensor:
    """sum over kernels m and labels l' of compatibility_m[l, l'] sum_j K_m[i, j] Q_j(l'), for marginals [N, C, P]."""
    energy = torch.zeros_like(marginals)
    for matrix, costs in zip(matrices, compatibility, strict=True):
        energy = energy + costs.double() @ (marginals @ matrix.mT)
    return energy


def dense_crf(
    unary: Tensor,
    matrices: Sequence[Tensor],
    compatibility: Sequence[Tensor],
    *,
    iterations: int = 5,
    temperature: float = 1.0,
    initial: Tensor | None = None,
) -> Tensor:
    r"""Marginals [N, C, P] after n rounds of Q = softmax(-(U + sum_m mu_m K_m Q) / temperature) (algorithm 1).

    unary [N, C, P] energies; matrices [P, P] or [N, P, P], of `pairwise_matrix`; compatibility mu [C, C], costs. As in
    the authors' program a pixel is a neighbour of its own.
    """
    unary = unary.double()
    marginals = (-unary / temperature).softmax(1) if initial is None else initial.double()
    for _ in range(iterations):
        energy = unary + pairwise_energy(marginals, matrices, compatibility)
        marginals = (-energy / temperature).softmax(1)
    return marginals


def dense_crf_energy(
    unary: Tensor,
    marginals: Tensor,
    matrices: Sequence[Tensor],
    compatibility: Sequence[Tensor],
    *,
    temperature: float = 1.0,
) -> Tensor:
    """[N]: sum of Q U + 1/2 Q (sum_m mu_m K_m Q) + temperature Q log Q: D(Q || P) but for a constant (section 3)."""
    q = marginals.double()
    pairwise = pairwise_energy(q, matrices, compatibility)
    return (q * (unary.double() + pairwise / 2) + temperature * torch.xlogy(q, q)).sum((1, 2))
