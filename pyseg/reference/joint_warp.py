"""joint_warp from its definition."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _keys(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel (1981), equation 4, with his a free."""
    d = distance.abs()
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _grid_matrix(out: int, count: int, cubic: float) -> Tensor:
    """[out, count]: row i holds the weights of the control points at element i; the outermost repeat."""
    at = torch.arange(out, dtype=torch.float64) * ((count - 1) / (out - 1) if out > 1 else 0.0)
    matrix = torch.zeros(out, count, dtype=torch.float64)
    for point in range(-2, count + 3):
        matrix[:, min(max(point, 0), count - 1)] += _keys(at - point, cubic)
    return matrix


def displacement_field(displacement: Tensor, size: Sequence[int], cubic: float = -0.5) -> Tensor:
    """[N, d, *size]: the control points [N, d, *grid] interpolated along each axis."""
    field = displacement.double()
    for axis, out in enumerate(size):
        matrix = _grid_matrix(out, field.shape[2 + axis], cubic)
        field = torch.tensordot(field, matrix, dims=([2 + axis], [1])).movedim(-1, 2 + axis)
    return field


def warp_places(affine: Tensor, displacement: Tensor | None, size: Sequence[int], cubic: float = -0.5) -> Tensor:
    """[N, d, *size], float64: where each element of the output reads, in elements of the image."""
    d = len(size)
    axes = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) for side in size], indexing="ij")
    ones = torch.cat([torch.stack(axes), torch.ones(1, *size, dtype=torch.float64)])
    places = torch.einsum("nij,j...->ni...", affine.double().reshape(-1, d, d + 1), ones)
    return places if displacement is None else places + displacement_field(displacement, size, cubic)


def _fold(place: Tensor, size: int, border: str) -> Tensor:
    """A place along one axis, brought to where the border says; beyond the image only for constant."""
    if border == "reflect" and size > 1:
        period = 2 * (size - 1)
        place = torch.remainder(place, period)
        return torch.where(place > size - 1, period - place, place)
    return place if border == "constant" else place.clamp(0, size - 1)


def _linear(image: Tensor, places: Tensor, border: str, fill: float) -> Tensor:
    spatial = image.shape[2:]
    folded = [_fold(places[:, d], size, border) for d, size in enumerate(spatial)]
    images = torch.arange(len(image)).reshape(-1, *[1] * len(spatial))
    value: Tensor | float = 0.0
    for corner in itertools.product((0, 1), repeat=len(spatial)):
        indices = [p.floor() + c for p, c in zip(folded, corner, strict=True)]
        weight = math.prod(1 - (p - i).abs() for p, i in zip(folded, indices, strict=True))
        inside = torch.stack([(i >= 0) & (i < s) for i, s in zip(indices, spatial, strict=True)]).all(0)
        index = [i.clamp(0, s - 1).long() for i, s in zip(indices, spatial, strict=True)]
        taken = image.movedim(1, -1)[(images, *index)].movedim(-1, 1)
        value = value + weight[:, None] * torch.where(inside[:, None], taken, fill)  # type: ignore[index]
    assert isinstance(value, Tensor)
    return value


def _nearest(labels: Tensor, places: Tensor, border: str, ignore_index: int) -> Tensor:
    spatial = labels.shape[1:]
    indices = [(_fold(places[:, d], size, border) + 0.5).floor() for d, size in enumerate(spatial)]
    inside = torch.stack([(i >= 0) & (i < s) for i, s in zip(indices, spatial, strict=True)]).all(0)
    index = [i.clamp(0, s - 1).long() for i, s in zip(indices, spatial, strict=True)]
    images = torch.arange(len(labels)).reshape(-1, *[1] * len(spatial))
    return torch.where(inside, labels[(images, *index)], torch.tensor(ignore_index, dtype=labels.dtype))


def joint_warp(
    image: Tensor,
    labels: Tensor | None,
    affine: Tensor,
    displacement: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    size: Sequence[int] | None = None,
    border: str = "reflect",
    fill: float = 0.0,
    label_border: str = "reflect",
    ignore_index: int = 0,
    cubic: float = -0.5,
) -> tuple[Tensor, Tensor | None]:
    r"""image(A [o; 1] + u(o)) * gain + bias and labels at the same places.

    Arguments and results as in `pyseg.functional.joint_warp`, with affine, gain and bias in full; everything in
    float64, on the CPU. Differentiable in image and soft labels by torch's autograd.
    """
    size = list(image.shape[2:]) if size is None else list(size)
    places = warp_places(affine, displacement, size, cubic)
    value = _linear(image.double(), places, border, fill)
    for factor, is_gain in ((gain, True), (bias, False)):
        if factor is not None:
            each = factor.double().reshape(*factor.shape, *[1] * len(size))
            value = value * each if is_gain else value + each
    if labels is None:
        return value, None
    if labels.is_floating_point():
        return value, _linear(labels.double(), places, label_border, 0.0)
    return value, _nearest(labels, places, label_border, ignore_index)
