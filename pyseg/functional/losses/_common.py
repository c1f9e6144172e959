"""What the losses share: arguments, the table of statistics, and how a table becomes a loss."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyseg._ops.forward_mode import refuse_tangents

Mode = Literal["multiclass", "multilabel", "binary"]
Reduction = Literal["none", "mean", "sum"]
Absent = Literal["include", "zero", "skip"]
Smooth = float | tuple[float, float]
Weight = Tensor | Sequence[float] | None

_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


# ---- arguments ----


def one_of(loss: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices[:-1]) + f" or {choices[-1]!r}"
        raise ValueError(f"{loss}: {name} must be {expected}, got {value!r}")


def within(loss: str, name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError unless low <= value <= high."""
    if not low <= value <= high:
        interval = f">= {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{loss}: {name} must be {interval}, got {value!r}")


class Problem(NamedTuple):
    """Logits and targets as the operators take them."""

    loss: str  # name, for messages
    mode: str
    logits: Tensor  # [N, C, *S]
    target: Tensor  # labels [N, *S], or dense [N, C, *S]
    activation: str  # softmax, sigmoid or none
    ignore_index: int | None

    @property
    def dense(self) -> bool:
        return self.target.dim() == self.logits.dim()

    @property
    def alternatives(self) -> int:
        """Between how many classes a pixel decides: label smoothing's share is epsilon over this."""
        return self.logits.shape[1] if self.mode == "multiclass" else 2

    @property
    def pixels(self) -> int:
        """Pixels of an image, ignored ones too."""
        return math.prod(self.logits.shape[2:])

    @property
    def wide(self) -> torch.dtype:
        """The loss's dtype: float32 for 16-bit and float32 logits, float64 for float64."""
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    def valid(self) -> Tensor | None:
        """Which pixels [N, *S], or elements [N, C, *S] for dense targets, are not ignored; None for all of them."""
        if self.ignore_index is None:
            return None
        if self.target.dtype != torch.bool:  # a number that the target cannot hold would be wrapped to one that it can
            range_ = torch.iinfo(self.target.dtype)
            if not range_.min <= self.ignore_index <= range_.max:
                return None
        return self.target != self.ignore_index

    def valid_elements(self) -> Tensor | None:
        """Which elements are not ignored, broadcasting against [N, C, *S]; None for all of them."""
        valid = self.valid()
        return valid if valid is None or self.dense else valid.unsqueeze(1)

    def valid_pixels(self) -> Tensor | None:
        """Which pixels [N, *S] are not ignored in any channel; None for all of them."""
        valid = self.valid()
        return valid.all(1) if valid is not None and self.dense else valid

    def channel(self, tensor: Tensor) -> Tensor:
        """A tensor [C] so that it broadcasts against [N, C, *S]."""
        return tensor.view(-1, *[1] * (self.logits.dim() - 2))


def problem(
    loss: str, input: Tensor, target: Tensor, mode: str, from_logits: bool, ignore_index: int | None
) -> Problem:
    """Checks and rearranges a loss's two tensors. The operators check the rest."""
    one_of(loss, "mode", mode, ("multiclass", "multilabel", "binary"))
    if input.dim() < 3:
        raise RuntimeError(f"{loss}: input must be [N, C, *S] with 1 to 3 spatial dimensions, got {list(input.shape)}")
    if mode == "binary":
        if input.shape[1] != 1:
            raise RuntimeError(f"{loss}: input must have one channel in binary mode, got {list(input.shape)}")
        if target.dim() == input.dim() - 1 and target.dtype not in _LABEL_DTYPES:
            target = target.unsqueeze(1)
    labels = (input.shape[0], *input.shape[2:])
    # Compared with the one of as many dimensions: a comparison with the other would fix sizes of an exported graph.
    if target.dim() not in (len(labels), input.dim()) or target.shape != (
        input.shape if target.dim() == input.dim() else labels
    ):
        expected = f"{list(labels)} or {list(input.shape)}"
        raise RuntimeError(f"{loss}: target must be {expected} like input, got {list(target.shape)}")
    activation = "none" if not from_logits else "softmax" if mode == "multiclass" else "sigmoid"
    if target.is_floating_point():
        if target.dim() < input.dim():
            raise RuntimeError(f"{loss}: target must be integers where it holds labels, got {target.dtype}")
        ignore_index = None  # soft targets have no value to spare for it
    return Problem(loss, mode, input, target, activation, ignore_index)


