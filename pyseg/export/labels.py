"""Decompositions of the operators on label maps: confusion matrix, distance transforms, the sums of losses."""

import torch
from torch import Tensor

from pyseg import reference
from pyseg._ops.segmentation_statistics import empty_log_sum, wide_dtype
from pyseg.export.table import cannot, decomposes

POISON = 1 << 48  # taken off every cell where a label is out of range, as on CUDA


@decomposes("confusion_matrix")
def confusion_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None, per_image: bool = False
) -> Tensor:
    """A sum of ones scattered to the cells of each image; labels out of range make a matrix negative, as on CUDA."""
    if prediction.is_floating_point():
        prediction = prediction.argmax(1)
    images = target.shape[0]
    rows, columns = target.long().reshape(images, -1), prediction.long().reshape(images, -1)
    counts = torch.ones_like(rows, dtype=torch.bool) if ignore_index is None else rows != ignore_index
    valid = (rows >= 0) & (rows < num_classes) & (columns >= 0) & (columns < num_classes)
    cells = torch.where(counts & valid, rows * num_classes + columns, 0)
    ones = (counts & valid).long()
    matrix = torch.zeros_like(rows[:, :1]).expand(-1, num_classes * num_classes)
    matrix = matrix.scatter_add(1, cells, ones).reshape(images, num_classes, num_classes)
    wrong = (counts & ~valid).long().amax(1) if per_image else (counts & ~valid).long().amax((0, 1))
    matrix = matrix if per_image else matrix.sum(0)
    return matrix - POISON * wrong.reshape(*wrong.shape, 1, 1)


# ---- distances: one axis at a time, each a minimum over all elements of a line ----


@decomposes("distance_transform")
def distance_transform(
    input: Tensor, spacing: list[float], mode: str, squared: bool, return_indices: bool, float64: bool
) -> tuple[Tensor, Tensor]:
    r"""To the nearest element of another label: along each axis g'[p] = min over q of (step (p - q))^2 + g[q, p].

    g[q, p] is g[q] where q has p's label, otherwise 0: then q itself is such an element. All four modes are this one,
    on labels or on what is not zero. Memory: elements * length of the axis.
    """
    dtype = torch.float64 if float64 else torch.float32
    labels = (input if mode in ("labels", "objects") else input != 0).long()
    squares = torch.full_like(labels, torch.inf, dtype=dtype)
    nearest: list[Tensor] = []  # along the axes so far
    for axis, step in zip(range(-len(spacing), 0), spacing, strict=True):
        lines = labels.movedim(axis, -1)
        same = lines.unsqueeze(-2) == lines.unsqueeze(-1)
        costs = torch.where(same, squares.movedim(axis, -1).unsqueeze(-2), 0) + _steps(lines, step, dtype)
        squares = costs.amin(-1).movedim(-1, axis)
        if return_indices:
            place = costs.argmin(-1)
            there = lines.gather(-1, place) == lines
            nearest = [
                torch.where(there, each.movedim(axis, -1).gather(-1, place), each_own.movedim(axis, -1)).movedim(
                    -1, axis
                )
                for each, each_own in zip(nearest, _own_places(labels, len(spacing)), strict=False)
            ]
            nearest.append(place.movedim(-1, axis))
    distances = squares if squared else squares.sqrt()
    if mode == "signed":
        distances = torch.where(labels == 0, -distances, distances)
    if mode in ("mask", "objects"):
        distances = torch.where(labels == 0, 0, distances)
    if not return_indices:
        return distances, labels.new_empty(0)
    if mode in ("mask", "objects"):
        own = _own_places(labels, len(spacing))
        nearest = [torch.where(labels == 0, o, n) for o, n in zip(own, nearest, strict=True)]
    indices = torch.stack(nearest, labels.dim() - len(spacing))
    return distances, torch.where(distances.isinf().unsqueeze(labels.dim() - len(spacing)), -1, indices)


