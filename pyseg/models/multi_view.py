"""Segmentation of several views of one scene together (Xiao and Quan 2009, Multiple View Semantic Segmentation for
Street View Images, ICCV): one random field over all views, smooth within a view and along correspondences.

    tracks = observe_points(points, cameras, (height, width), depth)      # or of your own structure from motion
    links = track_links(tracks, (views, height, width))
    labels = multi_view_crf(unary, photos, links, output="labels")

The paper's field is one on superpixels. Here its nodes are pixels, a view's own terms are `dense_crf`'s kernels, and
inference is mean field.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseg.functional import LinkKernel, PixelLinks, dense_crf
from pyseg.functional.pairwise_kernels import Compatibility, Normalization


def multi_view_crf(
    unary: Tensor,
    image: Tensor | None,
    links: PixelLinks,
    *,
    correspondence: Compatibility = 3.0,
    link_normalization: Normalization = "none",
    iterations: int = 10,
    **arguments: Any,
) -> Tensor:
    r"""Mean field over all views at once: `pyseg.functional.dense_crf` with a `LinkKernel` across the batch.

        Q_i(l) <- softmax over l of -(U_i(l) + E_i(l) - w(l) sum over links ij of w_ij Q_j(l))

    with E the energies of smoothness and appearance within a view: Potts, each link whose ends differ costs w w_ij.

    Args:
        unary: [M, C, H, W] energies of M views; of views without a classifier zeros, or `label_energies`.
        image: [M, K, H, W], what the appearance kernel compares; None: no such kernel.
        links: of `track_links` or `correspondence_links` with shape (M, H, W).
        correspondence: compatibility w of linked pixels: a number, [C], or costs [C, C] as in `dense_crf`.
        link_normalization: of the links, as `normalization` of `dense_crf`: "symmetric" makes a pixel's links
            count like one, however many there are and however small their weights.
        iterations: labels travel one link, or as far as the appearance kernel reaches, in each.
        arguments: further ones of `dense_crf`.

    Returns:
        As `dense_crf`: marginals [M, C, H, W], labels or logits. Gradients reach unary, compatibilities, image and the
        links' weights. The same bits for every number of threads.

    Raises:
        RuntimeError: what does not fit.
    """
    kernel = LinkKernel(links, correspondence, link_normalization)
    further = [kernel, *arguments.pop("kernels", ())]
    result: Tensor = dense_crf(unary, image, iterations=iterations, kernels=further, **arguments)
    return result


def label_energies(labels: Tensor, classes: int, confidence: float = 0.9) -> Tensor:
    r"""Energies of labels that are known in places, to be used as unaries or added to those of a classifier.

        0 for the label itself, log(confidence (classes - 1) / (1 - confidence)) for each other one: -log of the
        probabilities `confidence` and (1 - confidence) / (classes - 1) but for a constant; 0 where nothing is known

    Args:
        labels: [N, *S] integers; any number but 0 to classes - 1 (such as -1 or 255) is unknown.
        classes: at least 2.
        confidence: the probability that a label is right, below 1.

    Returns [N, classes, *S] float32.
    """
    if classes < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"label_energies: classes must be at least 2 and confidence between 0 and 1, got {classes}, {confidence}"
        )
    cost = torch.tensor(confidence * (classes - 1) / (1 - confidence), dtype=torch.float64).log()
    known = (labels >= 0) & (labels < classes)
    every = torch.arange(classes, device=labels.device).view(1, -1, *[1] * (labels.dim() - 1))
    return (known[:, None] & (labels[:, None] != every)) * cost.to(labels.device, torch.float32)


def project_points(points: Tensor, cameras: Tensor) -> tuple[Tensor, Tensor]:
    r"""Where points of the scene appear: (x z, y z, z) = P (X, Y, Z, 1) with z the depth.

    Args:
        points: [K, 3].
        cameras: [M, 3, 4] matrices P = A (R | t) with A's last row (0, 0, 1), so that z is in the scene's units.

    Returns:
        pixels [M, K, 2] (x, y), the centre of the first pixel at 0, and depth [M, K]; behind a camera depth is negative
        and pixels mean nothing.
    """
    if points.dim() != 2 or points.shape[1] != 3 or cameras.dim() != 3 or cameras.shape[1:] != (3, 4):
        raise ValueError(
            f"project_points: points must be [K, 3] and cameras [M, 3, 4], got {list(points.shape)} and "
            f"{list(cameras.shape)}"
        )
    seen = points @ cameras[:, :, :3].mT + cameras[:, None, :, 3]
    depth = seen[..., 2]
    return seen[..., :2] / depth[..., None], depth


def observe_points(
    points: Tensor, cameras: Tensor, size: Sequence[int], depth: Tensor | None = None, tolerance: float = 0.02
) -> Tensor:
    r"""Which pixels see which points: tracks of known geometry.

    Args:
        points: [K, 3].
        cameras: [M, 3, 4] as of `project_points`.
        size: (H, W) of the views.
        depth: [M, H, W], of what is seen at each pixel: a point that lies farther away than (1 + tolerance) times that
            is hidden. None: nothing is hidden.

    Returns:
        tracks [T, 4] int64 (point, view, y, x) for `track_links`, by view and point.
    """
    height, width = size
    pixels, distance = project_points(points, cameras)
    pixels = pixels.round()
    inside = (pixels >= 0) & (pixels < pixels.new_tensor([width, height]))  # a comparison with NaN is false
    visible = inside.all(2) & (distance > 0)
    x, y = pixels.nan_to_num().clamp(pixels.new_zeros(2), pixels.new_tensor([width - 1, height - 1])).long().unbind(2)
    view = torch.arange(cameras.shape[0], device=points.device)[:, None].expand_as(x)
    if depth is not None:
        visible &= distance <= depth[view, y, x] * (1 + tolerance)
    point = torch.arange(points.shape[0], device=points.device).expand_as(x)
    return torch.stack([point, view, y, x], 2)[visible]


def labels_of_points(tracks: Tensor, labels: Tensor, shape: Sequence[int], unknown: int = -1) -> Tensor:
    """Label maps (M, H, W) of the views of labelled points: labels [K] at each observation of tracks [T, 4].

    `unknown` elsewhere. Where points fall on the same pixel, the one with the highest number is taken.
    """
    maps = torch.full(tuple(shape), unknown, dtype=labels.dtype, device=labels.device)
    flat = (tracks[:, 1] * shape[1] + tracks[:, 2]) * shape[2] + tracks[:, 3]
    last = torch.full((maps.numel(),), -1, dtype=torch.long, device=labels.device)
    last = last.scatter_reduce(0, flat, tracks[:, 0], "amax")
    return torch.where(last >= 0, labels[last.clamp_min(0)], maps.flatten()).reshape(maps.shape)


def color_agreement(image: Tensor, tracks: Tensor, sigma: float) -> Tensor:
    r"""Weights for `track_links` that trust an observation less whose colour is not that of its track.

        exp(-|I(view, y, x) - mean of the track's colours|^2 / (2 sigma^2))

    image [M, K, H, W]; tracks [T, 4] (point, view, y, x); sigma in units of the image. Returns [T] float32.
    """
    colors = image[tracks[:, 1], :, tracks[:, 2], tracks[:, 3]].float()
    _, track = torch.unique(tracks[:, 0], return_inverse=True)
    count = torch.bincount(track)
    order = track.argsort(stable=True)
    means = torch.segment_reduce(colors[order], "mean", lengths=count, axis=0, unsafe=True)
    return (-(colors - means[track]).square().sum(1) / (2 * sigma**2)).exp()