def vector(loss: str, name: str, value: Weight | float, channels: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight per class [C] of `dtype` on like's device; a single number stands for all classes."""
    if isinstance(value, int | float):
        return torch.full((channels,), value, dtype=dtype, device=like.device)
    tensor = torch.as_tensor(value, dtype=dtype, device=like.device)
    if tensor.dim() == 0:
        return tensor.expand(channels)
    if tensor.dim() != 1 or tensor.shape[0] != channels:
        raise ValueError(f"{loss}: {name} must be [{channels}], one value a class, got {list(tensor.shape)}")
    return tensor


def chosen_classes(
    loss: str, channels: int, include_background: bool, classes: Sequence[int] | None
) -> list[int] | None:
    """The classes that take part, or None for all. A single channel is never left out: it is no background."""
    if classes is None:
        return None if include_background or channels == 1 else list(range(1, channels))
    chosen = [int(c) for c in classes]
    if not include_background:
        chosen = [c for c in chosen if c != 0]
    if not chosen or min(chosen) < 0 or max(chosen) >= channels:
        raise ValueError(f"{loss}: classes must name some of 0 to {channels - 1}, got {list(classes)}")
    return chosen


def take(tensor: Tensor, classes: list[int] | None, dim: int) -> Tensor:
    """Some classes of a dimension, by slices alone: an index would have to be copied to the device."""
    if classes is None:
        return tensor
    if classes == list(range(classes[0], classes[0] + len(classes))):
        return tensor.narrow(dim, classes[0], len(classes))
    return torch.stack([tensor.select(dim, c) for c in classes], dim)


# ---- the table ----


class _AllReduce(torch.autograd.Function):
    """The sum over the processes of a group; so is the gradient, since every process's loss depends on every table."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, group: Any) -> Tensor:
        ctx.group = group
        table = table.clone()
        dist.all_reduce(table, group=group)
        return table

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def all_reduce(table: Tensor, group: Any) -> Tensor:
    """`table` summed over the processes of `group`, differentiable; `table` itself without a group."""
    return table if group is None else _AllReduce.apply(table, group)


class Table(NamedTuple):
    """Sums over the pixels that are not ignored, float64; N is 1 for statistics over the batch."""

    sums: Tensor  # [N, C, 11], the first result of torch.ops.pyseg.segmentation_statistics
    n: Tensor | None = None  # [N, C], pixels; where asked for

    @property
    def pg(self) -> Tensor:
        """p * g, [N, C] as all columns."""
        return self.sums[..., 0]

    @property
    def p(self) -> Tensor:
        """p."""
        return self.sums[..., 1]

    @property
    def g(self) -> Tensor:
        """g."""
        return self.sums[..., 2]

    @property
    def pp(self) -> Tensor:
        """p * p."""
        return self.sums[..., 3]

    @property
    def gg(self) -> Tensor:
        """g * g."""
        return self.sums[..., 4]

    @property
    def ppg(self) -> Tensor:
        """p * p * g."""
        return self.sums[..., 5]

    @property
    def pos(self) -> Tensor:
        """w * g * (1 - p)^gamma * -log(p)."""
        return self.sums[..., 6]

    @property
    def neg(self) -> Tensor:
        """w * (1 - g) * p^gamma * -log(1 - p); 0 for softmax."""
        return self.sums[..., 7]

    @property
    def wg(self) -> Tensor:
        """w * g."""
        return self.sums[..., 8]

    @property
    def w(self) -> Tensor:
        """w."""
        return self.sums[..., 9]

    @property
    def nll(self) -> Tensor:
        """w * -log(p)."""
        return self.sums[..., 10]

    @property
    def pixels(self) -> Tensor:
        """n, where it was asked for."""
        assert self.n is not None
        return self.n

    def select(self, classes: list[int] | None) -> "Table":
        """The rows of some classes."""
        return Table(take(self.sums, classes, 1), None if self.n is None else take(self.n, classes, 1))

    def over_batch(self, batch: bool = True) -> "Table":
        """Sums over the images too, if `batch`."""
        if not batch:
            return self
        return Table(self.sums.sum(0, keepdim=True), None if self.n is None else self.n.sum(0, keepdim=True))

    def smoothed(self, epsilon: float, classes: int) -> "Table":
        """The region columns of the target (1 - epsilon) * g + epsilon / classes."""
        if epsilon == 0:
            return self
        keep, share = 1 - epsilon, epsilon / classes
        pg = keep * self.pg + share * self.p
        g = keep * self.g + share * self.pixels
        gg = keep**2 * self.gg + 2 * keep * share * self.g + share**2 * self.pixels
        ppg = keep * self.ppg + share * self.pp
        region = torch.stack([pg, self.p, g, self.pp, gg, ppg], -1)
        return self._replace(sums=torch.cat([region, self.sums[..., 6:]], -1))


def statistics(
    of: Problem,
    *,
    region: bool = False,
    pixel: bool = False,
    pixel_weight: Tensor | None = None,
    gamma: float = 0.0,
    nll: bool = False,
    count: bool = False,
    batch: bool = False,
    group: Any = None,
) -> Table:
    """One pass over the logits.

    With `batch` the table is that of the whole batch, [1, C]; with `group`, which needs it, that of the batches of all
    processes together.
    """
    if group is not None and not batch:
        raise ValueError(f"{of.loss}: group needs batch=True, got batch=False")
    refuse_tangents(of.loss, of.logits)
    sums: Tensor
    sums, _ = torch.ops.pyseg.segmentation_statistics(
        of.logits,
        of.target,
        pixel_weight,
        of.activation,
        of.ignore_index,
        float(gamma),
        region,
        pixel,
        nll,
    )
    n = _count(of, sums) if count else None
    table = Table(sums, n).over_batch(batch)
    if group is not None:
        table = Table(all_reduce(table.sums, group), None if table.n is None else all_reduce(table.n, group))
    return table


def _count(of: Problem, sums: Tensor) -> Tensor:
    """Pixels that are not ignored, [N, C]."""
    valid = of.valid()
    if valid is None:
        return sums.new_full(sums.shape[:2], of.pixels)
    count = valid.flatten(2 if of.dense else 1).sum(-1).to(sums.dtype)
    return count if of.dense else count.unsqueeze(1).expand(sums.shape[:2])


# ---- from a table to a loss ----


def smooths(smooth: Smooth) -> tuple[float, float]:
    """What is added to numerator and denominator."""
    return smooth if isinstance(smooth, tuple) else (smooth, smooth)


def score(numerator: Tensor, denominator: Tensor, smooth: Smooth) -> Tensor:
    """(numerator + s) / (denominator + s'), and 1 with gradient zero for 0 / 0."""
    above, below = smooths(smooth)
    if below > 0:  # sums of probabilities are not negative
        return (numerator + above) / (denominator + below)
    return ratio(numerator + above, denominator)


def ratio(numerator: Tensor, denominator: Tensor, empty: float = 1.0) -> Tensor:
    """numerator / denominator, and `empty` with gradient zero where the denominator is zero."""
    zero = denominator == 0
    return torch.where(zero, empty, numerator / torch.where(zero, 1.0, denominator))


def add_ratio(of: Problem, value: Tensor, total: Tensor, reduction: str) -> Tensor:
    """Of each image's sum and what its mean divides by, [N] each: their ratios, or the ratio or sum of all."""
    if reduction == "none":
        return ratio(value, total, 0.0).to(of.wide)
    return (value.sum() if reduction == "sum" else ratio(value.sum(), total.sum(), 0.0)).to(of.wide)


def safe_pow(base: Tensor, exponent: float) -> Tensor:
    """base^exponent for base >= 0, whose gradient for exponents below 1 stays finite at 0 (and is 0 there)."""
    if exponent == 1.0:
        return base
    return base.clamp_min(1e-12 if exponent < 1 else 0.0) ** exponent


def check_reduction(loss: str, reduction: str, absent: str = "include") -> None:
    """Raises ValueError for names that are none."""
    one_of(loss, "reduction", reduction, ("none", "mean", "sum"))
    one_of(loss, "absent", absent, ("include", "zero", "skip"))


def _weighted(loss: Tensor, weight: Tensor | None, present: Tensor | None, absent: str) -> tuple[Tensor, Tensor]:
    """weight * loss and the weights that a mean divides by, [N, C]."""
    weights = torch.ones_like(loss) if weight is None else weight.to(loss.dtype).expand_as(loss)
    if absent != "include":
        assert present is not None
        loss = torch.where(present, loss, 0.0)
        if absent == "skip":
            weights = torch.where(present, weights, 0.0)
    return loss * weights, weights


def image_means(loss: Tensor, weight: Tensor | None, present: Tensor | None, absent: str) -> Tensor:
    """sum(weight * loss) / sum(weight) over the classes that count, [N]; 0 where none does."""
    weighted, weights = _weighted(loss, weight, present, absent)
    return ratio(weighted.sum(1), weights.sum(1), 0.0)


def reduce_table(
    loss: Tensor,
    of: Problem,
    reduction: str,
    weight: Tensor | None = None,
    present: Tensor | None = None,
    absent: str = "include",
    batch: bool = False,
) -> Tensor:
    """A loss per image and class [N, C] to what a function returns, in the loss's dtype.

    none: weight * loss, [N, C], or [C] with `batch`. sum: its sum. mean: per image sum(weight * loss) / sum(weight)
    over the classes that count, then the mean over the images that have such classes; 0 where none has.
    """
    if weight is None and absent == "include" and reduction == "mean":  # the usual case, in fewer operators
        return (loss.mean() if loss.numel() else loss.sum()).to(of.wide)
    weighted, weights = _weighted(loss, weight, present, absent)
    if reduction == "none":
        return (weighted.squeeze(0) if batch else weighted).to(of.wide)
    if reduction == "sum":
        return weighted.sum().to(of.wide)
    totals = weights.sum(1)
    images = ratio(weighted.sum(1), totals, 0.0)
    return ratio(images.sum(), (totals != 0).sum().to(images.dtype), 0.0).to(of.wide)