@decomposes("distance_to_two_nearest_objects")
def distance_to_two_nearest_objects(
    labels: Tensor, spacing: list[float], squared: bool, float64: bool
) -> tuple[Tensor, Tensor]:
    """Two distances and their objects' labels at every element, carried along each axis in turn."""
    dtype = torch.float64 if float64 else torch.float32
    first_label = labels.long()
    second_label = torch.zeros_like(first_label)
    first = torch.where(first_label == 0, torch.inf, torch.zeros_like(first_label, dtype=dtype))
    second = torch.full_like(first, torch.inf)
    for axis, step in zip(range(-len(spacing), 0), spacing, strict=True):
        steps = _steps(first.movedim(axis, -1), step, dtype)
        costs = torch.cat([each.movedim(axis, -1).unsqueeze(-2) + steps for each in (first, second)], -1)
        names = torch.cat([each.movedim(axis, -1) for each in (first_label, second_label)], -1)
        nearest = costs.argmin(-1)
        label = names.gather(-1, nearest)
        others = torch.where(names.unsqueeze(-2) == label.unsqueeze(-1), torch.inf, costs)
        first, second = costs.amin(-1).movedim(-1, axis), others.amin(-1).movedim(-1, axis)
        first_label = label.movedim(-1, axis)
        second_label = names.gather(-1, others.argmin(-1)).movedim(-1, axis)
    return (first, second) if squared else (first.sqrt(), second.sqrt())


def _steps(lines: Tensor, step: float, dtype: torch.dtype) -> Tensor:
    """Squared distances between the elements of a line, [n, n]."""
    places = torch.arange(lines.shape[-1], dtype=dtype, device=lines.device)
    return ((places[:, None] - places) * step).square()


def _own_places(labels: Tensor, axes: int) -> list[Tensor]:
    """The position of every element along each axis."""
    places = []
    for axis in range(-axes, 0):
        place = torch.arange(labels.shape[axis], device=labels.device)
        places.append(place.view(-1, *[1] * (-1 - axis)).expand(labels.shape))
    return places


# ---- losses: their formulas in float64 ----


@decomposes("segmentation_statistics")
def segmentation_statistics(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    activation: str,
    ignore_index: int | None,
    gamma: float,
    region: bool,
    pixel: bool,
    smoothing: bool,
) -> tuple[Tensor, Tensor]:
    """The reference's sums, which are in float64 like the operator's."""
    sums = reference.segmentation_statistics(
        logits, target, pixel_weight, activation, ignore_index, gamma, region, pixel, smoothing
    )
    return sums, empty_log_sum(logits, activation, target.dim() == logits.dim())


@decomposes("pixel_cross_entropy")
def pixel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    activation: str,
    ignore_index: int | None,
    gamma: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The reference's map."""
    losses = reference.pixel_cross_entropy(
        logits, target, class_weight, activation, ignore_index, gamma, label_smoothing
    )
    return losses.to(wide_dtype(logits)), empty_log_sum(logits, activation, target.dim() == logits.dim())


@decomposes("expectation_labels")
def expectation_labels(
    logits: Tensor,
    present: Tensor,
    valid: Tensor | None,
    background_bias: float,
    foreground_bias: float,
    background_share: float,
    foreground_share: float,
    exclude_absent: bool,
    sweeps: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Constant biases and an argmax. Shares take rounds until no bias changes, each with an order statistic."""
    if (background_share > 0 or foreground_share > 0) and sweeps > 0:
        raise cannot("expectation_labels", "shares (EM-Adapt) take a loop over data: use constant biases (EM-Fixed)")
    wide = wide_dtype(logits)
    scores = logits.to(wide)
    scores = torch.where(scores.isnan(), torch.inf, scores)
    background = torch.arange(logits.shape[1], device=logits.device) == 0
    bias = torch.where(background, background_bias, foreground_bias).to(wide)
    bias = torch.where(present, bias, -torch.inf if exclude_absent else 0.0)  # [N, C]
    competes = bias > -torch.inf
    around = [1] * (logits.dim() - 2)
    # -inf of a class that competes is more than that of one which does not.
    lowest = torch.finfo(wide).min
    total = (scores + bias.reshape(*bias.shape, *around)).clamp_min(lowest)
    total = torch.where(competes.reshape(*competes.shape, *around), total, -torch.inf)
    counts = competes.any(1).reshape(-1, *around)
    if valid is not None:
        counts = counts & valid
    return torch.where(counts, total.argmax(1), ignore_index), bias


@decomposes("lovasz_statistics")
def lovasz_statistics(*arguments: object) -> Tensor:
    """Raises: train in PyTorch."""
    raise cannot("lovasz_loss", "its sort of all pixels of a class is made for training")


@decomposes("_hausdorff_dt")
def hausdorff_dt(*arguments: object) -> Tensor:
    """Raises: train in PyTorch."""
    raise cannot("hausdorff_dt_loss", "its distance transforms of all classes are made for training")


@decomposes("point_supervision_loss")
def point_supervision_loss(*arguments: object) -> tuple[Tensor, Tensor]:
    """Raises: train in PyTorch."""
    raise cannot("point_supervision_loss", "it is made for training")
