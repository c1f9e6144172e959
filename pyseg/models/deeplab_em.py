"""DeepLab-EM: segmentation networks trained from weak labels, alone or beside full masks.

Papandreou, Chen, Murphy and Yuille, "Weakly- and Semi-Supervised Learning of a DCNN for Semantic Image Segmentation",
ICCV 2015 (1502.02734). The masks of weakly labelled images are hidden variables. Each step estimates them from the
network's present scores and the weak labels (E-step, `pyseg.functional.expectation_labels`), and takes a gradient step
on the cross-entropy to the estimate (M-step):

    step = em_step(model, images, present)            # present [N, C] bool: the classes of each image
    step.loss.backward()

`EMFixed` and `EMAdapt` are the paper's two E-steps for labels of whole images. Boxes become masks before training, by
`box_labels` (Bbox-Rect) or `box_crf_labels` (Bbox-Seg); those, and full masks, are handed over as `masks`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyseg.functional import cross_entropy, dense_crf, expectation_labels


class EMFixed(NamedTuple):
    """E-step with constant biases (section 3.2, equations 4 to 7; algorithm 1): foreground above background above 0.

    The paper asks for b_fg > b_bg > 0 without a scale; the defaults suit logits of a few units. Absent classes compete
    without a bias, as in algorithm 1; `exclude_absent` keeps them out.
    """

    background_bias: float = 3.0
    foreground_bias: float = 5.0
    exclude_absent: bool = False

    def labels(self, logits: Tensor, present: Tensor, valid: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        """[N, *S] int64 from logits [N, C, *S] and the classes of each image, present [N, C] bool."""
        return expectation_labels(
            logits,
            present,
            background_bias=self.background_bias,
            foreground_bias=self.foreground_bias,
            exclude_absent=self.exclude_absent,
            valid=valid,
            ignore_index=ignore_index,
        )


class EMAdapt(NamedTuple):
    """E-step with biases of each image that give every present class its share (section 3.2, EM-Adapt).

    The paper's shares: at least 40 % of an image are background, at least 20 % each present foreground class. Its
    program draws the order of the foreground classes and stops after some rounds; here it is ascending, so that results
    are reproducible, and `expectation_labels` says what the rounds reach.
    """

    background_share: float = 0.4
    foreground_share: float = 0.2
    sweeps: int = 16

    def labels(self, logits: Tensor, present: Tensor, valid: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        """[N, *S] int64 from logits [N, C, *S] and the classes of each image, present [N, C] bool."""
        return expectation_labels(
            logits,
            present,
            background_share=self.background_share,
            foreground_share=self.foreground_share,
            sweeps=self.sweeps,
            valid=valid,
            ignore_index=ignore_index,
        )


class EMStep(NamedTuple):
    """What `em_step` returns: backward() of the loss is the rest of the M-step."""

    loss: Tensor  # scalar
    targets: Tensor  # [N, *S] int64: the estimated labels, and the given masks where there are some
    logits: Tensor  # [N, C, *S]


def em_step(
    model: nn.Module,
    images: Tensor,
    present: Tensor,
    *,
    method: EMFixed | EMAdapt | None = None,
    masks: Tensor | None = None,
    strong: Tensor | None = None,
    valid: Tensor | None = None,
    ignore_index: int = -100,
) -> EMStep:
    """One pass of the network, the E-step on its scores, and the loss of the M-step: the mean cross-entropy.

    Args:
        model: images to logits [N, C, *S], or to a mapping that has them as "out", like torchvision's.
        images: [N, ...].
        present: [N, C] bool, the classes of each image; class 0 is the background. Rows of strong images do not matter.
        method: EMAdapt() unless given.
        masks: [N, *S] integers, targets of the strong images: full masks, or those made of boxes.
        strong: [N] bool, the images whose row of `masks` is used; None: all if there are masks. In the paper's
            semi-supervised training a fixed part of each batch.
        valid: [N, *S] bool, pixels that count in the E-step and in the loss (not the padding, for example).
        ignore_index: what masks have where nothing is to be learnt.

    The estimate is a constant: gradients flow through the cross-entropy alone.

    Raises:
        RuntimeError: shapes or types that do not fit.
    """
    output = model(images)
    logits = output["out"] if isinstance(output, Mapping) else output
    if masks is not None and masks.shape != (logits.shape[0], *logits.shape[2:]):
        raise RuntimeError(
            f"em_step: masks must be {[logits.shape[0], *logits.shape[2:]]} like the logits, got {list(masks.shape)}"
        )
    if masks is not None and (masks.is_floating_point() or masks.is_complex()):
        raise RuntimeError(f"em_step: masks must be of integers, got {masks.dtype}")
    if valid is not None and (valid.shape != (logits.shape[0], *logits.shape[2:]) or valid.dtype != torch.bool):
        raise RuntimeError(
            f"em_step: valid must be bool {[logits.shape[0], *logits.shape[2:]]}, got {valid.dtype} {list(valid.shape)}"
        )
    if strong is not None and (masks is None or strong.shape != logits.shape[:1] or strong.dtype != torch.bool):
        raise RuntimeError(
            f"em_step: strong must be bool [{logits.shape[0]}] and come with masks, "
            f"got {strong.dtype} {list(strong.shape)}{' without' if masks is None else ''}"
        )
    if masks is not None and strong is None:
        targets = masks.long()
    else:
        targets = (method or EMAdapt()).labels(logits.detach(), present, valid, ignore_index)
        if masks is not None and strong is not None:
            targets = torch.where(strong.reshape(-1, *[1] * (masks.dim() - 1)), masks.long(), targets)
    if valid is not None:
        targets = targets.masked_fill(~valid, ignore_index)
    return EMStep(cross_entropy(logits, targets, ignore_index=ignore_index), targets, logits)


def image_labels(masks: Tensor, classes: int) -> Tensor:
    """The weak labels of masks [N, *S] of integers: bool [N, classes], which classes each image has."""
    return torch.stack([(masks == c).flatten(1).any(1) for c in range(classes)], 1)


# ---- boxes ----


def box_labels(boxes: Tensor, classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Bbox-Rect (section 3.3): a pixel within a box has its class, within several that of the smallest.

    Args:
        boxes: [K, 4] of x1, y1, x2, y2 in pixels; a pixel is within if its centre is, x1 <= column + 0.5 < x2.
        classes: [K] integers, from 1 on.
        size: height and width.

    Returns: [H, W] int64, 0 outside of all boxes. Of equally large boxes the first counts. O(K H W).
    """
    _check_boxes("box_labels", boxes, classes)
    inside = _inside(boxes, size)
    return (
        torch.where(inside.any(0), classes.long()[_smallest(boxes, inside)], 0) if len(boxes) else _zeros(boxes, size)
    )


