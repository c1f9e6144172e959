"""Losses, forward and backward: a multiclass batch of 4x21x512x512 logits, a binary one of 8x1x512x512, a volume of
1x2x96x96x96; beside torch, torch.compile of a formulation without one-hot tensors, smp, MONAI and kornia.

Peers whose mean divides by something else are rescaled, so that all compute the same number. Logits and labels are
smooth random maps, so that there are regions with boundaries. The floor is two reads of the logits, one write of the
gradient and two reads of the target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Case, Contender, Prepared, Workload

BASELINE = "torch"
TOLERANCE = 3e-4  # kornia sums in float32
FAMILY_NOTES = {  # measured reasons, by the summary's row
    "Dice, binary": "torch.compile fuses each pass into one loop, and so do we; of ours 150 us are PyTorch's operators "
    "on the table of sums, and the kernels take 1.2 ms where tensors are in the caches, which the peers empty "
    "in between",
    "Tversky, multiclass": "at 2.6 times the bytes floor, with one exponential a logit in either direction; "
    "torch.compile takes a quarter with AVX-512 of what it took with AVX2 when the target was set",
    "Dice + cross-entropy, multiclass": "as Tversky, and pixel columns besides",
    "Dice, multiclass": "as Tversky: the sum over the classes comes before the gradient, so its backward pass is two",
    "Hausdorff by distances, multiclass": "42 squared distance transforms an image; those outside of a class, long "
    "distances, are most of the time",
    "Dice + cross-entropy, volume": "kernels are 3.8 of 4.5 ms: with two classes most is what a pixel costs whatever "
    "the number of classes (its 64-bit label, index, weight, rows of sums)",
}
SMOOTH = 1e-5
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A loss of one input, as pyseg, torch and the libraries compute it; `definition` runs in float64."""

    name: str
    ours: Callable[[], Loss]
    definition: Loss
    torch: Loss | None = None  # left out: the definition
    compiled: Loss | None = None
    peers: dict[str, Callable[[], Loss]] = field(default_factory=dict)
    quick: tuple[int, ...] = ()
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Input:
    name: str
    shape: tuple[int, ...]
    subjects: tuple[Subject, ...]


def cases() -> list[Case]:
    inputs = (
        Input("multiclass", (4, 21, 512, 512), _multiclass()),
        Input("binary", (8, 1, 512, 512), _binary()),
        Input("volume", (1, 2, 96, 96, 96), _volume()),
    )
    return [_case(input, subject) for input in inputs for subject in input.subjects]


# ---- one case ----


def _case(input: Input, subject: Subject) -> Case:
    def build() -> Workload:
        logits, target = _maps(input.shape)

        def step(loss: Loss, x: Tensor) -> Callable[[], list[Tensor]]:
            x = x.detach().requires_grad_()

            def call() -> list[Tensor]:
                value = loss(x, target)
                return [value.detach(), *torch.autograd.grad(value, x)]

            return call

        def contender(name: str, make: Callable[[], Loss], ours: bool = False) -> Contender:
            return Contender(name, lambda: Prepared(step(make(), logits)), ours)

        contenders = [contender(BASELINE, lambda: subject.torch or subject.definition)]
        if subject.compiled is not None:
            contenders.append(contender("torch.compile", lambda: torch.compile(subject.compiled, dynamic=False)))
        contenders += [contender(name, make) for name, make in subject.peers.items()]
        contenders.append(contender("pyseg", subject.ours, ours=True))
        return Workload(contenders, lambda: step(subject.definition, logits.double())())

    elements = 1
    for size in input.shape:
        elements *= size
    # Logits read twice and their gradient written, in float32; labels of int64 read twice.
    least = 3 * 4 * elements + 2 * 8 * elements // input.shape[1]
    return Case(
        name=f"losses/{input.name}/{subject.name}",
        groups=("losses", f"{subject.name}, {input.name}"),
        build=build,
        params={"shape": list(input.shape), "dtype": "float32"},
        baseline=BASELINE,
        tolerance=subject.tolerance,
        least=lambda: (0, least),
        inference=False,
        quick=subject.quick,
    )


