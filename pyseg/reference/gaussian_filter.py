"""A separable Gaussian from its definition: one matrix an axis."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian_filter(values: Tensor, sigma: Sequence[float], truncate: float = 3.0, normalize: bool = True) -> Tensor:
    r"""Each of the last axes times the matrix g[x, y] = exp(-(x - y)^2 / (2 sigma^2)), in float64.

    values [*, *S], as many axes in S as `sigma` has elements. g is zero where |x - y| > int(truncate * sigma + 0.5), as
    in scipy.ndimage; normalize divides it by its sum over all y, those beyond the border too. An axis with sigma 0
    stays as it is. O(longest axis) an element.
    """
    result = values.double().cpu()
    for axis, s in zip(range(-len(sigma), 0), sigma, strict=True):
        if s == 0:
            continue
        radius = int(truncate * s + 0.5)
        taps = (-torch.arange(-radius, radius + 1, dtype=torch.float64).square() / (2 * s * s)).exp()
        size = result.shape[axis]
        place = torch.arange(size)
        distance = (place[:, None] - place[None]).abs()
        matrix = torch.where(
            distance <= radius, (-distance.double().square() / (2 * s * s)).exp() / (taps.sum() if normalize else 1), 0
        )
        result = (result.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return result