def box_crf_labels(image: Tensor, boxes: Tensor, classes: Tensor, *, alpha: float = 0.2, **crf: Any) -> Tensor:
    """Bbox-Seg (section 3.3): boxes cut to the object in them by a dense CRF.

    The middle of a box, `alpha` of its area and of its shape, is fixed to its class and what is outside of all boxes to
    the background; in between the CRF decides, with equal unary energies, between the background and the classes of the
    boxes that a pixel lies in. The paper runs it box by box; one run over all classes of the image builds one lattice,
    and lets boxes that overlap compete. Where middles overlap the smallest box counts.

    Args:
        image: [channels, H, W], as `pyseg.functional.dense_crf` takes it: 0 to 255 for its defaults.
        boxes, classes: as in `box_labels`.
        alpha: from 0 to 1. The paper chooses it and the CRF's parameters on a few full masks.
        crf: further arguments of `dense_crf`: iterations, appearance, spatial_sigma, ...

    Returns: [H, W] int64.
    """
    _check_boxes("box_crf_labels", boxes, classes)
    if not 0 <= alpha <= 1:
        raise RuntimeError(f"box_crf_labels: alpha must be from 0 to 1, got {alpha}")
    size = (image.shape[-2], image.shape[-1])
    if len(boxes) == 0:
        return _zeros(boxes, size)
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * math.sqrt(alpha)
    inside, middle = _inside(boxes, size), _inside(torch.cat([center - half, center + half], 1), size)
    found = torch.unique(classes)
    allowed = torch.stack([inside[classes == c].any(0) for c in found])
    owner = classes[_smallest(boxes, middle)]
    fixed = torch.stack([(owner == c) & middle.any(0) for c in found])
    allowed = torch.where(middle.any(0), fixed, allowed)
    allowed = torch.cat([~middle.any(0)[None], allowed])
    unary = torch.where(allowed, 0.0, math.inf)
    choice = dense_crf(unary[None], image[None], output="labels", **crf)[0]
    return torch.cat([found.new_zeros(1), found]).long()[choice]


def _check_boxes(name: str, boxes: Tensor, classes: Tensor) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise RuntimeError(f"{name}: boxes must be [K, 4], got {list(boxes.shape)}")
    if classes.shape != boxes.shape[:1] or classes.is_floating_point():
        raise RuntimeError(
            f"{name}: classes must be integers [{len(boxes)}], got {classes.dtype} {list(classes.shape)}"
        )


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[K, H, W]: whether a pixel's centre is within a box."""
    y, x = (torch.arange(n, device=boxes.device) + 0.5 for n in size)
    x1, y1, x2, y2 = (edge[:, None] for edge in boxes.unbind(1))
    return ((y1 <= y) & (y < y2))[:, :, None] & ((x1 <= x) & (x < x2))[:, None, :]


def _smallest(boxes: Tensor, inside: Tensor) -> Tensor:
    """[H, W]: the smallest box that a pixel is within; any box where it is within none."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return torch.where(inside, area[:, None, None], math.inf).argmin(0)


def _zeros(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.zeros(size, dtype=torch.int64, device=boxes.device)
