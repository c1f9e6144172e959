"""monai.losses on pyseg's kernels, with its constructors' arguments, defaults and values.

    from pyseg.compat.monai import DiceCELoss     # instead of monai.losses

Targets are [N, C, *S], or [N, 1, *S] labels with to_onehot_y=True; the one-hot form is never made. Values are MONAI
1.6's. `other_act` runs as given and the kernel takes its result for probabilities. soft_label=True is refused: MONAI
then takes (|p| + |g| - |p - g|) / 2 for p * g, which is the same for targets of 0 and 1, so leave it out for those.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyseg.functional.losses import boundary, compound, distribution, region
from pyseg.functional.losses._common import Problem, chosen_classes, problem, ratio, statistics, vector

__all__ = [
    "AsymmetricUnifiedFocalLoss",
    "BoundaryLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "HausdorffDTLoss",
    "LogHausdorffDTLoss",
    "MCCLoss",
    "TverskyLoss",
]

_IGNORED = 255  # marks elements of integer dense targets
_WeightLike = Sequence[float] | float | int | Tensor | None


def _reduction(reduction: Any) -> Any:
    name = str(getattr(reduction, "value", reduction))
    if name not in ("none", "mean", "sum"):
        raise ValueError(f"Unsupported reduction: {name}, available options are ['mean', 'sum', 'none'].")
    return name


def _lambda(name: str, value: float) -> float:
    if value < 0.0:
        raise ValueError(f"{name} should be no less than 0.0.")
    return value


class _Loss(nn.Module):
    """Activation, target and reduction, as MONAI's losses take them."""

    def __init__(
        self, include_background: bool, to_onehot_y: bool, sigmoid: bool, softmax: bool,
        other_act: Callable[[Tensor], Tensor] | None, reduction: Any, batch: bool, ignore_index: int | None = None,
        soft_label: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
        if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
            raise ValueError("Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not None].")
        if soft_label:
            raise NotImplementedError("soft_label=True has no kernel: for targets of 0 and 1 leave it out")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.reduction = _reduction(reduction)
        self.batch = batch
        self.ignore_index = ignore_index

    def prepare(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Input, target and what else the functions of pyseg.functional.losses must know of them."""
        if self.other_act is not None:
            input = self.other_act(input)
        softmax = self.softmax and input.shape[1] > 1
        target, ignore_index = _target(input, target, self.to_onehot_y, self.ignore_index)
        return input, target, {
            "mode": "multiclass" if softmax else "multilabel",
            "from_logits": softmax or self.sigmoid,
            "ignore_index": ignore_index,
            "include_background": self.include_background,
        }  # fmt: skip

    def shaped(self, loss: Tensor, input: Tensor) -> Tensor:
        """reduction="none" keeps spatial dimensions of size 1."""
        return loss.view(*loss.shape, *[1] * (input.dim() - 2)) if self.reduction == "none" else loss


def _target(input: Tensor, target: Tensor, to_onehot_y: bool, ignore_index: int | None) -> tuple[Tensor, int | None]:
    if to_onehot_y and input.shape[1] > 1:
        target = target.squeeze(1) if target.dim() == input.dim() else target
        return (target.long() if target.is_floating_point() else target), ignore_index
    if target.shape != input.shape:
        raise AssertionError(f"ground truth has different shape ({target.shape}) from input ({input.shape})")
    if ignore_index is None:
        return target, None
    channels = target.shape[1]
    if channels == 1:
        ignored = target == ignore_index
    elif 0 <= ignore_index < channels:
        ignored = target[:, ignore_index : ignore_index + 1] == 1
    else:
        ignored = (target == 0).all(1, keepdim=True)
    labels = target.to(torch.int16)
    if bool(((labels != target) & ~ignored).any()):
        raise ValueError("target must hold integers with ignore_index, got other numbers")
    return labels.masked_fill(ignored, _IGNORED), _IGNORED


class DiceLoss(_Loss):
    """monai.losses.DiceLoss."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Any = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: _WeightLike = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, batch, ignore_index, soft_label
        )
        self.squared_pred = squared_pred
        self.jaccard = jaccard
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))
        self.class_weight: Tensor | None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        input, target, how = self.prepare(input, target)
        smooth = (self.smooth_nr, self.smooth_dr)
        function: Any = region.dice_loss
        if self.jaccard:
            function, smooth = region.jaccard_loss, (self.smooth_nr / 2, self.smooth_dr / 2)
        how.update(squared=self.squared_pred, smooth=smooth, batch=self.batch)
        if self.class_weight is None or input.shape[1] == 1:
            return self.shaped(function(input, target, reduction=self.reduction, **how), input)
        loss = function(input, target, reduction="none", **how)
        loss = loss * vector("DiceLoss", "weight", self.class_weight, loss.shape[-1], loss, loss.dtype)
        return loss.mean() if self.reduction == "mean" else loss.sum() if self.reduction == "sum" else self.shaped(
            loss, input
        )  # fmt: skip


