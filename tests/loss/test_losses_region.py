"""Region losses against their definitions, and what they do at the edges."""

import loss_oracles as oracle
import pytest
import torch

import pyseg.functional as P

LOSSES = {
    "dice": (P.dice_loss, oracle.dice, {}),
    "dice squared": (P.dice_loss, oracle.dice_squared, {"squared": True}),
    "log-cosh dice": (P.log_cosh_dice_loss, oracle.log_cosh_dice, {}),
    "jaccard": (P.jaccard_loss, oracle.jaccard, {}),
    "tversky": (P.tversky_loss, oracle.tversky, {}),
    "focal tversky": (P.focal_tversky_loss, oracle.focal_tversky, {}),
    "focal tversky, gamma": (P.focal_tversky_loss, oracle.focal_tversky, {"gamma": 0.75, "exponent": "gamma"}),
    "sensitivity-specificity": (P.sensitivity_specificity_loss, oracle.sensitivity_specificity, {}),
    "mcc": (P.mcc_loss, oracle.mcc, {}),
    "generalized dice": (P.generalized_dice_loss, oracle.generalized_dice, {}),
}
LOVASZ = {"lovasz softmax": (P.lovasz_softmax_loss, None, {})}
MODES = ["multiclass", "multilabel", "binary"]


def check(loss, table, x, arguments, tolerance=2e-6):
    """Value and gradient of a random combination of the table's elements."""
    ours, theirs = x.detach().clone().requires_grad_(), x.detach().cpu().double().requires_grad_()
    value, expected = loss(ours, **arguments), table(theirs)
    assert value.shape == expected.shape
    assert value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value, ours, factor.to(value))
    (expected_gradient,) = torch.autograd.grad(expected, theirs, factor)
    assert gradient.dtype == x.dtype
    scale = expected_gradient.abs().max().item()
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(x.dtype, 20 * tolerance)
    torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=rounding, atol=rounding * scale)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_definition(device, name, mode):
    loss, definition, arguments = LOSSES[name]
    for batch, ignore in ((False, None), (True, 9)):
        x, target = oracle.draw((2, 3, 8, 7), mode, ignore=ignore, device=device)

        def table(z, batch=batch, ignore=ignore, target=target):
            value = definition(*oracle.dense(z, target.cpu(), mode, ignore), batch=batch)
            return value[0] if batch and value.dim() == 2 else value

        check(
            loss,
            table,
            x,
            {"target": target, "mode": mode, "ignore_index": ignore, "batch": batch, "reduction": "none", **arguments},
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", oracle.SHAPES)
def test_dtypes_and_ranks(dtype, shape):
    for name in ("dice", "mcc"):
        loss, definition, arguments = LOSSES[name]
        x, target = oracle.draw(shape, "multiclass", dtype=dtype)
        check(
            loss,
            lambda z, target=target, definition=definition: definition(*oracle.dense(z, target, "multiclass")),
            x,
            {"target": target, "reduction": "none", **arguments},
            tolerance=1e-11 if dtype == torch.float64 else 2e-6,
        )


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    loss, _, arguments = LOSSES[name]
    x, target = oracle.draw((2, 3, 4, 3), "multiclass", dtype=torch.float64, ignore=7)
    x.requires_grad_()
    weight = {} if name == "generalized dice" else {"weight": [1.0, 2.0, 0.5]}
    assert torch.autograd.gradcheck(
        lambda z: loss(z, target, ignore_index=7, label_smoothing=0.1, **weight, **arguments), (x,)
    )


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sensitivity-specificity"])  # another error then
@pytest.mark.parametrize("mode", MODES)
def test_label_smoothing(name, mode):
    loss, definition, arguments = LOSSES[name]
    x, target = oracle.draw((2, 3, 8, 7), mode, ignore=9)

    def table(z):
        p, g, v = oracle.dense(z, target, mode, 9)
        return definition(p, oracle.smoothed(g, v, 0.2, mode), v)

    check(
        loss,
        table,
        x,
        {"target": target, "mode": mode, "ignore_index": 9, "label_smoothing": 0.2, "reduction": "none", **arguments},
    )


def test_soft_targets_and_probabilities():
    x, _ = oracle.draw((2, 3, 8, 7), "multilabel")
    p, g = x.softmax(1), torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).softmax(1)
    check(
        P.dice_loss,
        lambda z: oracle.dice(z, g.double(), torch.ones_like(z)),
        p,
        {"target": g, "from_logits": False, "reduction": "none"},
    )


