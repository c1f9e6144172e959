"""Sums over sparse links between pixels, of one image or of several."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyseg._ops import sparse_pairwise as _op  # noqa: F401  registers the fake kernels
from pyseg._ops.permutohedral_lattice import wide_type

_MOST = 2**31 - 1  # pixels and links: indices are int32


class PixelLinks(NamedTuple):
    """Weighted links between the R = N * P pixels of N images: compressed rows, and those of the transpose.

    `correspondence_links`, `track_links` and `pixel_links` build it once; a pytree of tensors, in the order of
    `torch.ops.pyseg.sparse_pairwise`. Pixel p of image n is the row n * P + p.
    """

    weights: Tensor
    """[L] float32 or float64: the only differentiable part."""
    row_starts: Tensor
    """[R + 1] int64: the first link of each pixel, and their number."""
    columns: Tensor
    """[L] int32: the other pixel of each link."""
    transpose_starts: Tensor
    """[R + 1] int64: the rows of the transpose."""
    transpose_columns: Tensor
    """[L] int32."""
    transpose_entries: Tensor
    """[L] int32: where the weights of the transpose stand in `weights`."""


def sparse_pairwise(values: Tensor, links: PixelLinks, *, transpose: bool = False) -> Tensor:
    r"""Weighted sums over linked pixels: out_i = sum over the links k of pixel i of w_k v_{j_k}.

    Args:
        values: [N, C, *S] with as many pixels in all as the links are for, or [R, C]. float32, float64, float16 or
            bfloat16 (summed in float32).
        links: of `correspondence_links`, `track_links` or `pixel_links`.
        transpose: sums over the links that lead to a pixel instead, the transposed matrix.

    Returns:
        Like `values`; pixels without links get zeros. channels_last and [R, C] are read and written as they are.

    Gradients with respect to values and weights, of every order: each is this sum or, for the weights, a product of
    channels at both ends of a link. The same bits for every number of threads, and on CUDA in every run: no atomics.
    O(C (R + L)) time, no memory but the result.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; on the CPU row starts that do not ascend from 0 to L,
            and columns that do not exist. On CUDA links to pixels that do not exist count for nothing.
    """
    op = "sparse_pairwise"
    if values.dim() < 2:
        raise RuntimeError(f"{op}: values must be [N, C, *S] or [R, C], got {list(values.shape)}")
    points = values.mT[None] if values.dim() == 2 else values.flatten(2)
    if values.is_floating_point():
        links = links._replace(weights=links.weights.to(wide_type(values.dtype)))
    summed: Tensor = torch.ops.pyseg.sparse_pairwise(points, *links, transpose)
    return summed[0].mT if values.dim() == 2 else summed.reshape(values.shape)


def pixel_links(row_starts: Tensor, columns: Tensor, weights: Tensor | None = None) -> PixelLinks:
    r"""Links of compressed rows (as of a torch.sparse_csr tensor), with the rows of the transpose.

    Args:
        row_starts: [R + 1] integers that ascend from 0 to L.
        columns: [L] integers from 0 to R - 1, any others become -1; a pixel may be linked to another more than once.
        weights: [L]; None: ones in float32. float64 stays, other types become float32. Gradients reach them.

    Raises:
        RuntimeError: a shape or dtype that does not fit. Contents are checked where the links are used.
    """
    op = "pixel_links"
    for name, tensor in (("row_starts", row_starts), ("columns", columns)):
        if tensor.dim() != 1 or not _is_integer(tensor):
            raise RuntimeError(f"{op}: {name} must be a list of integers, got {list(tensor.shape)} {tensor.dtype}")
    if row_starts.numel() < 1:
        raise RuntimeError(f"{op}: row_starts must be [R + 1], got {list(row_starts.shape)}")
    pixels, length = row_starts.numel() - 1, columns.numel()
    if max(pixels, length) > _MOST:
        raise RuntimeError(f"{op}: pixels and links must be fewer than 2^31, got {pixels} and {length}")
    if weights is None:
        weights = torch.ones(length, device=columns.device)
    if weights.shape != columns.shape:
        raise RuntimeError(f"{op}: weights must be {list(columns.shape)} like columns, got {list(weights.shape)}")
    row_starts, columns = row_starts.long(), columns.long()
    # Before int32 makes another pixel of them: what uses the links rejects -1.
    columns = columns.where((columns >= 0) & (columns < pixels), -1)
    order = columns.argsort(stable=True)  # by column, then by row
    rows = row_starts[1:].contiguous()
    return PixelLinks(
        weights=weights.to(wide_type(weights.dtype)),
        row_starts=row_starts,
        columns=columns.int(),
        transpose_starts=_starts(columns[order], pixels),
        transpose_columns=torch.searchsorted(rows, order, right=True).int(),
        transpose_entries=order.int(),
    )


def correspondence_links(
    first: Tensor, second: Tensor, shape: Sequence[int], weights: Tensor | None = None
) -> PixelLinks:
    r"""Symmetric links w_ij = w_ji between pairs of pixels, of one view or of different ones.

    Args:
        first, second: [K, 1 + axes] integers: (image, y, x), or the image and its own axes; pair k links first[k] and
            second[k]. A pair that is given twice, in either order, is one link whose weight is the sum; a pixel's links
            to itself are left out.
        shape: (N, *S), the images and the sizes of their axes: of the batch that the links are for.
        weights: [K], None: ones in float32. Gradients reach them.

    Deterministic; sorts 2 K numbers, and on CUDA waits for their count.

    Raises:
        RuntimeError: shapes that do not fit, pixels that do not exist.
    """
    op = "correspondence_links"
    sizes = [int(size) for size in shape]
    pairs = [_pixels(op, name, pixels, sizes) for name, pixels in (("first", first), ("second", second))]
    if first.shape != second.shape:
        raise RuntimeError(f"{op}: second must be {list(first.shape)} like first, got {list(second.shape)}")
    if weights is None:
        weights = torch.ones(first.shape[0], device=first.device)
    if weights.shape != first.shape[:1]:
        raise RuntimeError(f"{op}: weights must be {[first.shape[0]]}, got {list(weights.shape)}")
    weights = weights.to(wide_type(weights.dtype))
    pixels = math.prod(sizes)
    different = pairs[0] != pairs[1]
    a, b, weights = (tensor[different] for tensor in (*pairs, weights))
    key = torch.cat([a * pixels + b, b * pixels + a])  # below 2^62
    order = key.argsort(stable=True)
    unique, length = torch.unique_consecutive(key[order], return_counts=True)
    # In the order of the pairs, without atomics: the same bits in every run.
    summed = torch.segment_reduce(torch.cat([weights, weights])[order], "sum", lengths=length, unsafe=True)
    rows = torch.div(unique, pixels, rounding_mode="floor") if pixels else unique
    return pixel_links(_starts(rows, pixels), unique - rows * pixels, summed)


def track_links(tracks: Tensor, shape: Sequence[int], weights: Tensor | None = None) -> PixelLinks:
    r"""Links between all pixels of the same track: the places at which one point of the scene is seen.

    Args:
        tracks: [K, 2 + axes] integers (track, image, y, x) in any order; tracks are any numbers.
        shape: (N, *S) as in `correspondence_links`.
        weights: [K] of the observations; the weight of a link is their product. None: ones.

    A track of m observations makes m (m - 1) / 2 links. On CUDA it waits for their number.
    """
    op = "track_links"
    if tracks.dim() != 2 or tracks.shape[1] != len(shape) + 1 or not _is_integer(tracks):
        raise RuntimeError(
            f"{op}: tracks must be [K, {len(shape) + 1}] integers, got {list(tracks.shape)} {tracks.dtype}"
        )
    tracks = tracks.long()
    if weights is not None and weights.shape != tracks.shape[:1]:
        raise RuntimeError(f"{op}: weights must be {[tracks.shape[0]]}, got {list(weights.shape)}")
    order = tracks[:, 0].argsort(stable=True)
    _, length = torch.unique_consecutive(tracks[order, 0], return_counts=True)
    # Each observation is paired with those after it in its track.
    last = length.cumsum(0).repeat_interleave(length)
    place = torch.arange(tracks.shape[0], device=tracks.device)
    after = last - place - 1
    first = place.repeat_interleave(after)
    second = first + 1 + torch.arange(first.numel(), device=tracks.device) - (after.cumsum(0) - after)[first]
    a, b = order[first], order[second]
    product = None if weights is None else weights[a] * weights[b]
    return correspondence_links(tracks[a, 1:], tracks[b, 1:], shape, product)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _pixels(op: str, name: str, pixels: Tensor, shape: list[int]) -> Tensor:
    """Rows of pixels (image, *position)."""
    if pixels.dim() != 2 or pixels.shape[1] != len(shape) or not _is_integer(pixels):
        raise RuntimeError(f"{op}: {name} must be [K, {len(shape)}] integers, got {list(pixels.shape)} {pixels.dtype}")
    pixels, size = pixels.long(), torch.tensor(shape, device=pixels.device)
    outside = (pixels < 0) | (pixels >= size)
    if outside.any():
        raise RuntimeError(f"{op}: {name} must lie in {shape}, got {pixels[outside.any(1)][0].tolist()}")
    row = torch.zeros_like(pixels[:, 0])
    for axis, length in enumerate(shape):
        row = row * length + pixels[:, axis]
    return row


def _starts(sorted_rows: Tensor, pixels: int) -> Tensor:
    """[pixels + 1]: where each row begins in a list of rows, int64, that ascends."""
    every = torch.arange(pixels + 1, device=sorted_rows.device, dtype=sorted_rows.dtype)
    return torch.searchsorted(sorted_rows.contiguous(), every)