class GeneralizedDiceLoss(_Loss):
    """monai.losses.GeneralizedDiceLoss."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        w_type: Any = "square",
        reduction: Any = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, batch, None, soft_label
        )
        self.w_type = str(getattr(w_type, "value", w_type))
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        input, target, how = self.prepare(input, target)
        how.update(w_type=self.w_type, smooth=(self.smooth_nr, self.smooth_dr), batch=self.batch)
        loss = region.generalized_dice_loss(input, target, reduction=self.reduction, **how)
        if self.reduction == "none" and not self.batch:
            loss = loss.unsqueeze(1)
        return self.shaped(loss, input)


class TverskyLoss(_Loss):
    """monai.losses.TverskyLoss: alpha weighs false positives, beta false negatives."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: Any = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, batch, ignore_index, soft_label
        )
        self.alpha = alpha
        self.beta = beta
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        input, target, how = self.prepare(input, target)
        how.update(alpha=self.alpha, beta=self.beta, smooth=(self.smooth_nr, self.smooth_dr), batch=self.batch)
        return region.tversky_loss(input, target, reduction=self.reduction, **how)


class MCCLoss(_Loss):
    """monai.losses.MCCLoss."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: Any = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        batch: bool = False,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, batch)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        input, target, how = self.prepare(input, target)
        how.update(smooth=(self.smooth_nr, self.smooth_dr), batch=self.batch)
        return region.mcc_loss(input, target, reduction=self.reduction, **how)


class HausdorffDTLoss(_Loss):
    """monai.losses.HausdorffDTLoss."""

    def __init__(
        self,
        alpha: float = 2.0,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: Any = "mean",
        batch: bool = False,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, batch)
        self.alpha = alpha

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        input, target, how = self.prepare(input, target)
        loss = boundary.hausdorff_dt_loss(
            input, target, alpha=self.alpha, reduction=self.reduction, batch=self.batch, **how
        )
        if self.reduction == "none" and self.batch:
            loss = loss.unsqueeze(0)
        return self.shaped(loss, input)


class LogHausdorffDTLoss(HausdorffDTLoss):
    """monai.losses.LogHausdorffDTLoss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).log1p()