def test_reductions_weights_and_classes():
    x, target = oracle.draw((3, 4, 8, 7), "multiclass")
    table = P.dice_loss(x, target, reduction="none").double()
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5])
    weighted = P.dice_loss(x, target, weight, reduction="none")
    torch.testing.assert_close(weighted.double(), table * weight)
    torch.testing.assert_close(P.dice_loss(x, target, weight, reduction="sum"), weighted.sum())
    torch.testing.assert_close(P.dice_loss(x, target, weight), weighted.sum() / weight.sum() / 3)
    foreground = P.dice_loss(x, target, include_background=False, reduction="none")
    torch.testing.assert_close(foreground.double(), table[:, 1:])
    some = P.dice_loss(x, target, weight, classes=[3, 1], reduction="none")
    torch.testing.assert_close(some.double(), (table * weight)[:, [3, 1]])
    torch.testing.assert_close(P.dice_loss(x, target, list(weight)), P.dice_loss(x, target, weight))


@pytest.mark.parametrize("name", [*LOSSES, "lovasz softmax"])
def test_absent_classes(name):
    loss, _, arguments = {**LOSSES, **LOVASZ}[name]
    if name == "generalized dice":
        return
    x, target = oracle.draw((2, 4, 8, 7), "multiclass")
    target = target % 3  # class 3 is absent everywhere
    target[0] = target[0] % 2  # and class 2 in the first image
    per_image = {"batch": False, **arguments}
    table = loss(x, target, reduction="none", absent="include", **per_image)
    zero = loss(x, target, reduction="none", absent="zero", **per_image)
    present = torch.tensor([[True, True, False, False], [True, True, True, False]])
    torch.testing.assert_close(zero, torch.where(present, table, 0.0))
    torch.testing.assert_close(loss(x, target, absent="zero", **per_image), zero.mean())
    skipped = loss(x, target, absent="skip", **per_image)
    torch.testing.assert_close(skipped, (zero.sum(1) / present.sum(1)).mean())


@pytest.mark.parametrize("name", [*LOSSES, "lovasz softmax"])
@pytest.mark.parametrize("absent", ["include", "zero", "skip"])
@pytest.mark.parametrize("smooth", [1e-5, 0.0])
def test_empty(name, absent, smooth):
    """One image all ignored, all images ignored, no image, no foreground: finite values and gradients."""
    loss, _, arguments = {**LOSSES, **LOVASZ}[name]
    if name != "lovasz softmax":
        arguments = {**arguments, "smooth": smooth}
    for mode in MODES if name != "lovasz softmax" else ["multiclass"]:
        x, target = oracle.draw((2, 3, 8, 7), mode)
        nothing = torch.full_like(target, 9)
        partly = torch.cat([nothing[:1], target[1:]])
        for z, t in (
            (x, partly),
            (x, nothing),
            (x[:0], target[:0]),
            (x, torch.zeros_like(target)),
            (x * 0 + 200, target),
        ):
            for reduction in ("mean", "none"):
                variable = z.clone().requires_grad_()
                value = loss(variable, t, mode=mode, ignore_index=9, absent=absent, reduction=reduction, **arguments)
                (gradient,) = torch.autograd.grad(value.sum(), variable)
                assert value.isfinite().all(), (mode, t.shape)
                assert gradient.isfinite().all(), (mode, t.shape)
                assert not gradient[t.flatten(1).eq(9).all(1)].any()


@pytest.mark.parametrize("mode", MODES)
def test_perfect_prediction(mode):
    x, target = oracle.draw((2, 3, 8, 7), mode)
    _, g, _ = oracle.dense(x, target, mode)
    sure = ((g * 2 - 1) * 200).float().requires_grad_()
    for name, (loss, _, arguments) in LOSSES.items():
        value = loss(sure, target, mode=mode, **arguments)
        assert value.item() == pytest.approx(0, abs=2e-9 if "tversky" in name else 1e-12), name
        (gradient,) = torch.autograd.grad(value, sure)
        assert gradient.isfinite().all(), name


