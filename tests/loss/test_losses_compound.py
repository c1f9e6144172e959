"""Compound losses against their parts' definitions, and that one pass over the logits serves all parts."""

import loss_oracles as oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyseg.functional as P

MODES = ["multiclass", "multilabel", "binary"]


def entropy_map(p, g, v, mode, gamma=0.0, positive=1.0, negative=1.0):
    if mode == "multiclass":
        return g * (1 - p) ** gamma * -torch.log(p)
    return v * (positive * g * (1 - p) ** gamma * -torch.log(p) + negative * (1 - g) * p**gamma * -torch.log1p(-p))


def pixels(v, mode):
    return v[:, :1].flatten(1).sum(1) if mode == "multiclass" else v.flatten(1).sum(1)


def joined(region, value, count, reduction, batch, a, b):
    """a * region part + b * pixel part; region [N, C] or [1, C], value and count [N]."""
    if batch:
        value, count = value.sum(0, keepdim=True), count.sum(0, keepdim=True)
    if reduction == "none":
        return a * region.mean(1) + b * value / count
    if reduction == "sum":
        return a * region.sum() + b * value.sum()
    return a * region.mean() + b * value.sum() / count.sum()


def dice_ce(p, g, v, mode, reduction, batch):
    value = entropy_map(p, g, v, mode).flatten(1).sum(1)
    return joined(oracle.dice(p, g, v, batch), value, pixels(v, mode), reduction, batch, 0.7, 1.3)


def dice_focal(p, g, v, mode, reduction, batch):
    value = entropy_map(p, g, v, mode, gamma=1.5).flatten(1).sum(1)
    return joined(oracle.dice(p, g, v, batch), value, pixels(v, mode), reduction, batch, 0.7, 1.3)


def combo(p, g, v, mode, reduction, batch):
    value = entropy_map(p, g, v, mode, positive=0.5, negative=0.5).flatten(1).sum(1)
    return joined(1 - oracle.dice(p, g, v, batch), value, pixels(v, mode), reduction, batch, -0.6, 0.4)


def exponential_logarithmic(p, g, v, mode, reduction, batch):
    map_ = entropy_map(p, g, v, mode)
    map_ = map_.sum(1) if mode == "multiclass" else map_
    counted = (v[:, 0] if mode == "multiclass" else v) > 0
    value = torch.where(counted, torch.where(counted, map_, 1.0) ** 0.3, 0.0).flatten(1).sum(1)
    region = (-torch.log(1 - oracle.dice(p, g, v, batch))) ** 0.3
    return joined(region, value, pixels(v, mode), reduction, batch, 0.8, 0.2)


def unified(p, g, v, mode, reduction, batch, asymmetric=True, delta=0.6, gamma=0.4):
    if mode == "binary":
        p, g, v = (torch.cat(pair, 1) for pair in (((1 - p), p), ((1 - g) * v, g), (v, v)))
    overlap = oracle.tversky(p, g, v, batch, alpha=1 - delta, beta=delta, s=1e-7)
    if asymmetric:
        overlap = torch.cat([overlap[:, :1], overlap[:, 1:] ** (1 - gamma)], 1)
        focus = torch.cat([(1 - p[:, :1]) ** gamma * (1 - delta), torch.full_like(p[:, 1:], delta)], 1)
    else:
        overlap = overlap**gamma
        focus = (1 - p) ** (1 - gamma) * torch.tensor([1 - delta] + [delta] * (p.shape[1] - 1)).view(-1, 1, 1)
    value = (focus * g * -torch.log(p)).flatten(1).sum(1)
    return joined(overlap, value, v.flatten(1).sum(1), reduction, batch, 0.7, 0.3)


LOSSES = {
    "dice + ce": (P.dice_ce_loss, dice_ce, {"lambda_dice": 0.7, "lambda_ce": 1.3}),
    "dice + focal": (P.dice_focal_loss, dice_focal, {"lambda_dice": 0.7, "lambda_focal": 1.3, "gamma": 1.5}),
    "combo": (P.combo_loss, combo, {"alpha": 0.4}),
    "exponential-logarithmic": (P.exponential_logarithmic_loss, exponential_logarithmic, {}),
    "unified focal": (P.unified_focal_loss, unified, {"lambda_focal": 0.3, "gamma": 0.4}),
    "unified focal, symmetric": (
        P.unified_focal_loss,
        lambda *args: unified(*args, asymmetric=False),
        {"lambda_focal": 0.3, "gamma": 0.4, "asymmetric": False},
    ),
}
CASES = [(name, mode) for name in LOSSES for mode in MODES if not (name.startswith("unified") and mode == "multilabel")]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_definition(device, name, mode):
    loss, definition, arguments = LOSSES[name]
    x, target = oracle.draw((2, 3, 8, 7), mode, ignore=9, device=device)
    for reduction, batch in (("mean", False), ("mean", True), ("sum", False), ("none", False), ("none", True)):
        ours, theirs = x.clone().requires_grad_(), x.cpu().double().requires_grad_()
        value = loss(ours, target, mode=mode, ignore_index=9, reduction=reduction, batch=batch, **arguments)
        p, g, v = oracle.dense(theirs, target.cpu(), mode, 9)
        expected = definition(p, g, v, mode, reduction, batch)
        assert value.dtype == torch.float32
        assert value.shape == expected.shape
        torch.testing.assert_close(value.cpu().double(), expected, rtol=5e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(value.sum(), ours)
        (wanted,) = torch.autograd.grad(expected.sum(), theirs)
        torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-4, atol=5e-5 * wanted.abs().max().item())


