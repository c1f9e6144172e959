"""Pairwise kernels of a dense CRF: what they are, and what is computed once for an image."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyseg._ops.permutohedral_lattice import MOST_FEATURES, wide_type
from pyseg.functional.atrous_conv2d import atrous_conv2d
from pyseg.functional.gaussian_filter import gaussian_filter, numbers
from pyseg.functional.permutohedral_lattice import (
    LEVELS,
    PermutohedralLattice,
    permutohedral_filter,
    permutohedral_lattice,
)
from pyseg.functional.sparse_pairwise import PixelLinks, sparse_pairwise

Normalization = Literal["symmetric", "before", "after", "none"]
CrfAccuracy = Literal["fast", "high", "exact"]
Compatibility = float | Tensor

NORMALIZATIONS = ("symmetric", "before", "after", "none")
ACCURACIES = (*LEVELS, "exact")
TINY = 1e-20  # keeps the norm of a pixel without neighbours from dividing by zero
# Where the separable Gaussian is cut off, in standard deviations.
TRUNCATE = 3.0
_TILE_BYTES = 32 << 20  # of the exact kernel that is held at a time


@dataclass(frozen=True)
class GaussianKernel:
    r"""k(p, q) = exp(-|p - q|^2 / (2 sigma^2)) between positions: smoothness, a separable filter.

    sigma: in pixels, one number or one for each axis of the image.
    compatibility: see `dense_crf`.
    normalization, accuracy: instead of those that `dense_crf` is called with. "fast": inference on the CPU may filter
        on a grid of every second pixel. "high": never. "exact": not cut off after three standard deviations, float64.
    """

    sigma: float | Sequence[float]
    compatibility: Compatibility = 3.0
    normalization: Normalization | None = None
    accuracy: CrfAccuracy | None = None

    def bind(
        self, unary: Tensor, normalization: Normalization = "symmetric", accuracy: CrfAccuracy = "fast"
    ) -> "Bound":
        """Ready for use on a unary [N, C, *S] of this shape, type and device."""
        level = self.accuracy or accuracy
        chosen(level, "accuracy", ACCURACIES)
        axes = unary.dim() - 2
        sigmas = positive("sigma", self.sigma, axes, "axes of unary")
        values = unary.new_ones((1, 1, *unary.shape[2:]), dtype=computing_type(unary, level))
        truncate = [TRUNCATE] * axes
        if level == "exact":  # as far as the image goes
            truncate = [size / s for size, s in zip(unary.shape[2:], sigmas, strict=True)]
        costs = energies(self.compatibility, unary, level)
        plain = BoundGaussian(costs, None, None, tuple(sigmas), tuple(truncate), coarse=level == "fast")
        return normalized(plain, values, self.normalization or normalization)


@dataclass(frozen=True)
class FeatureKernel:
    r"""k(i, j) = exp(-|f_i - f_j|^2 / 2) between feature vectors, on a permutohedral lattice.

    features: [N, d, *S] or [1, d, *S] in standard deviations, as of `bilateral_features`; d from 1 to 8, any d with
        accuracy="exact".
    compatibility: see `dense_crf`.
    normalization, accuracy: instead of those that `dense_crf` is called with.
    """

    features: Tensor
    compatibility: Compatibility = 10.0
    normalization: Normalization | None = None
    accuracy: CrfAccuracy | None = None

    def bind(
        self, unary: Tensor, normalization: Normalization = "symmetric", accuracy: CrfAccuracy = "fast"
    ) -> "Bound":
        """Ready for use on a unary [N, C, *S] of this shape, type and device: builds the lattice."""
        level = self.accuracy or accuracy
        chosen(level, "accuracy", ACCURACIES)
        features = self.features
        fits = features.dim() == unary.dim() and features.shape[2:] == unary.shape[2:]
        if not fits or features.shape[0] not in (1, unary.shape[0]):
            expected = ", ".join(map(str, [unary.shape[0], "d", *unary.shape[2:]]))
            raise RuntimeError(f"dense_crf: features must be [{expected}], got {list(features.shape)}")
        if features.device != unary.device:
            raise RuntimeError(f"dense_crf: features must be on {unary.device} like unary, got {features.device}")
        dtype = computing_type(unary, level)
        features = features.to(dtype).expand(unary.shape[0], *features.shape[1:]).flatten(2)
        compatibility = energies(self.compatibility, unary, level)
        if level == "exact":
            plain: Bound = BoundExact(compatibility, None, None, features)
        else:
            if features.shape[1] > MOST_FEATURES:
                raise RuntimeError(
                    f"dense_crf: features must have at most {MOST_FEATURES} dimensions (any number with "
                    f'accuracy="exact"), got {features.shape[1]}'
                )
            plain = BoundLattice(compatibility, None, None, permutohedral_lattice(features, level))
        ones = features.new_ones((features.shape[0], 1, *unary.shape[2:]))
        return normalized(plain, ones, self.normalization or normalization)


@dataclass(frozen=True)
class LinkKernel:
    r"""k(i, j) = w_ij between linked pixels, of one image or of several of a batch; 0 between others.

    The images of a batch are segmented together: as views of one scene (Xiao and Quan 2009, Multiple View Semantic
    Segmentation for Street View Images, whose field over several views has smoothness terms within a view and along
    correspondences), or as frames of a video. A pixel is no neighbour of its own, unless the links say so.

    links: of `correspondence_links`, `track_links` or `pixel_links`, for all pixels of the batch.
    compatibility: see `dense_crf`.
    normalization, accuracy: instead of those that `dense_crf` is called with. A pixel without links gets no message,
        and n_i = sum over j of w_ij must not be negative. Where links are directed, what comes behind the sum has n_i
        and what comes before it the sums over the links that lead to a pixel, n_j = sum over i of w_ij.
        accuracy="exact" computes in float64; other levels are alike.
    """

    links: PixelLinks
    compatibility: Compatibility = 3.0
    normalization: Normalization | None = None
    accuracy: CrfAccuracy | None = None

    def bind(
        self, unary: Tensor, normalization: Normalization = "symmetric", accuracy: CrfAccuracy = "fast"
    ) -> "Bound":
        """Ready for use on a unary [N, C, *S] of this shape, type and device."""
        level = self.accuracy or accuracy
        chosen(level, "accuracy", ACCURACIES)
        links, dtype = self.links, computing_type(unary, level)
        pixels = unary[:, 0].numel()
        if links.row_starts.shape[0] != pixels + 1:
            raise RuntimeError(
                f"dense_crf: links must be for the {pixels} pixels of unary {list(unary.shape)}, got some for "
                f"{links.row_starts.shape[0] - 1}"
            )
        if links.weights.device != unary.device:
            raise RuntimeError(f"dense_crf: links must be on {unary.device} like unary, got {links.weights.device}")
        links = links._replace(weights=links.weights.to(dtype))
        ones = unary.new_ones((unary.shape[0], 1, *unary.shape[2:]), dtype=dtype)
        plain = BoundLinks(energies(self.compatibility, unary, level), None, None, links)
        return normalized(plain, ones, self.normalization or normalization)


@dataclass(frozen=True)
class Bound:
    """A kernel with everything that does not depend on the marginals: lattice, normalisation, costs."""

    compatibility: Tensor
    """[C] or [C, C], what messages are multiplied by to become energies."""
    scale_in: Tensor | None
    """[N, P] or [1, P], what values are multiplied by before the filter; None: 1."""
    scale_out: Tensor | None
    """... and after it."""

    def filter(self, values: Tensor) -> Tensor:
        """The kernel's plain sums, values [N, C, *S]."""
        raise NotImplementedError

    def norms(self, ones: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over the kernel's columns and rows [N or 1, P], from ones [N or 1, 1, *S]; here it is symmetric."""
        norm = self.filter(ones).flatten(1)
        return norm, norm

    def message(self, values: Tensor) -> Tensor:
        """The kernel's normalised sums, values [N, C, *S]."""
        return _scaled(self.filter(_scaled(values, self.scale_in)), self.scale_out)

    def energy(self, values: Tensor) -> Tensor:
        """Messages times compatibility, values [N, C, *S]; in the type that the kernel was bound for."""
        message = self.message(values.to(self.compatibility.dtype))
        if self.compatibility.dim() == 1:
            return message * self.compatibility.reshape(-1, *[1] * (values.dim() - 2))
        # As a convolution, whose gradients have the same bits for every number of threads; torch.matmul's have not.
        maps = message.flatten(2).unsqueeze(2)
        return atrous_conv2d(maps, self.compatibility[:, :, None, None], padding=0).reshape(values.shape)

    def bind(
        self, unary: Tensor, normalization: Normalization = "symmetric", accuracy: CrfAccuracy = "fast"
    ) -> "Bound":
        """Itself."""
        return self


@dataclass(frozen=True)
class BoundGaussian(Bound):
    """A separable Gaussian with a peak of one."""

    sigma: tuple[float, ...]
    truncate: tuple[float, ...]
    coarse: bool  # inference may filter on a grid of every second pixel

    def filter(self, values: Tensor) -> Tensor:
        if len(set(self.truncate)) == 1:
            return gaussian_filter(values, self.sigma, self.truncate[0], normalize=False)
        for axis, (sigma, truncate) in enumerate(zip(self.sigma, self.truncate, strict=True)):
            along = [sigma if i == axis else 0.0 for i in range(len(self.sigma))]
            values = gaussian_filter(values, along, truncate, normalize=False)
        return values


@dataclass(frozen=True)
class BoundLattice(Bound):
    """A kernel on a lattice."""

    lattice: PermutohedralLattice

    def filter(self, values: Tensor) -> Tensor:
        return permutohedral_filter(self.lattice, values)


@dataclass(frozen=True)
class BoundLinks(Bound):
    """Links between pixels of all images."""

    links: PixelLinks

    def filter(self, values: Tensor) -> Tensor:
        return sparse_pairwise(values, self.links)

    def norms(self, ones: Tensor) -> tuple[Tensor, Tensor]:
        """Links may be directed: a pixel that has none itself may have others' links lead to it."""
        return sparse_pairwise(ones, self.links, transpose=True).flatten(1), self.filter(ones).flatten(1)

    def scaled(self) -> "BoundLinks":
        """The same kernel with its scales within the weights. For inference: the gradient of indexing takes atomics."""
        links = self.links
        weights, columns = links.weights, links.columns
        if self.scale_out is not None:
            rows = torch.arange(links.row_starts.shape[0] - 1, device=weights.device)
            rows = rows.repeat_interleave(links.row_starts.diff(), output_size=columns.shape[0])
            weights = weights * self.scale_out.flatten()[rows]
        if self.scale_in is not None:
            weights = weights * self.scale_in.flatten()[columns.long()]
        return BoundLinks(self.compatibility, None, None, links._replace(weights=weights))

    def add_energy(self, base: Tensor, values: Tensor) -> Tensor:
        """base + energy(values) without scales and gradients, for a compatibility [C] in one pass."""
        if self.compatibility.dim() == 2:
            return base + self.energy(values)
        added: Tensor = torch.ops.pyseg._sparse_pairwise_add(
            base.flatten(2), self.compatibility, values.flatten(2), *self.links[:3]
        )
        return added.reshape(base.shape)


@dataclass(frozen=True)
class BoundExact(Bound):
    """All pairs, a strip of the kernel at a time; features [N, d, P]."""

    features: Tensor

    def filter(self, values: Tensor) -> Tensor:
        flat, points = values.flatten(2), self.features.mT  # [N, C, P], [N, P, d]
        rows = max(1, _TILE_BYTES // max(1, points.shape[0] * points.shape[1] * points.element_size()))
        strips = [
            flat @ (-_squared_distances(points, points[:, first : first + rows]) / 2).exp()
            for first in range(0, points.shape[1], rows)
        ]
        return torch.cat(strips, 2).reshape(values.shape)


def bilateral_features(
    image: Tensor, spatial_sigma: float | Sequence[float] = 80.0, color_sigma: float | Sequence[float] = 13.0
) -> Tensor:
    r"""Features of the appearance kernel: position / spatial_sigma and colour / color_sigma.

    image: [N, K, *S], of any real type.
    spatial_sigma: in pixels, one number or one for each axis of S.
    color_sigma: in units of the image, one number or one for each channel.

    Returns [N, axes + K, *S]: positions, the last axis first (x, y), then the channels. float64 for float64, else
    float32.
    """
    if image.dim() < 3:
        raise RuntimeError(f"bilateral_features: image must be [N, K, *S], got {list(image.shape)}")
    axes = image.dim() - 2
    spatial = positive("spatial_sigma", spatial_sigma, axes, "axes of image")
    color = positive("color_sigma", color_sigma, image.shape[1], "channels of image")
    image = image.to(wide_type(image.dtype))
    parts = []
    for axis in reversed(range(axes)):
        position = torch.arange(image.shape[2 + axis], dtype=image.dtype, device=image.device) / spatial[axis]
        parts.append(position.view(-1, *[1] * (axes - 1 - axis)).expand(image.shape[0], 1, *image.shape[2:]))
    if len(set(color)) <= 1:
        parts.append(image / (color or [1.0])[0])
    else:
        parts.append(image / image.new_tensor(color).view(-1, *[1] * axes))
    return torch.cat(parts, 1)


# ---- arguments ----


def computing_type(unary: Tensor, accuracy: str) -> torch.dtype:
    """The type that kernels and messages have."""
    return torch.float64 if accuracy == "exact" else wide_type(unary.dtype)


def chosen(value: str, name: str, choices: Sequence[str], op: str = "dense_crf") -> None:
    """Raises for a string that is not one of the choices."""
    if value not in choices:
        raise RuntimeError(f"{op}: {name} must be one of {', '.join(choices)}, got {value}")


def positive(name: str, value: float | Sequence[float], count: int, of_what: str, op: str = "dense_crf") -> list[float]:
    """One number for each of `count` axes or channels."""
    values = numbers(value, count)
    if len(values) != count:
        raise RuntimeError(f"{op}: {name} must be a number or one for each of the {count} {of_what}, got {values}")
    if not all(0 < v < math.inf for v in values):
        raise RuntimeError(f"{op}: {name} must be positive and finite, got {value}")
    return values


def energies(compatibility: Compatibility, unary: Tensor, accuracy: str) -> Tensor:
    """What a message is multiplied by: -w for weights, the matrix itself for costs."""
    classes, dtype = unary.shape[1], computing_type(unary, accuracy)
    weights = torch.as_tensor(compatibility, dtype=dtype, device=unary.device)
    if weights.dim() > 2 or any(size != classes for size in weights.shape):
        raise RuntimeError(
            f"dense_crf: compatibility must be a number, [{classes}] or [{classes}, {classes}], "
            f"got {list(weights.shape)}"
        )
    return weights if weights.dim() == 2 else -weights.expand(classes)


def normalized(plain: Bound, ones: Tensor, normalization: str) -> Bound:
    """With scales from the filter of ones [N or 1, 1, *S]."""
    chosen(normalization, "normalization", NORMALIZATIONS)
    if normalization == "none":
        return plain
    columns, rows = plain.norms(ones)
    root = normalization == "symmetric"
    return dataclasses.replace(
        plain,
        scale_in=None if normalization == "after" else _inverse(columns, root),
        scale_out=None if normalization == "before" else _inverse(rows, root),
    )


def _inverse(norm: Tensor, root: bool) -> Tensor:
    """1 / norm, or 1 / sqrt(norm)."""
    return (norm + TINY).rsqrt() if root else (norm + TINY).reciprocal()


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    return values if scale is None else values * scale.reshape(scale.shape[0], 1, *values.shape[2:])


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[N, P, d] and [N, R, d] -> [N, P, R]; by differences, not by products, which lose digits."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