def test_half_precision_does_not_overflow():
    x = torch.zeros(1, 2, 600, 500, dtype=torch.float16)
    target = torch.zeros(1, 600, 500, dtype=torch.uint8)
    for loss in (P.dice_loss, P.mcc_loss, P.jaccard_loss):
        assert loss(x, target).isfinite()
    assert P.dice_loss(x, target, reduction="none")[0, 0].item() == pytest.approx(1 / 3)


# ---- Lovasz ----


@pytest.mark.parametrize("batch", [False, True])
def test_lovasz_softmax_definition(device, batch):
    x, target = oracle.draw((2, 3, 4, 3), "multiclass", ignore=9, device=device)
    p, g, v = oracle.dense(x.cpu(), target.cpu(), "multiclass", 9)
    expected = []
    for images in [slice(None)] if batch else [slice(n, n + 1) for n in range(2)]:
        for c in range(3):
            mask = v[images, c] > 0
            expected.append(oracle.jaccard_of_prefixes((g - p).abs()[images, c][mask], g[images, c][mask]))
    expected = torch.stack(expected) if batch else torch.stack(expected).view(2, 3)
    value = P.lovasz_softmax_loss(x, target, ignore_index=9, batch=batch, absent="include", reduction="none")
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_lovasz_hinge_definition(device):
    x, target = oracle.draw((2, 1, 5, 4), "binary", device=device)
    g = target.cpu().double()
    margins = (1 - x.cpu().double().squeeze(1) * (2 * g - 1)).clamp_min(0)
    expected = oracle.jaccard_of_prefixes(margins.flatten(), g.flatten())
    value = P.lovasz_hinge_loss(x, target)
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_lovasz_gradcheck():
    x, target = oracle.draw((2, 3, 4, 3), "multiclass", dtype=torch.float64, ignore=9)
    for batch in (False, True):
        assert torch.autograd.gradcheck(
            lambda z, batch=batch: P.lovasz_softmax_loss(z, target, ignore_index=9, batch=batch), (x.requires_grad_(),)
        )
    x, target = oracle.draw((2, 1, 4, 3), "binary", dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: P.lovasz_hinge_loss(z, target, batch=False), (x.requires_grad_(),))


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "multi"}, "dice_loss: mode must be 'multiclass', 'multilabel' or 'binary', got 'multi'"),
        ({"reduction": "median"}, "dice_loss: reduction must be 'none', 'mean' or 'sum', got 'median'"),
        ({"absent": "no"}, "dice_loss: absent must be 'include', 'zero' or 'skip', got 'no'"),
        ({"classes": [4]}, r"dice_loss: classes must name some of 0 to 3, got \[4\]"),
        ({"weight": [1.0]}, r"dice_loss: weight must be \[4\], one value a class, got \[1\]"),
        ({"label_smoothing": 1.5}, r"dice_loss: label_smoothing must be in \[0, 1\], got 1.5"),
        ({"group": object()}, "dice_loss: group needs batch=True, got batch=False"),
        ({"mode": "binary"}, r"dice_loss: input must have one channel in binary mode, got \[2, 4, 8, 7\]"),
    ],
)
def test_errors(arguments, message):
    x, target = oracle.draw((2, 4, 8, 7), "multiclass")
    with pytest.raises((ValueError, RuntimeError), match=message):
        P.dice_loss(x, target, **arguments)


def test_target_errors():
    x, target = oracle.draw((2, 4, 8, 7), "multiclass")
    with pytest.raises(RuntimeError, match=r"target must be \[2, 8, 7\] or \[2, 4, 8, 7\] like input, got \[2, 8, 6\]"):
        P.dice_loss(x, target[..., :6])
    with pytest.raises(RuntimeError, match="target must be integers where it holds labels, got torch.float32"):
        P.dice_loss(x, target.float())
    target[0, 0, 0] = 4
    with pytest.raises(RuntimeError, match="4"):
        P.dice_loss(x, target)
    with pytest.raises(ValueError, match="gamma must be positive, got 0"):
        P.focal_tversky_loss(x, target, gamma=0)
    with pytest.raises(ValueError, match=r"r must be in \[0, 1\], got 2"):
        P.sensitivity_specificity_loss(x, target, r=2)