class Passes(TorchDispatchMode):
    """Counts calls of pyseg's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyseg":
            self.calls.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("dice + ce", ["segmentation_statistics"]),
        ("dice + focal", ["segmentation_statistics"]),
        ("combo", ["segmentation_statistics"]),
        ("exponential-logarithmic", ["segmentation_statistics", "pixel_cross_entropy"]),  # a power of each pixel's
        ("unified focal, symmetric", ["segmentation_statistics"]),
        ("unified focal", ["segmentation_statistics"] * 2),  # two focal exponents
    ],
)
def test_passes_over_the_logits(name, forward):
    loss, _, arguments = LOSSES[name]
    x, target = oracle.draw((2, 3, 8, 7), "multiclass", ignore=9)
    with Passes() as passes:
        value = loss(x.requires_grad_(), target, ignore_index=9, **arguments)
        assert passes.calls == forward
        passes.calls.clear()
        torch.autograd.grad(value, x)
    assert len(passes.calls) == len(forward)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_empty(name, mode):
    loss, _, arguments = LOSSES[name]
    x, target = oracle.draw((2, 3, 8, 7), mode)
    nothing = torch.full_like(target, 9)
    partly = torch.cat([nothing[:1], target[1:]])
    for z, t in ((x, partly), (x, nothing), (x[:0], target[:0]), (x, target * 0), (x * 0 + 200, target)):
        for reduction in ("mean", "none"):
            variable = z.clone().requires_grad_()
            value = loss(variable, t, mode=mode, ignore_index=9, reduction=reduction, **arguments)
            (gradient,) = torch.autograd.grad(value.sum(), variable)
            assert value.isfinite().all() and gradient.isfinite().all(), reduction


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    loss, _, arguments = LOSSES[name]
    x, target = oracle.draw((2, 3, 4, 3), "multiclass", ignore=9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: loss(z, target, ignore_index=9, **arguments), (x.requires_grad_(),))


def test_weights_smoothing_and_soft_targets():
    x, target = oracle.draw((2, 3, 8, 7), "multiclass", ignore=9)
    weight, how = torch.tensor([1.0, 2.0, 0.5]), {"ignore_index": 9}
    parts = P.dice_loss(x, target, weight, include_background=False, **how) + P.cross_entropy(
        x, target, weight, label_smoothing=0.1, **how
    )
    whole = P.dice_ce_loss(x, target, weight, include_background=False, label_smoothing=0.1, **how)
    torch.testing.assert_close(whole, parts)
    parts = P.dice_loss(x, target, weight, absent="skip", **how) + P.focal_loss(x, target, weight, alpha=0.3, **how)
    torch.testing.assert_close(P.dice_focal_loss(x, target, weight, absent="skip", alpha=0.3, **how), parts)
    soft = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)).softmax(1)
    torch.testing.assert_close(P.dice_ce_loss(x, soft), P.dice_loss(x, soft) + P.cross_entropy(x, soft))
    weighted = P.exponential_logarithmic_loss(x, target, weight, w_dice=0.0, w_ce=1.0, gamma=1.0, **how)
    map_ = P.cross_entropy(x, target, weight, reduction="none", ignore_index=9)
    torch.testing.assert_close(weighted, map_.sum() / (target != 9).sum())


def test_combo_beta():
    x, target = oracle.draw((2, 1, 8, 7), "binary")
    value = P.combo_loss(x, target, alpha=1.0, beta=0.8, mode="binary")
    expected = P.balanced_cross_entropy(x, target, beta=0.8)
    torch.testing.assert_close(value, expected)


def test_errors():
    x, target = oracle.draw((2, 3, 8, 7), "multiclass")
    with pytest.raises(ValueError, match="combo_loss: beta must be None in multiclass mode, got 0.7"):
        P.combo_loss(x, target, beta=0.7)
    with pytest.raises(ValueError, match="exponential_logarithmic_loss: gamma must be positive, got 0 and None"):
        P.exponential_logarithmic_loss(x, target, gamma=0)
    with pytest.raises(ValueError, match=r"unified_focal_loss: gamma must be in \[0, 1\], got 2"):
        P.unified_focal_loss(x, target, gamma=2)
