"""segmentation_models_pytorch.losses on pyseg's kernels, with its constructors' arguments, defaults and values.

    from pyseg.compat.smp import DiceLoss     # instead of segmentation_models_pytorch.losses

Values are smp 0.6's for targets of 0 and 1; for soft targets smp takes (p + g - |p - g|) / 2 where these classes take p
* g. Where smp's value has gradient or value NaN, these are finite (pyseg.functional.losses).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyseg.functional.losses._common import Table, problem, ratio, statistics
from pyseg.functional.losses.distribution import cross_entropy, element_map
from pyseg.functional.losses.region import lovasz_hinge_loss, lovasz_softmax_loss, tversky_score

BINARY_MODE = "binary"
MULTICLASS_MODE = "multiclass"
MULTILABEL_MODE = "multilabel"

__all__ = [
    "BINARY_MODE",
    "MULTICLASS_MODE",
    "MULTILABEL_MODE",
    "DiceLoss",
    "FocalLoss",
    "JaccardLoss",
    "LovaszLoss",
    "MCCLoss",
    "SoftBCEWithLogitsLoss",
    "SoftCrossEntropyLoss",
    "TverskyLoss",
]


def _check_mode(mode: str, class_weights: Any = None) -> None:
    if mode not in (BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE):
        raise ValueError(f"mode must be 'binary', 'multiclass' or 'multilabel', got {mode!r}")
    if class_weights is not None and mode == BINARY_MODE:
        raise ValueError("class_weights are not supported with mode=binary")


def _flat(y_pred: Tensor, y_true: Tensor, mode: str, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """[N, C, P] and [N, P] or [N, C, P]. A target that may hold ignore_index becomes integers."""
    images = y_true.shape[0]
    channels = 1 if mode == BINARY_MODE else y_pred.shape[1]
    y_pred = y_pred.reshape(images, channels, -1)
    y_true = y_true.reshape(images, -1) if mode == MULTICLASS_MODE else y_true.reshape(images, channels, -1)
    if y_true.is_floating_point() and (ignore_index is not None or mode == MULTICLASS_MODE):
        y_true = _labels(y_true, ignore_index, mode)
    return y_pred, y_true


def _labels(y_true: Tensor, ignore_index: int | None, mode: str) -> Tensor:
    """Integers from a target of floats that holds integers; soft targets are refused, not cut off."""
    labels = y_true.long()
    if bool((labels != y_true).any()):
        kept = "with ignore_index" if ignore_index is not None else f"in {mode} mode"
        raise ValueError(f"y_true must hold integers {kept}, got other numbers")
    return labels


def _buffer(values: Any) -> Tensor | None:
    return None if values is None else torch.as_tensor(values, dtype=torch.float32)


class _OverlapLoss(nn.Module):
    """1 - score for each class over the batch, 0 for classes without target pixels, averaged."""

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None,
        log_loss: bool,
        from_logits: bool,
        smooth: float,
        ignore_index: int | None,
        eps: float,
        class_weights: Sequence[float] | None,
    ) -> None:
        super().__init__()
        _check_mode(mode, class_weights)
        if classes is not None and mode == BINARY_MODE:
            raise ValueError("classes are not supported with mode=binary")
        self.mode = mode
        self.classes = None if classes is None else [int(c) for c in classes]
        self.log_loss = log_loss
        self.from_logits = from_logits
        self.smooth = smooth
        self.ignore_index = ignore_index
        self.eps = eps
        self.register_buffer("class_weights", _buffer(class_weights), persistent=False)
        self.class_weights: Tensor | None

    def score(self, table: Table) -> Tensor:
        raise NotImplementedError

    def aggregate_loss(self, loss: Tensor) -> Tensor:
        if self.class_weights is None:
            return loss.mean()
        weights = self.class_weights.to(loss)
        weights = weights if self.classes is None else weights[self.classes]
        return (loss * weights).sum() / weights.sum()

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        y_pred, y_true = _flat(y_pred, y_true, self.mode, self.ignore_index)
        name = type(self).__name__
        of = problem(name, y_pred, y_true, self.mode, self.from_logits, self.ignore_index)
        table = statistics(of, region=True, batch=True).select(self.classes)
        score = self.score(table)
        loss = -score.clamp_min(self.eps).log() if self.log_loss else 1 - score
        return self.aggregate_loss(torch.where(table.g > 0, loss, 0.0).squeeze(0)).to(of.wide)


class DiceLoss(_OverlapLoss):
    """segmentation_models_pytorch.losses.DiceLoss."""

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights)

    def score(self, table: Table) -> Tensor:
        return tversky_score(table, 0.5, 0.5, self.smooth)


class JaccardLoss(_OverlapLoss):
    """segmentation_models_pytorch.losses.JaccardLoss."""

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights)

    def score(self, table: Table) -> Tensor:
        return tversky_score(table, 1.0, 1.0, self.smooth)


class TverskyLoss(_OverlapLoss):
    """segmentation_models_pytorch.losses.TverskyLoss: alpha weighs false positives, beta false negatives."""

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights)
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    def score(self, table: Table) -> Tensor:
        return tversky_score(table, self.alpha, self.beta, self.smooth)

    def aggregate_loss(self, loss: Tensor) -> Tensor:
        return super().aggregate_loss(loss) ** self.gamma


class FocalLoss(nn.Module):
    """segmentation_models_pytorch.losses.FocalLoss: a sigmoid for each class in every mode."""

    def __init__(
        self,
        mode: str,
        alpha: float | None = None,
        gamma: float | None = 2.0,
        ignore_index: int | None = None,
        from_logits: bool = True,
        eps: float = 1e-7,
        reduction: str | None = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_mode(mode, class_weights)
        self.mode = mode
        self.alpha = alpha
        self.gamma = 0.0 if gamma is None else gamma
        self.ignore_index = ignore_index
        self.from_logits = from_logits
        self.eps = eps
        self.reduction = reduction
        self.normalized = normalized
        self.reduced_threshold = reduced_threshold
        self.register_buffer("class_weights", _buffer(class_weights), persistent=False)
        self.class_weights: Tensor | None

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        if not self.from_logits:
            y_pred = y_pred.clamp(self.eps, 1 - self.eps)
            y_pred = y_pred.log() if self.mode == MULTICLASS_MODE else y_pred.logit()
        y_pred, y_true = _flat(y_pred, y_true, self.mode, self.ignore_index)
        of = problem("FocalLoss", y_pred, y_true, "multilabel", True, self.ignore_index)
        positive, negative = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        special = self.normalized or self.reduced_threshold is not None
        if self.reduction == "none" and self.mode == BINARY_MODE:
            if special:
                loss, factor, _ = self._special(of, positive, negative)
                loss = loss / factor.sum().clamp_min(1e-6) if self.normalized else loss
            else:
                loss = element_map(of, positive, negative, self.gamma)
            valid = of.valid_elements()
            return (loss.flatten() if valid is None else loss.flatten()[valid.flatten()]).to(of.wide)
        if special:
            loss, factor, counted = self._special(of, positive, negative)
            values, counts = loss.sum((0, 2)), counted.sum((0, 2))
            if self.normalized:
                values = values / factor.sum((0, 2)).clamp_min(1e-6)
        else:
            table = statistics(of, pixel=True, gamma=self.gamma, batch=True)
            values, counts = (positive * table.pos + negative * table.neg).squeeze(0), table.w.squeeze(0)
        classes = values if self.reduction == "sum" else ratio(values, counts, 0.0)
        if self.class_weights is None:
            return classes.mean().to(of.wide)
        weights = self.class_weights.to(classes)
        return ((classes * weights).sum() / weights.sum()).to(of.wide)

    def _special(self, of: Any, positive: float, negative: float) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of the reduced or normalised focal loss, of its factor and of what counts, 0 where ignored."""
        entropy = element_map(of, 1.0, 1.0)
        factor = 1 - torch.exp(-entropy)
        if self.reduced_threshold is None:
            factor = factor**self.gamma
        else:
            reduced = (factor / self.reduced_threshold) ** self.gamma
            factor = torch.where(1 - factor < self.reduced_threshold, 1.0, reduced)
        valid = of.valid_elements()
        counted = torch.ones_like(entropy) if valid is None else valid.to(entropy.dtype).expand_as(entropy)
        g = (
            of.target
            if of.dense
            else of.target.unsqueeze(1) == of.channel(torch.arange(of.logits.shape[1]).to(of.target))
        )
        g = g.to(entropy.dtype)
        factor = factor * counted
        return factor * entropy * (positive * g + negative * (1 - g)), factor, counted


