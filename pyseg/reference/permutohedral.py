"""The permutohedral lattice from its definition: points one after the other, vertices in a dictionary."""

import itertools
import math

import torch
from torch import Tensor

Vertex = tuple[int, ...]


def permutohedral_simplices(features: Tensor, scale: float = 1.0) -> tuple[list[list[Vertex]], Tensor]:
    r"""The d + 1 vertices around each point and their barycentric weights (Adams, Baek, Davis 2010, sections 3, 4.1).

    features [d, P], in standard deviations. Returns for each point its vertices as tuples of d + 1 integers, the one of
    remainder r at place r, and the weights [P, d + 1] in float64, which `features` has a gradient through.
    """
    d, points = features.shape
    period = d + 1
    # The columns of E are orthogonal to (1, ..., 1) and to each other: column i has i + 1 ones and then -(i + 1).
    basis = torch.zeros(period, d, dtype=torch.float64)
    for i in range(d):
        basis[: i + 1, i] = 1
        basis[i + 1, i] = -(i + 1)
        basis[:, i] /= math.sqrt((i + 1) * (i + 2))
    elevated = (basis @ features.double().cpu()) * (scale * period * math.sqrt(2 / 3))  # [d + 1, P]
    vertices: list[list[Vertex]] = []
    weights = []
    for p in range(points):
        x = [float(c) for c in elevated[:, p].detach()]
        # The point of remainder zero by rounding each coordinate; those rounded the farthest give way until the sum is
        # zero, as the definition of the nearest vertex asks.
        base = [round(c / period) * period for c in x]
        order = sorted(range(period), key=lambda i: (base[i] - x[i], i))  # of x - base, descending
        rank = {coordinate: place for place, coordinate in enumerate(order)}
        surplus = sum(base) // period
        for i in range(period):
            rank[i] += surplus
            if rank[i] < 0:
                base[i] += period
                rank[i] += period
            elif rank[i] > d:
                base[i] -= period
                rank[i] -= period
        by_rank = sorted(range(period), key=lambda i: rank[i])
        offset = [(elevated[i, p] - base[i]) / period for i in by_rank]
        weight = [1 + offset[d] - offset[0]] + [offset[d - r] - offset[d - r + 1] for r in range(1, period)]
        weights.append(torch.stack(weight))
        vertices.append(
            [tuple(base[i] + (r if rank[i] <= d - r else r - period) for i in range(period)) for r in range(period)]
        )
    return vertices, torch.stack(weights) if weights else torch.zeros(0, period, dtype=torch.float64)


def permutohedral_filter(
    features: Tensor,
    values: Tensor,
    *,
    scale: float = 1.0,
    cutoff: float | None = None,
    variance: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    r"""Splat, blur, slice: out_i = sum_j w_ij (B S v)[vertex_ij], in float64.

    features [N, d, P], values [N, C, P]. Without `cutoff` B is the blur: along each of the d + 1 directions, in the
    opposite order where `reverse`, a vertex gains half of each of its two neighbours; then all is divided by
    1 + 2^-d. With `cutoff` B is exp(-r^2 / (2 variance)) between vertices at most that far apart, r in standard
    deviations.
    """
    outputs = []
    for f, v in zip(features, values, strict=True):
        d = f.shape[0]
        vertices, weight = permutohedral_simplices(f, scale)
        number = {vertex: i for i, vertex in enumerate(dict.fromkeys(itertools.chain(*vertices)))}
        index = torch.tensor([[number[vertex] for vertex in corners] for corners in vertices], dtype=torch.int64)
        index = index.reshape(f.shape[1], d + 1)
        contribution = (v.double().cpu().T[:, None] * weight[:, :, None]).flatten(0, 1)  # [P * (d + 1), C]
        lattice = torch.zeros(len(number), v.shape[0], dtype=torch.float64).index_add(0, index.flatten(), contribution)
        if cutoff is None:
            lattice = _blur(number, lattice, reverse)
        else:
            lattice = _kernel(number, lattice, d, scale, cutoff, variance)
        outputs.append((lattice[index] * weight[:, :, None]).sum(1).T)
    return torch.stack(outputs) if outputs else values.double()


def _blur(number: dict[Vertex, int], lattice: Tensor, reverse: bool) -> Tensor:
    period = len(next(iter(number), (0, 0)))
    for j in sorted(range(period), reverse=reverse):
        half = torch.zeros(len(number), len(number), dtype=torch.float64)
        for vertex, i in number.items():
            for sign in (1, -1):
                other = tuple(c + sign * (1 - period if k == j else 1) for k, c in enumerate(vertex))
                if other in number:
                    half[i, number[other]] = 0.5
        lattice = lattice + half @ lattice
    return lattice / (1 + 2.0 ** (1 - period))


def _kernel(number: dict[Vertex, int], lattice: Tensor, d: int, scale: float, cutoff: float, variance: float) -> Tensor:
    positions = torch.tensor(list(number), dtype=torch.float64).reshape(len(number), d + 1)
    squares = (positions[:, None] - positions[None]).square().sum(2) / (scale**2 * (d + 1) ** 2 * 2 / 3)
    return torch.where(squares <= cutoff**2, (-squares / (2 * variance)).exp(), 0) @ lattice
