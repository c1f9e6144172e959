"""Exact Euclidean distance transforms of masks and label maps."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from pyseg._ops import distance_transform as _op  # noqa: F401  registers the fake kernels

Spacing = float | Sequence[float] | None


@overload
def distance_transform(
    input: Tensor,
    spacing: Spacing = None,
    *,
    dims: int | None = None,
    squared: bool = False,
    labels: bool = False,
    signed: bool = False,
    zero_background: bool = False,
    return_indices: Literal[False] = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor: ...
@overload
def distance_transform(
    input: Tensor,
    spacing: Spacing = None,
    *,
    dims: int | None = None,
    squared: bool = False,
    labels: bool = False,
    signed: bool = False,
    zero_background: bool = False,
    return_indices: Literal[True],
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]: ...
def distance_transform(
    input: Tensor,
    spacing: Spacing = None,
    *,
    dims: int | None = None,
    squared: bool = False,
    labels: bool = False,
    signed: bool = False,
    zero_background: bool = False,
    return_indices: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact Euclidean distance of every foreground element to the nearest background element.

        d[p] = min over q with input[q] = 0 of || spacing * (p - q) ||

    what scipy.ndimage.distance_transform_edt computes, for all images of a batch at once. One axis at a time, as in
    Felzenszwalb and Huttenlocher 2012 (Distance Transforms of Sampled Functions, section 2.1, equation 3), but the
    minimum over each axis is found by scans that end early.

    Args:
        input: [*, H, W] or [*, D, H, W], with any batch dimensions. bool or any real numbers: what is not zero is
            foreground, NaN too.
        spacing: how far neighbouring elements are apart: one number for all axes, or one for each axis in the order of
            the dimensions. None: 1.
        dims: 2 or 3, how many of the last dimensions are axes; all before are batch. A sequence in `spacing` says so by
            its length; without one, and without `dims`, it is 2: a volume needs dims=3 or three spacings.
        squared: squared distances, which save the root and are exact integers for spacing 1.
        labels: `input` is a map of labels (integers); the distance is that to the nearest element of another label,
            for all labels in one pass. 0 is a label like all others: in a mask the background has distances, too.
        signed: also minus the distance to the nearest foreground element where the input is background.
        zero_background: with labels: the distance is 0 where the label is 0. With two labels, 0 and 1, this is the
            plain transform.
        return_indices: also the nearest element itself; of several that are as near, any of them.
        dtype: of the distances, torch.float32 or torch.float64.

    Returns:
        Distances like `input`, in units of `spacing` (squared ones if asked for). Where there is no element to measure
        to, in a map without background, infinity (minus infinity for `signed` in a map without foreground); never NaN.
        With return_indices also [*, dims, H, W] or [*, dims, D, H, W] int64: component i is the position along axis i,
        as scipy's indices for each element of the batch; -1 where the distance is infinite.

    Distances are exact: squared ones are integers for spacing 1 (int32, or float64 above 2^29), converted once; with
    another spacing the arithmetic is that of `dtype`. On the CPU the same bits come out for every number of threads.
    Not differentiable: the result does not require gradients. Time is O(elements) for maps whose distances are short,
    O(elements * log(longest axis)) for typical others, on CUDA O(elements * distance), where a map without background
    costs as much as the longest axis; no synchronisation with the device.

    Raises:
        RuntimeError: a shape, dtype, spacing or combination of options that does not fit.
    """
    op = "distance_transform"
    if signed and labels:
        raise RuntimeError(f"{op}: signed must be False with labels=True, got True")
    if zero_background and not labels:
        raise RuntimeError(f"{op}: zero_background must be False without labels=True, got True")
    mode = "signed" if signed else "objects" if zero_background else "labels" if labels else "mask"
    distances, indices = torch.ops.pyseg.distance_transform(
        input.detach(), _spacings(op, spacing, dims), mode, squared, return_indices, _is_float64(op, dtype)
    )
    return (distances, indices) if return_indices else distances


def distance_to_two_nearest_objects(
    labels: Tensor,
    spacing: Spacing = None,
    *,
    dims: int | None = None,
    squared: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    r"""Exact Euclidean distances to the nearest and to the second nearest object of a label map.

        d1[p] = min over objects o of d(p, o),   d2[p] = second smallest,   d(p, o) = min over q with labels[q] = o

    what the border weights of U-Net need (Ronneberger et al. 2015, 1505.04597, equation 2):
    w = w_c + w_0 * exp(-(d1 + d2)^2 / (2 * sigma^2)). Within an object d1 is 0 and d2 the distance to the next one.

    Args:
        labels: [*, H, W] or [*, D, H, W], with any batch dimensions. Integers: 0 is background, each other value an
            object (of int64, the lower 32 bits).
        spacing, dims, squared, dtype: as for `distance_transform`.

    Returns:
        (d1, d2), each like `labels`; infinity where there is no object, or only one.

    Time is O(elements * d2 / vector length) at most; 16 bytes of scratch for each element of an image. Exactness and
    determinism are those of `distance_transform`. Not differentiable.

    Raises:
        RuntimeError: a shape, dtype or spacing that does not fit.
    """
    op = "distance_to_two_nearest_objects"
    first, second = torch.ops.pyseg.distance_to_two_nearest_objects(
        labels, _spacings(op, spacing, dims), squared, _is_float64(op, dtype)
    )
    return first, second


def _spacings(op: str, spacing: Spacing, dims: int | None) -> list[float]:
    if dims is not None and dims not in (2, 3):
        raise RuntimeError(f"{op}: dims must be 2 or 3, got {dims}")
    if spacing is None or isinstance(spacing, int | float):
        return [1.0 if spacing is None else float(spacing)] * (dims or 2)
    spacings = [float(s) for s in spacing]
    if dims is not None and len(spacings) != dims:
        raise RuntimeError(f"{op}: spacing must have dims = {dims} elements, got {spacings}")
    return spacings


def _is_float64(op: str, dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{op}: dtype must be torch.float32 or torch.float64, got {dtype}")
    return dtype == torch.float64