class LovaszLoss(nn.Module):
    """segmentation_models_pytorch.losses.LovaszLoss: hinge in binary and multilabel mode, else softmax."""

    def __init__(
        self, mode: str, per_image: bool = False, ignore_index: int | None = None, from_logits: bool = True
    ) -> None:
        super().__init__()
        _check_mode(mode)
        self.mode = mode
        self.per_image = per_image
        self.ignore_index = ignore_index
        self.from_logits = from_logits  # as in smp, the input is taken for logits either way

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        labels = _labels(y_true, self.ignore_index, self.mode) if y_true.is_floating_point() else y_true
        images = labels.shape[0]
        if self.mode == MULTICLASS_MODE:
            y_pred, labels = _flat(y_pred, labels, self.mode, self.ignore_index)
            return lovasz_softmax_loss(y_pred, labels, ignore_index=self.ignore_index, batch=not self.per_image)
        # All channels are sorted together.
        y_pred, labels = y_pred.reshape(images, 1, -1), labels.reshape(images, -1)
        return lovasz_hinge_loss(y_pred, labels, ignore_index=self.ignore_index, batch=not self.per_image)


class SoftBCEWithLogitsLoss(nn.Module):
    """segmentation_models_pytorch.losses.SoftBCEWithLogitsLoss: its mean divides by all elements."""

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.smooth_factor = smooth_factor
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.weight: Tensor | None
        self.pos_weight: Tensor | None

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        elements = y_pred.numel()
        rows = (y_pred.shape[0], 1, elements // max(y_pred.shape[0], 1))  # -1 has no meaning for an empty batch
        valid = None
        target = y_true
        if self.ignore_index is not None:
            valid = y_true != self.ignore_index
            target = torch.where(valid, y_true, 0)
        target = target.to(torch.float64 if y_pred.dtype == torch.float64 else torch.float32)
        if self.smooth_factor is not None:
            target = (1 - target) * self.smooth_factor + target * (1 - self.smooth_factor)
        of = problem(
            "SoftBCEWithLogitsLoss",
            y_pred.reshape(rows),
            target.reshape(rows),
            BINARY_MODE,
            True,
            None,
        )
        if self.reduction != "none" and self.weight is None and self.pos_weight is None:
            counted = None if valid is None else valid.reshape(rows[0], rows[2]).to(of.wide)
            table = statistics(of, pixel=True, pixel_weight=counted)
            value = (table.pos + table.neg).sum()
            return (value / elements if self.reduction == "mean" else value).to(of.wide)
        positive: Any = 1.0
        if self.pos_weight is not None:
            positive = self.pos_weight.to(target.dtype).expand_as(y_pred).reshape(rows)
        loss = element_map(of, positive, 1.0).view(y_pred.shape)
        loss = loss if self.weight is None else loss * self.weight
        loss = loss if valid is None else loss * valid.view(y_pred.shape)
        return loss.mean() if self.reduction == "mean" else loss.sum() if self.reduction == "sum" else loss


class SoftCrossEntropyLoss(nn.Module):
    """segmentation_models_pytorch.losses.SoftCrossEntropyLoss: its mean divides by all pixels."""

    def __init__(
        self,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        ignore_index: int | None = -100,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.smooth_factor = smooth_factor
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.dim = dim

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        y_pred = y_pred.movedim(self.dim, 1)
        value = cross_entropy(
            y_pred,
            y_true.squeeze(1) if y_true.dim() == y_pred.dim() else y_true,
            ignore_index=self.ignore_index,
            label_smoothing=self.smooth_factor or 0.0,
            reduction="none" if self.reduction == "none" else "sum",
        )
        if self.reduction == "none":
            return value.unsqueeze(self.dim)
        return value / max(y_true.numel(), 1) if self.reduction == "mean" else value


class MCCLoss(nn.Module):
    """segmentation_models_pytorch.losses.MCCLoss: probabilities and a binary target, over the batch."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        images = y_true.shape[0]
        of = problem("MCCLoss", y_pred.reshape(images, 1, -1), y_true.reshape(images, 1, -1), BINARY_MODE, False, None)
        table = statistics(of, region=True, count=True, batch=True)
        tp, fp, fn = table.pg + self.eps, table.p - table.pg + self.eps, table.g - table.pg + self.eps
        tn = table.pixels - table.p - table.g + table.pg + self.eps
        mcc = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
        return (1 - mcc).squeeze().to(of.wide)
