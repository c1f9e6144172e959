"""Decompositions of the dense CRF: iterations, sums over links, the filter on a lattice that is already built."""

import torch
from torch import Tensor

from pyseg._ops.mean_field import TENSORS_OF_LATTICE
from pyseg._ops.segmentation_statistics import wide_dtype
from pyseg.export.table import cannot, decomposes, replaces


@decomposes("_mean_field")
def _mean_field(
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
    """Softmax and filters, one iteration after the other; always on the whole grid, also where `coarse`."""
    wide, axes = wide_dtype(unary), unary.dim() - 2
    energies = unary.to(wide)
    filters = len(lattices) // TENSORS_OF_LATTICE

    def filtered(kernel: int, values: Tensor) -> Tensor:
        if kernel < filters:
            lattice = lattices[kernel * TENSORS_OF_LATTICE : (kernel + 1) * TENSORS_OF_LATTICE]
            flat: Tensor = torch.ops.pyseg.permutohedral_filter(values.flatten(2), *lattice, False)
            return flat.reshape(values.shape)
        sigma = sigmas[(kernel - filters) * axes : (kernel - filters + 1) * axes]
        return torch.ops.pyseg.gaussian_filter(values, sigma, truncate, False)

    def scaled(values: Tensor, scale: Tensor) -> Tensor:
        if scale.dim() == 1:  # [0]: none
            return values
        return values * scale.reshape(scale.shape[0], 1, *values.shape[2:])

    def softmax(energy: Tensor) -> Tensor:
        return (energy / -temperature).softmax(1)

    marginals = softmax(energies) if initial is None else initial.to(wide)
    for _ in range(iterations):
        energy = energies
        for kernel, costs in enumerate(compatibility):
            message = scaled(filtered(kernel, scaled(marginals, scale_in[kernel])), scale_out[kernel])
            if costs.dim() == 1:
                energy = energy + message * costs.view(-1, *[1] * axes)
            else:
                energy = energy + (costs @ message.flatten(2)).reshape(message.shape)
        marginals = softmax(energy)
    return marginals.to(unary.dtype)


@decomposes("permutohedral_filter")
def permutohedral_filter(
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
    """Splat by a scatter, blur by gathers, slice by a gather. Element M of the table stands for no vertex, and is 0."""
    if kernel_row.shape[0] != 0:
        raise cannot("permutohedral_filter", 'accuracy "high" needs a sparse product: use "fast" or "exact"')
    images, points, corners = vertex.shape
    channels, vertices = values.shape[1], neighbour.shape[1]
    weight = weight.reshape(images * points, corners, 1)
    index = vertex.long().reshape(images * points, corners)
    flat = values.to(weight.dtype).movedim(1, 2).reshape(images * points, 1, channels)
    table = weight.new_zeros((vertices + 1, channels))
    table = table.scatter_add(0, index.reshape(-1, 1).expand(-1, channels), (flat * weight).flatten(0, 1))
    none = neighbour.new_full((1, 2), -1)
    order = range(corners - 1, -1, -1) if reverse else range(corners)
    for direction in order:
        beside = torch.cat([neighbour[direction], none]).long()
        beside = torch.where(beside < 0, vertices, beside)
        table = table + 0.5 * (table[beside[:, 0]] + table[beside[:, 1]])
    sliced = (table[index] * weight).sum(1) / (1 + 2.0 ** (1 - corners))
    return sliced.reshape(images, points, channels).movedim(2, 1).to(values.dtype)


@decomposes("permutohedral_vertex_kernel")
def permutohedral_vertex_kernel(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """Raises: there is no such thing."""
    raise cannot("permutohedral_lattice", 'accuracy "high" needs a sparse product: use "fast" or "exact"')


def _rows_of(ends: Tensor, length: int) -> Tensor:
    """[length]: the number of rows that have ended before each element."""
    ended = ends.new_zeros(length + 1).scatter_add(0, ends, torch.ones_like(ends))
    return ended.cumsum(0)[:-1]


@replaces(torch.ops.aten.repeat_interleave.self_Tensor)
def repeat_interleave(
    input: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    """The rows of links; ONNX's exporter has no form of it with a known size."""
    if output_size is None or input.dim() != 1 or repeats.dim() != 1:
        return NotImplemented
    return input[_rows_of(repeats.cumsum(0), output_size)]


@replaces(torch.ops.aten.cdist.default)
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """What accuracy "exact" measures distances with; ONNX's exporter has no form of it."""
    if p != 2:
        return NotImplemented
    return (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1).sqrt()


@decomposes("sparse_pairwise")
def sparse_pairwise(
    values: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    transpose_starts: Tensor,
    transpose_columns: Tensor,
    transpose_entries: Tensor,
    transpose: bool,
) -> Tensor:
    """A gather at one end of each link and a scatter to the other, in the transpose's order, which names both ends."""
    entries = transpose_entries.long()
    rows, others = transpose_columns.long(), columns.long()[entries]
    return _summed(values, weights[entries], *((others, rows) if transpose else (rows, others)))


@decomposes("_sparse_pairwise_add")
def _sparse_pairwise_add(
    base: Tensor, factor: Tensor, values: Tensor, weights: Tensor, row_starts: Tensor, columns: Tensor
) -> Tensor:
    """The same by rows."""
    message = _summed(values, weights, _rows_of(row_starts[1:], columns.shape[0]), columns.long())
    return base + (message.to(factor.dtype) * factor.view(-1, 1)).to(base.dtype)


def _summed(values: Tensor, weights: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """[N, C, P]: weights times the values of pixels `of`, added up in pixels `to`."""
    images, channels, points = values.shape
    rows = values.to(weights.dtype).movedim(1, 2).reshape(images * points, channels)
    terms = rows[of] * weights.unsqueeze(1)
    total = torch.zeros_like(rows).scatter_add(0, to.unsqueeze(1).expand(-1, channels), terms)
    return total.reshape(images, points, channels).movedim(2, 1).to(values.dtype)
