"""Losses beside other libraries', with their default arguments unless a test says more: values and gradients."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyseg.functional as P
from pyseg.compat import monai as our_monai
from pyseg.compat import smp as our_smp

kornia_losses = pytest.importorskip("kornia.losses")
monai_losses = pytest.importorskip("monai.losses")
smp_losses = pytest.importorskip("segmentation_models_pytorch.losses")
torchvision_ops = pytest.importorskip("torchvision.ops")

TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * 2


def labels(classes, *shape, seed=1):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def one_hot(target: Tensor, classes: int) -> Tensor:
    return F.one_hot(target, classes).movedim(-1, 1).float()


def compare(ours, theirs, input, target, **tolerance):
    results = []
    for loss in (theirs, ours):
        variable = input.clone().requires_grad_()
        value = loss(variable, target.clone())
        (gradient,) = torch.autograd.grad(value.sum(), variable)
        results.append((value.detach(), gradient))
    (expected, expected_gradient), (value, gradient) = results
    tolerance = tolerance or TOLERANCE
    torch.testing.assert_close(value, expected, **tolerance)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance["rtol"] * 10, atol=2e-5 * scale)


# ---- torch, torchvision ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_cross_entropy(reduction, smoothing, weighted):
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1]) if weighted else None
    target = labels(4, 2, 9, 7)
    target[0, :3] = -100
    arguments = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    compare(
        lambda x, t: P.cross_entropy(x, t, **arguments),
        lambda x, t: F.cross_entropy(x, t, **arguments),
        logits(2, 4, 9, 7),
        target,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torch_cross_entropy_of_soft_targets(reduction):
    compare(
        lambda x, t: P.cross_entropy(x, t, reduction=reduction),
        lambda x, t: F.cross_entropy(x, t, reduction=reduction),
        logits(2, 4, 9, 7),
        logits(2, 4, 9, 7, seed=3).softmax(1),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torch_binary_cross_entropy(reduction):
    beta = torch.tensor([3.0, 0.5, 1.0])
    for target in (logits(2, 3, 9, 7, seed=3).sigmoid(), labels(2, 2, 3, 9, 7)):
        compare(
            lambda x, t: P.weighted_binary_cross_entropy(x, t, beta=beta, mode="multilabel", reduction=reduction),
            lambda x, t: F.binary_cross_entropy_with_logits(
                x, t.float(), pos_weight=beta[:, None, None], reduction=reduction
            ),
            logits(2, 3, 9, 7),
            target,
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torchvision_focal(reduction):
    for target in (labels(2, 2, 3, 9, 7), labels(2, 2, 3, 9, 7).float()):
        compare(
            lambda x, t: P.sigmoid_focal_loss(x, t, reduction=reduction),
            lambda x, t: torchvision_ops.sigmoid_focal_loss(x, t.float(), reduction=reduction),
            logits(2, 3, 9, 7),
            target,
        )


# ---- kornia ----


def test_kornia_dice():
    target = labels(4, 2, 9, 7)
    target[0] = 0  # a sample without the other classes
    target[1, :3] = -100
    compare(
        lambda x, t: P.dice_loss(x, t, smooth=(0.0, 1e-8), absent="skip", ignore_index=-100),
        lambda x, t: kornia_losses.dice_loss(x, t, average="macro"),
        logits(2, 4, 9, 7),
        target,
    )


def test_kornia_tversky():
    compare(
        lambda x, t: P.tversky_loss(x, t, alpha=0.4, beta=0.6, smooth=(0.0, 1e-8), absent="skip"),
        lambda x, t: kornia_losses.tversky_loss(x, t, alpha=0.4, beta=0.6),
        logits(2, 4, 9, 7),
        labels(4, 2, 9, 7),
    )


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_kornia_focal(alpha):
    compare(
        lambda x, t: P.focal_loss(x, t, alpha=alpha) / x.shape[1],
        lambda x, t: kornia_losses.focal_loss(x, t, alpha=alpha, reduction="mean"),
        logits(2, 4, 9, 7),
        labels(4, 2, 9, 7),
    )
    compare(
        lambda x, t: P.focal_loss(x, t, alpha=alpha, mode="multilabel"),
        lambda x, t: kornia_losses.binary_focal_loss_with_logits(x, t, alpha=alpha, reduction="mean"),
        logits(2, 3, 9, 7),
        logits(2, 3, 9, 7, seed=5).sigmoid(),
    )


def test_kornia_lovasz():
    compare(
        lambda x, t: P.lovasz_softmax_loss(x, t, batch=False, absent="include"),
        kornia_losses.lovasz_softmax_loss,
        logits(2, 4, 9, 7),
        labels(4, 2, 9, 7),
    )
    compare(
        lambda x, t: P.lovasz_hinge_loss(x, t, batch=False),
        kornia_losses.lovasz_hinge_loss,
        logits(2, 1, 9, 7),
        labels(2, 2, 9, 7),
    )


@pytest.mark.parametrize("shape", [(2, 3, 12, 11), (1, 2, 7, 8, 6)])
def test_kornia_hausdorff_erosions(shape):
    theirs = kornia_losses.HausdorffERLoss() if len(shape) == 4 else kornia_losses.HausdorffERLoss3D()
    compare(
        lambda x, t: P.hausdorff_er_loss(x.softmax(1), t, from_logits=False),
        lambda x, t: theirs(x.softmax(1), t.unsqueeze(1)),
        logits(*shape),
        labels(shape[1], shape[0], *shape[2:]),
        rtol=2e-4,
        atol=1e-6,
    )


# ---- segmentation_models_pytorch ----


def smp_case(mode, ignored=False):
    if mode == "binary":
        target = labels(2, 2, 1, 9, 7)
    elif mode == "multilabel":
        target = labels(2, 2, 4, 9, 7)
    else:
        target = labels(4, 2, 9, 7).clamp_max(2)  # class 3 is absent
    if ignored:
        target[..., :3, :] = 255
    return logits(2, 1 if mode == "binary" else 4, 9, 7), target


MODES = ["binary", "multiclass", "multilabel"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["DiceLoss", "JaccardLoss", "TverskyLoss"])
@pytest.mark.parametrize("ignored", [False, True])
def test_smp_overlap(name, mode, ignored):
    x, target = smp_case(mode, ignored)
    ignore_index = 255 if ignored else None
    for arguments in ({}, {"log_loss": True, "smooth": 1.0}):
        arguments = {**arguments, "ignore_index": ignore_index}
        compare(getattr(our_smp, name)(mode, **arguments), getattr(smp_losses, name)(mode, **arguments), x, target)
    if mode == "multiclass":
        arguments = {"classes": [0, 2], "class_weights": [1.0, 2.0, 0.5, 3.0], "ignore_index": ignore_index}
        if name == "TverskyLoss":
            arguments.update(alpha=0.2, beta=0.8, gamma=0.75)
        compare(getattr(our_smp, name)(mode, **arguments), getattr(smp_losses, name)(mode, **arguments), x, target)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"alpha": 0.25, "gamma": 1.5},
        {"reduction": "sum"},
        {"normalized": True},
        {"reduced_threshold": 0.5, "alpha": 0.4},
    ],
)
def test_smp_focal(mode, arguments):
    x, target = smp_case(mode)
    compare(our_smp.FocalLoss(mode, **arguments), smp_losses.FocalLoss(mode, **arguments), x, target)
    if mode != "multilabel":  # whose mask smp misapplies
        x, target = smp_case(mode, ignored=True)
        arguments = {**arguments, "ignore_index": 255}
        compare(our_smp.FocalLoss(mode, **arguments), smp_losses.FocalLoss(mode, **arguments), x, target)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_smp_lovasz(mode, per_image, ignored):
    x, target = smp_case(mode, ignored)
    arguments = {"per_image": per_image, "ignore_index": 255 if ignored else None}
    compare(our_smp.LovaszLoss(mode, **arguments), smp_losses.LovaszLoss(mode, **arguments), x, target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smooth_factor", [None, 0.1])
def test_smp_soft_bce(reduction, smooth_factor):
    target = labels(2, 2, 3, 9, 7).float()
    target[0, 0, :2] = -100
    for pos_weight in (None, torch.tensor([2.0, 1.0, 0.5])[:, None, None]):
        arguments = {"reduction": reduction, "smooth_factor": smooth_factor, "pos_weight": pos_weight}
        compare(
            our_smp.SoftBCEWithLogitsLoss(**arguments),
            smp_losses.SoftBCEWithLogitsLoss(**arguments),
            logits(2, 3, 9, 7),
            target,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smooth_factor", [0.0, 0.1])
def test_smp_soft_cross_entropy(reduction, smooth_factor):
    x, target = smp_case("multiclass")
    target[0, :2] = -100
    arguments = {"reduction": reduction, "smooth_factor": smooth_factor}
    compare(our_smp.SoftCrossEntropyLoss(**arguments), smp_losses.SoftCrossEntropyLoss(**arguments), x, target)


def test_smp_mcc():
    x, target = smp_case("binary")
    compare(our_smp.MCCLoss(), smp_losses.MCCLoss(), x.sigmoid(), target)


# ---- MONAI ----

# Softmax with labels, sigmoid with dense targets, one channel, probabilities, volumes.
CASES = {
    "softmax": ({"softmax": True, "to_onehot_y": True}, (2, 4, 9, 7), lambda s: labels(4, s[0], 1, *s[2:])),
    "sigmoid": ({"sigmoid": True}, (2, 3, 9, 7), lambda s: labels(2, *s).float()),
    "sigmoid one hot": ({"sigmoid": True, "to_onehot_y": True}, (2, 3, 9, 7), lambda s: labels(3, s[0], 1, *s[2:])),
    "binary": ({"sigmoid": True}, (2, 1, 9, 7), lambda s: labels(2, *s).float()),
    "volume": ({"softmax": True, "to_onehot_y": True}, (1, 2, 6, 5, 7), lambda s: labels(2, s[0], 1, *s[2:])),
    "softmax, no background": (
        {"softmax": True, "to_onehot_y": True, "include_background": False},
        (2, 4, 9, 7),
        lambda s: labels(4, s[0], 1, *s[2:]).float(),
    ),
}


def monai_case(case, **arguments):
    base, shape, target = CASES[case]
    return {**base, **arguments}, logits(*shape), target(shape)


def compare_monai(name, arguments, x, target, **tolerance):
    compare(getattr(our_monai, name)(**arguments), getattr(monai_losses, name)(**arguments), x, target, **tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["DiceLoss", "GeneralizedDiceLoss", "TverskyLoss", "MCCLoss"])
def test_monai_overlap(name, case):
    for batch, reduction in itertools.product((False, True), ("mean", "sum", "none")):
        arguments, x, target = monai_case(case, batch=batch, reduction=reduction)
        compare_monai(name, arguments, x, target)


@pytest.mark.parametrize("case", CASES)
def test_monai_dice_options(case):
    for options in ({"squared_pred": True}, {"jaccard": True, "squared_pred": True, "smooth_nr": 0.5}):
        compare_monai("DiceLoss", *monai_case(case, **options))
    if case == "softmax":
        for reduction in ("mean", "sum", "none"):
            compare_monai("DiceLoss", *monai_case(case, weight=[1.0, 2.0, 0.5, 0.0], reduction=reduction))
        for w_type in ("simple", "uniform"):
            compare_monai("GeneralizedDiceLoss", *monai_case(case, w_type=w_type))
    if case != "sigmoid":
        arguments, x, target = monai_case(case, ignore_index=1 if case == "binary" else 2)
        compare_monai("DiceLoss", arguments, x, target)


@pytest.mark.parametrize("case", CASES)
def test_monai_hausdorff_and_boundary(case):
    for reduction in ("mean", "none"):
        arguments, x, target = monai_case(case, reduction=reduction)
        x = F.interpolate(x, scale_factor=2.0) * 2
        target = F.interpolate(target.float(), scale_factor=2.0)
        for name in ("HausdorffDTLoss", "BoundaryLoss"):
            compare_monai(name, arguments, x, target, rtol=1e-4, atol=1e-5)
        compare_monai("HausdorffDTLoss", {**arguments, "alpha": 1.0, "batch": True}, x, target, rtol=1e-4, atol=1e-5)
    arguments.update(reduction="mean")
    compare_monai("LogHausdorffDTLoss", arguments, x, target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_monai_dice_ce(case):
    for options in (
        {},
        {"lambda_ce": 0.3, "lambda_dice": 2.0, "reduction": "sum", "batch": True, "squared_pred": True},
    ):
        compare_monai("DiceCELoss", *monai_case(case, **options))
    if case.startswith("softmax"):
        options = {"weight": torch.tensor([1.0, 2.0, 0.5, 0.1]), "label_smoothing": 0.1}
        compare_monai("DiceCELoss", *monai_case(case, **options))
    if case == "binary":
        compare_monai("DiceCELoss", *monai_case(case, weight=torch.tensor([3.0])))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["DiceFocalLoss", "GeneralizedDiceFocalLoss"])
def test_monai_dice_focal(name, case):
    for options in ({}, {"lambda_focal": 0.3, "gamma": 1.0, "reduction": "sum"}):
        compare_monai(name, *monai_case(case, **options))
    if name == "DiceFocalLoss":
        compare_monai(name, *monai_case(case, alpha=0.3))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [None, 2])
def test_monai_focal(softmax, background, reduction, ignored):
    x, target = logits(2, 4, 9, 7), labels(4, 2, 1, 9, 7)
    count = 4 if background else 3
    for alpha, weight in ((None, None), (0.3, None), ([0.2, 0.5, 0.9, 0.4][:count], [1.0, 2.0, 0.5, 0.3][:count])):
        if softmax and not background and alpha == 0.3:
            continue  # MONAI warns and drops alpha
        arguments = {"use_softmax": softmax, "to_onehot_y": True, "include_background": background, "alpha": alpha,
                     "weight": weight, "reduction": reduction, "ignore_index": ignored}  # fmt: skip
        compare_monai("FocalLoss", arguments, x, target)
    compare_monai(
        "FocalLoss",
        {"use_softmax": softmax, "include_background": background, "reduction": reduction},
        x,
        one_hot(target.squeeze(1), 4),
    )


def test_monai_unified_focal():
    target = labels(2, 2, 1, 9, 7)
    x = logits(2, 2, 9, 7)
    tolerance = {"rtol": 2e-5, "atol": 1e-6}
    compare(
        lambda x, t: our_monai.AsymmetricUnifiedFocalLoss(to_onehot_y=True)(x.softmax(1), t),
        lambda x, t: monai_losses.AsymmetricUnifiedFocalLoss(to_onehot_y=True)(x.softmax(1), t),
        x,
        target,
        **tolerance,
    )
    compare(
        lambda x, t: our_monai.AsymmetricUnifiedFocalLoss(gamma=0.3, delta=0.6, weight=0.2)(x.sigmoid(), t),
        lambda x, t: monai_losses.AsymmetricUnifiedFocalLoss(gamma=0.3, delta=0.6, weight=0.2)(x.sigmoid(), t),
        x[:, :1],
        target.float(),
        **tolerance,
    )


def test_monai_errors():
    with pytest.raises(ValueError, match="more than 1"):
        our_monai.DiceLoss(sigmoid=True, softmax=True)
    with pytest.raises(TypeError, match="other_act must be None or callable"):
        our_monai.DiceLoss(other_act="tanh")
    with pytest.raises(ValueError, match="Unsupported reduction"):
        our_monai.TverskyLoss(reduction="median")
    with pytest.raises(NotImplementedError, match="soft_label"):
        our_monai.DiceLoss(soft_label=True)
    with pytest.raises(AssertionError, match="different shape"):
        our_monai.DiceLoss()(torch.rand(1, 2, 4, 4), torch.rand(1, 1, 4, 4))
