"""Separable Gaussian filter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseg._ops import gaussian_filter as _op  # noqa: F401  registers the fake kernel
from pyseg._ops.forward_mode import refuse_tangents


def gaussian_filter(
    values: Tensor, sigma: float | Sequence[float], truncate: float = 3.0, normalize: bool = True
) -> Tensor:
    r"""Gaussian filter of maps of one to three axes, one axis at a time; zeros beyond the border.

        out[x] = sum over y, |x - y| <= r of g(x - y) values[y],   g(t) = exp(-t^2 / (2 sigma^2)),
        r = int(truncate * sigma + 0.5)

    for each axis: scipy.ndimage.gaussian_filter with mode="constant".

    Args:
        values: [N, C, *S]; float32, float64, or float16 and bfloat16, which are computed with in float32.
        sigma: standard deviation in elements, one for all axes or one for each; 0 leaves an axis as it is.
        truncate: where g is cut off, in standard deviations.
        normalize: divide g by its sum, the part beyond the border included; False leaves its peak at one.

    Returns:
        Like `values`.

    The filter is its own transpose, so gradients of every order exist. The same bits for every number of threads. O(r)
    for each element and axis.

    Raises:
        RuntimeError: a shape, dtype, sigma or truncate that does not fit.
    """
    refuse_tangents("gaussian_filter", values)
    sigmas = numbers(sigma, values.dim() - 2)
    filtered: Tensor = torch.ops.pyseg.gaussian_filter(values, sigmas, float(truncate), normalize)
    return filtered


def numbers(value: Any, count: int) -> list[float]:
    """A sequence's numbers, or `count` times one: a number of Python or NumPy, or an array or tensor that holds one."""
    if isinstance(value, int | float) or getattr(value, "ndim", None) == 0:
        return [float(value)] * count
    return [float(v) for v in value]