class BoundaryLoss(_Loss):
    """monai.losses.BoundaryLoss."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: Any = "mean",
        batch: bool = False,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, batch)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        input, target, how = self.prepare(input, target)
        return boundary.boundary_loss(input, target, reduction=self.reduction, batch=self.batch, **how)


class FocalLoss(_Loss):
    """monai.losses.FocalLoss: its mean divides by elements, its "sum" is a mean over the pixels."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: float = 2.0,
        alpha: float | Sequence[float] | None = None,
        weight: _WeightLike = None,
        reduction: Any = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background, to_onehot_y, not use_softmax, use_softmax, None, reduction, False,
                         ignore_index)  # fmt: skip
        self.gamma = gamma
        self.alpha = alpha
        self.use_softmax = use_softmax
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))
        self.class_weight: Tensor | None

    def _problem(self, input: Tensor, target: Tensor) -> tuple[Problem, list[int]]:
        """The problem, and which of its channels count. MONAI's softmax without background drops channel 0."""
        target, ignore_index = _target(input, target, self.to_onehot_y, self.ignore_index)
        mode = "multiclass" if self.use_softmax else "multilabel"
        chosen = chosen_classes("FocalLoss", input.shape[1], self.include_background, None)
        if self.use_softmax and chosen is not None:
            input = input[:, 1:]
            if target.dim() == input.dim():
                target = target[:, 1:]
            else:  # class 0 has no channel: such pixels add nothing, like ignored ones
                target = target.long() - 1
                target = target if ignore_index is None else target.masked_fill(target == ignore_index - 1, -1)
                ignore_index = -1
            chosen = None
        of = problem("FocalLoss", input, target, mode, True, ignore_index)
        return of, list(range(input.shape[1])) if chosen is None else chosen

    def _factors(self, of: Problem, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """What positives and negatives of each channel are multiplied by, [C]; 0 for channels that do not count."""
        count = len(chosen)
        positive = torch.ones(count, dtype=torch.float64, device=of.logits.device)
        negative = positive.clone()
        if isinstance(self.alpha, (int, float)):
            if not self.use_softmax:
                positive, negative = positive * self.alpha, negative * (1 - self.alpha)
            elif self.include_background:
                positive = positive * self.alpha
                positive[0] = 1 - self.alpha
        elif self.alpha is not None:
            positive = vector("FocalLoss", "alpha", self.alpha, count, of.logits, torch.float64)
        if self.class_weight is not None:
            weight = vector("FocalLoss", "weight", self.class_weight, count, of.logits, torch.float64)
            positive, negative = positive * weight, negative * weight
        padding = positive.new_zeros(of.logits.shape[1] - count)
        return torch.cat([padding, positive]), torch.cat([padding, negative])

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        of, chosen = self._problem(input, target)
        positive, negative = self._factors(of, chosen)
        if self.reduction == "none":
            return self._map(of, positive, negative)[:, chosen]
        table = statistics(of, pixel=True, gamma=self.gamma)
        values = (positive * table.pos + negative * table.neg).sum(1)  # [N]
        if self.ignore_index is None:
            pixels = values.new_full(values.shape, of.pixels)
            elements = pixels * len(chosen)
        else:  # the mask that MONAI divides by has one channel
            labels, ignored = _target(input, target, self.to_onehot_y, self.ignore_index)
            valid = labels.ne(ignored)  # type: ignore[arg-type]
            pixels = (valid if labels.dim() < input.dim() else valid[:, 0]).flatten(1).sum(1).to(values.dtype)
            elements = pixels
        if self.reduction == "sum":
            return ratio(values, pixels, 0.0).sum().to(of.wide)
        return ratio(values.sum(), elements.sum(), 0.0).to(of.wide)

    def _map(self, of: Problem, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of each element, [N, C, *S]."""
        positive, negative = (of.channel(factor.to(of.wide)) for factor in (positive, negative))
        if not self.use_softmax:
            return distribution.element_map(of, positive, negative, self.gamma)
        entropy = distribution.class_map(of, None, self.gamma).unsqueeze(1)
        if of.dense and of.target.is_floating_point():
            log_p = of.logits.to(of.wide).log_softmax(1)
            return positive * of.target * (1 - log_p.exp()) ** self.gamma * -log_p
        g = of.target == 1 if of.dense else distribution.one_hot(of)
        return positive * torch.where(g, entropy, 0.0)


class DiceCELoss(nn.Module):
    """monai.losses.DiceCELoss. One pass over the logits where Dice and cross-entropy take the same activation."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if _reduction(reduction) == "none":
            raise ValueError("reduction must be 'mean' or 'sum', got 'none'")
        dice_weight = weight[1:] if weight is not None and not include_background else weight
        self.dice = DiceLoss(include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard,
                             reduction, smooth_nr, smooth_dr, batch, dice_weight)  # fmt: skip
        self.register_buffer("weight", weight)
        self.weight: Tensor | None
        self.reduction = _reduction(reduction)
        self.label_smoothing = label_smoothing
        self.lambda_dice = _lambda("lambda_dice", lambda_dice)
        self.lambda_ce = _lambda("lambda_ce", lambda_ce)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.dim() != target.dim():
            raise ValueError(
                "the number of dimensions for input and target should be the same, "
                f"got shape {input.shape} and {target.shape}"
            )
        if target.shape[1] not in (1, input.shape[1]):
            raise ValueError(f"target must have 1 or {input.shape[1]} channels, got {target.shape}")
        binary, dice = input.shape[1] == 1, self.dice
        if self.weight is None and not dice.jaccard and (dice.sigmoid if binary else dice.softmax):
            prepared, labels, how = dice.prepare(input, target)
            return compound.dice_ce_loss(
                prepared, labels, lambda_dice=self.lambda_dice, lambda_ce=self.lambda_ce, squared=dice.squared_pred,
                smooth=(dice.smooth_nr, dice.smooth_dr), label_smoothing=0.0 if binary else self.label_smoothing,
                reduction=self.reduction, batch=dice.batch, **how,
            )  # fmt: skip
        return self.lambda_dice * dice(input, target) + self.lambda_ce * self._entropy(input, target, binary)

    def _entropy(self, input: Tensor, target: Tensor, binary: bool) -> Tensor:
        reduction: Any = self.reduction
        if binary:
            return distribution.weighted_binary_cross_entropy(
                input, target, beta=1.0 if self.weight is None else self.weight, mode="multilabel", reduction=reduction
            )
        if target.shape[1] == 1:
            target = target.squeeze(1).long()
        elif not target.is_floating_point():
            target = target.to(input.dtype)
        return distribution.cross_entropy(
            input, target, self.weight, label_smoothing=self.label_smoothing, reduction=reduction
        )


class DiceFocalLoss(nn.Module):
    """monai.losses.DiceFocalLoss, whose focal part always takes the sigmoid; one pass if Dice does too."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: _WeightLike = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard,
                             reduction, smooth_nr, smooth_dr, batch, weight)  # fmt: skip
        self.focal = FocalLoss(include_background, to_onehot_y, gamma, alpha, weight, reduction)
        self.lambda_dice = _lambda("lambda_dice", lambda_dice)
        self.lambda_focal = _lambda("lambda_focal", lambda_focal)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        dice, focal = self.dice, self.focal
        whole = dice.include_background or input.shape[1] == 1
        plain = dice.class_weight is None and not dice.jaccard and dice.reduction == "mean"
        if dice.sigmoid and whole and plain:
            prepared, labels, how = dice.prepare(input, target)
            return compound.dice_focal_loss(
                prepared, labels, lambda_dice=self.lambda_dice, lambda_focal=self.lambda_focal, alpha=focal.alpha,
                gamma=focal.gamma, squared=dice.squared_pred, smooth=(dice.smooth_nr, dice.smooth_dr), batch=dice.batch,
                **how,
            )  # fmt: skip
        return self.lambda_dice * dice(input, target) + self.lambda_focal * focal(input, target)


class GeneralizedDiceFocalLoss(nn.Module):
    """monai.losses.GeneralizedDiceFocalLoss."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        w_type: Any = "square",
        reduction: Any = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: _WeightLike = None,
        lambda_gdl: float = 1.0,
        lambda_focal: float = 1.0,
    ) -> None:
        super().__init__()
        self.generalized_dice = GeneralizedDiceLoss(include_background, to_onehot_y, sigmoid, softmax, other_act,
                                                    w_type, reduction, smooth_nr, smooth_dr, batch)  # fmt: skip
        self.focal = FocalLoss(include_background, to_onehot_y, gamma, None, weight, reduction)
        self.lambda_gdl = _lambda("lambda_gdl", lambda_gdl)
        self.lambda_focal = _lambda("lambda_focal", lambda_focal)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.lambda_gdl * self.generalized_dice(input, target) + self.lambda_focal * self.focal(input, target)


class AsymmetricUnifiedFocalLoss(nn.Module):
    """monai.losses.AsymmetricUnifiedFocalLoss: probabilities of two classes, or of the foreground alone.

    As in MONAI the result is always the mean.
    """

    def __init__(
        self,
        to_onehot_y: bool = False,
        num_classes: int = 2,
        weight: float = 0.5,
        gamma: float = 0.5,
        delta: float = 0.7,
        reduction: Any = "mean",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes != 2:
            raise ValueError(f"num_classes must be 2, got {num_classes}")
        self.to_onehot_y = to_onehot_y
        self.num_classes = num_classes
        self.weight = weight
        self.gamma = gamma
        self.delta = delta
        self.reduction = _reduction(reduction)
        self.ignore_index = ignore_index

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        target, ignore_index = _target(y_pred, y_true, self.to_onehot_y, self.ignore_index)
        return compound.unified_focal_loss(
            y_pred, target, lambda_focal=self.weight, delta=self.delta, gamma=self.gamma,
            mode="binary" if y_pred.shape[1] == 1 else "multiclass", from_logits=False, ignore_index=ignore_index,
        )  # fmt: skip