def _maps(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mode = "bilinear" if len(shape) == 4 else "trilinear"

    def smooth() -> Tensor:
        small = torch.randn(shape[:2] + tuple(max(size // 24, 2) for size in shape[2:]), generator=generator)
        return F.interpolate(small, shape[2:], mode=mode, align_corners=True)

    logits, other = 3 * smooth(), smooth()
    noise = 0.3 * torch.randn(shape, generator=generator)
    return logits + noise, other.argmax(1) if shape[1] > 1 else (other > 0).squeeze(1).long()


# ---- formulations in torch ----


def _one_hot(x: Tensor, target: Tensor) -> Tensor:
    """As a comparison, which torch.compile fuses."""
    if x.shape[1] == 1:
        return target.unsqueeze(1).to(x.dtype)
    classes = torch.arange(x.shape[1], device=x.device).view(1, -1, *[1] * (x.dim() - 2))
    return (target.unsqueeze(1) == classes).to(x.dtype)


def _probability(x: Tensor) -> Tensor:
    return x.sigmoid() if x.shape[1] == 1 else x.softmax(1)


def _sums(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, g = _probability(x), _one_hot(x, target)
    dims = tuple(range(2, x.dim()))
    return (p * g).sum(dims), p.sum(dims), g.sum(dims)


def _sums_by_scatter(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without a one-hot tensor: the faster way in eager mode."""
    if x.shape[1] == 1:
        return _sums(x, target)
    p, labels = x.softmax(1).flatten(2), target.flatten(1)
    empty = p.new_zeros(p.shape[:2])
    hit = empty.scatter_add(1, labels, p.gather(1, labels.unsqueeze(1)).squeeze(1))
    return hit, p.sum(2), empty.scatter_add(1, labels, torch.ones_like(labels, dtype=p.dtype))


def _dice(sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    hit, p, g = sums
    return 1 - ((2 * hit + SMOOTH) / (p + g + SMOOTH)).mean()


def _tversky(sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    hit, p, g = sums
    return 1 - ((hit + SMOOTH) / (hit + 0.3 * (p - hit) + 0.7 * (g - hit) + SMOOTH)).mean()


def _entropy(x: Tensor, target: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(x, target.unsqueeze(1).to(x.dtype))
    return F.cross_entropy(x, target)


def _softmax_focal(x: Tensor, target: Tensor) -> Tensor:
    entropy = F.cross_entropy(x, target, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


def _sigmoid_focal(x: Tensor, target: Tensor) -> Tensor:
    g = target.unsqueeze(1).to(x.dtype)
    entropy = F.binary_cross_entropy_with_logits(x, g, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


def _lovasz(x: Tensor, target: Tensor) -> Tensor:
    """Per image, over all classes."""
    p, g = x.softmax(1).flatten(2), _one_hot(x, target).flatten(2)
    errors, order = (g - p).abs().sort(2, descending=True)
    g = g.gather(2, order)
    total = g.sum(2, keepdim=True)
    jaccard = 1 - (total - g.cumsum(2)) / (total + (1 - g).cumsum(2))
    return (errors * torch.diff(jaccard, dim=2, prepend=torch.zeros_like(jaccard[..., :1]))).sum(2).mean()


def _hausdorff(x: Tensor, target: Tensor) -> Tensor:
    """With scipy's distance transforms."""
    from scipy.ndimage import distance_transform_edt

    def squared(mask: Tensor) -> Tensor:
        inside = mask.numpy()
        if inside.all() or not inside.any():
            return torch.zeros(mask.shape, dtype=x.dtype)
        return torch.from_numpy(distance_transform_edt(inside) + distance_transform_edt(~inside)).to(x.dtype) ** 2

    p, g = _probability(x), _one_hot(x, target)
    with torch.no_grad():
        maps = [squared(a > 0.5) + squared(b > 0.5) for a, b in zip(p.flatten(0, 1), g.flatten(0, 1), strict=True)]
    return ((p - g) ** 2 * torch.stack(maps).view_as(p)).mean()


# ---- the libraries' losses ----


def _monai(name: str, scale: float = 1.0, **arguments: Any) -> Callable[[], Loss]:
    def make() -> Loss:
        import monai.losses

        loss = getattr(monai.losses, name)(**arguments)
        # Its distances would be truncated to integers like the target.
        return lambda x, target: scale * loss(x, target.unsqueeze(1).to(x.dtype if x.shape[1] == 1 else target.dtype))

    return make


def _kornia(name: str, scale: float = 1.0, channel: bool = False, **arguments: Any) -> Callable[[], Loss]:
    def make() -> Loss:
        import kornia.losses

        loss = getattr(kornia.losses, name)
        return lambda x, target: scale * loss(x, target.unsqueeze(1) if channel else target, **arguments)

    return make


def _smp(name: str, *arguments: Any, **keywords: Any) -> Callable[[], Loss]:
    def make() -> Loss:
        import segmentation_models_pytorch.losses as smp

        return getattr(smp, name)(*arguments, **keywords)

    return make


def _torchvision_focal() -> Loss:
    from torchvision.ops import sigmoid_focal_loss

    return lambda x, target: sigmoid_focal_loss(x, target.unsqueeze(1).to(x.dtype), alpha=-1, reduction="mean")


def _ours(name: str, **arguments: Any) -> Callable[[], Loss]:
    def make() -> Loss:
        import pyseg.functional

        function = getattr(pyseg.functional, name)
        return lambda x, target: function(x, target, **arguments)

    return make


# ---- which losses ----

_SOFTMAX = {"softmax": True, "to_onehot_y": True}
_TVERSKY = {"alpha": 0.3, "beta": 0.7}


def _multiclass() -> tuple[Subject, ...]:
    def dice_ce(x: Tensor, target: Tensor) -> Tensor:
        return _dice(_sums(x, target)) + _entropy(x, target)

    def over_batch(x: Tensor, target: Tensor) -> Tensor:
        hit, p, g = (column.sum(0) for column in _sums(x, target))
        return 1 - (2 * hit / (p + g)).mean()

    return (
        Subject(
            "cross-entropy",
            _ours("cross_entropy"),
            _entropy,
            compiled=_entropy,
            peers={"smp": _smp("SoftCrossEntropyLoss", smooth_factor=0.0)},
            quick=(1, 2),
        ),
        Subject(
            "Dice",
            _ours("dice_loss"),
            lambda x, t: _dice(_sums(x, t)),
            lambda x, t: _dice(_sums_by_scatter(x, t)),
            lambda x, t: _dice(_sums(x, t)),
            {"MONAI": _monai("DiceLoss", **_SOFTMAX), "kornia": _kornia("dice_loss", average="macro", eps=SMOOTH)},
        ),
        Subject(
            "Dice over the batch",
            _ours("dice_loss", smooth=0.0, batch=True),
            over_batch,
            compiled=over_batch,
            peers={"smp": _smp("DiceLoss", "multiclass")},
            tolerance=5e-3,  # smp subtracts large sums in float32
        ),
        Subject(
            "focal",
            _ours("focal_loss"),
            _softmax_focal,
            compiled=_softmax_focal,
            peers={
                "MONAI": _monai("FocalLoss", 21.0, use_softmax=True, to_onehot_y=True),
                "kornia": _kornia("focal_loss", 21.0, alpha=None, reduction="mean"),
            },
        ),
        Subject(
            "Tversky",
            _ours("tversky_loss"),
            lambda x, t: _tversky(_sums(x, t)),
            lambda x, t: _tversky(_sums_by_scatter(x, t)),
            lambda x, t: _tversky(_sums(x, t)),
            {
                "MONAI": _monai("TverskyLoss", **_SOFTMAX, **_TVERSKY),
                "kornia": _kornia("tversky_loss", **_TVERSKY, eps=SMOOTH),
            },
        ),
        Subject(
            "Dice + cross-entropy",
            _ours("dice_ce_loss"),
            dice_ce,
            lambda x, t: _dice(_sums_by_scatter(x, t)) + _entropy(x, t),
            dice_ce,
            {"MONAI": _monai("DiceCELoss", **_SOFTMAX)},
            quick=(1, 2),
        ),
        Subject(
            "Lovasz",
            _ours("lovasz_softmax_loss", batch=False, absent="include"),
            _lovasz,
            compiled=_lovasz,
            peers={
                "kornia": _kornia("lovasz_softmax_loss"),
                "smp": _smp("LovaszLoss", "multiclass", per_image=True),  # agrees where no class is absent
            },
            tolerance=5e-3,  # errors that are equal in float32 are sorted either way
        ),
        Subject(
            "Hausdorff by distances",
            _ours("hausdorff_dt_loss"),
            _hausdorff,
            peers={"MONAI": _monai("HausdorffDTLoss", include_background=True, **_SOFTMAX)},
        ),
    )


def _binary() -> tuple[Subject, ...]:
    return (
        Subject(
            "Dice",
            _ours("dice_loss", mode="binary"),
            lambda x, t: _dice(_sums(x, t)),
            compiled=lambda x, t: _dice(_sums(x, t)),
            peers={"MONAI": _monai("DiceLoss", sigmoid=True)},
            quick=(1,),
        ),
        Subject(
            "focal",
            _ours("focal_loss", mode="binary"),
            _sigmoid_focal,
            compiled=_sigmoid_focal,
            peers={
                "torchvision": lambda: _torchvision_focal(),
                "MONAI": _monai("FocalLoss"),
                "kornia": _kornia("binary_focal_loss_with_logits", channel=True, alpha=None, reduction="mean"),
            },
        ),
        Subject(
            "Hausdorff by distances",
            _ours("hausdorff_dt_loss", mode="binary"),
            _hausdorff,
            peers={"MONAI": _monai("HausdorffDTLoss", include_background=True, sigmoid=True)},
            quick=(1,),
        ),
    )


def _volume() -> tuple[Subject, ...]:
    def dice_ce(x: Tensor, target: Tensor) -> Tensor:
        return _dice(_sums(x, target)) + _entropy(x, target)

    return (
        Subject(
            "Dice + cross-entropy",
            _ours("dice_ce_loss"),
            dice_ce,
            lambda x, t: _dice(_sums_by_scatter(x, t)) + _entropy(x, t),
            dice_ce,
            {"MONAI": _monai("DiceCELoss", **_SOFTMAX)},
        ),
        Subject(
            "Hausdorff by distances",
            _ours("hausdorff_dt_loss"),
            _hausdorff,
            peers={"MONAI": _monai("HausdorffDTLoss", include_background=True, **_SOFTMAX)},
        ),
    )
