"""Defects that a review of the losses found, each with the case that showed it."""

import pytest
import torch

import pyseg.functional as P


def test_lovasz_in_half_keeps_its_gradients():
    """Slopes of a large map are smaller than float16 has numbers for, until a loss scale multiplies them."""
    z, target = torch.ones(1, 1, 512, 512), torch.zeros(1, 512, 512, dtype=torch.long)
    target[:, :10, :10] = 1
    gradients = []
    for dtype in (torch.float16, torch.float32):
        x = z.to(dtype).requires_grad_()
        (P.lovasz_hinge_loss(x, target) * 65536).backward()
        gradients.append(x.grad)
    assert (gradients[0] == 0).sum() <= (gradients[1] == 0).sum()
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=2e-3, atol=1e-6)


def test_ohem_takes_pixels_that_are_nan():
    logits, target = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long)
    logits[..., 1, 1] = torch.nan
    assert P.ohem_cross_entropy(logits, target, min_kept=4).isnan()


@pytest.mark.parametrize("dense", [False, True])
def test_map_of_probabilities_leaves_ignored_pixels_out(dense):
    p = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    target = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).clone() if dense else labels.clone()
    target[0, ..., 0] = 255
    arguments = {"from_logits": False, "ignore_index": 255}
    loss = P.cross_entropy(p, target, reduction="none", **arguments)
    assert (loss[0, :, 0] == 0).all()
    torch.testing.assert_close(loss.sum(), P.cross_entropy(p, target, reduction="sum", **arguments))


def test_map_of_probabilities_checks_labels():
    p, target = torch.full((1, 2, 2, 2), 0.5), torch.full((1, 2, 2), 2)
    with pytest.raises(RuntimeError, match="2"):
        P.cross_entropy(p, target, from_logits=False, reduction="none")


def test_label_smoothing_knows_absent_classes():
    logits = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 6, 6, dtype=torch.long)
    target[:, :3] = 1
    for loss in (P.dice_loss, P.generalized_dice_loss):
        for absent in ("zero", "skip"):
            exact = loss(logits, target, absent=absent)
            smoothed = loss(logits, target, absent=absent, label_smoothing=1e-7)
            torch.testing.assert_close(smoothed, exact, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_of_boxes():
    loss = P.sigmoid_focal_loss(torch.zeros(0, 80), torch.zeros(0, 80), reduction="sum")
    assert loss == 0


def test_ignore_index_that_the_labels_cannot_hold():
    """-100 is 156 as an 8-bit number."""
    logits = torch.randn(1, 200, 2, 2, generator=torch.Generator().manual_seed(0))
    target = torch.full((1, 2, 2), 156, dtype=torch.uint8)
    losses = [P.ohem_cross_entropy(logits, t, reduction="none") for t in (target, target.long())]
    assert torch.equal(*losses)
    assert (losses[0] > 0).all()


def test_lovasz_takes_soft_targets_from_a_half_on():
    logits = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    soft = torch.full((1, 1, 4, 4), 0.3)
    assert P.lovasz_softmax_loss(logits, soft, mode="binary", absent="skip") == P.lovasz_softmax_loss(
        logits, torch.zeros_like(soft), mode="binary", absent="skip"
    )


def test_smp_refuses_soft_targets_that_it_would_cut_off():
    from pyseg.compat import smp

    logits, soft = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)
    for loss in (smp.DiceLoss("binary", ignore_index=255), smp.LovaszLoss("binary")):
        with pytest.raises(ValueError, match="must hold integers"):
            loss(logits, soft)


def test_monai_refuses_soft_targets_that_it_would_cut_off():
    """With ignore_index targets become integers: a soft one would be cut off, unless its pixel is ignored."""
    from pyseg.compat import monai

    logits = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    target = (logits > 0.3).float()
    target[0, 0, 0, 0] = 255.0
    soft = target.clone()
    soft[1, 0, 2, 3] = 0.5
    for loss in (
        monai.DiceLoss(sigmoid=True, ignore_index=255),
        monai.TverskyLoss(sigmoid=True, ignore_index=255),
        monai.FocalLoss(ignore_index=255),
    ):
        with pytest.raises(ValueError, match="target must hold integers with ignore_index, got other numbers"):
            loss(logits, soft)
        assert torch.equal(loss(logits, target), loss(logits, target.short()))
    one_hot = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)  # ignored where channel 1 is 1
    one_hot[:, 0] = 0.25
    three = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    loss = monai.DiceLoss(softmax=True, ignore_index=1)
    assert torch.equal(loss(three, one_hot), loss(three, one_hot.round()))
    one_hot[0, :, 0, 0] = torch.tensor([0.25, 0.75, 0.0])
    with pytest.raises(ValueError, match="target must hold integers"):
        loss(three, one_hot)


@pytest.mark.parametrize("special", [{"normalized": True}, {"reduced_threshold": 0.5}])
def test_smp_focal_loss_keeps_its_map(special):
    from pyseg.compat import smp

    logits = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    target = (logits > 0.3).long()
    target[0, 0, 0] = 255
    of_map, of_mean = (
        smp.FocalLoss("binary", alpha=0.25, ignore_index=255, reduction=reduction, **special)(logits, target)
        for reduction in ("none", "mean")
    )
    assert of_map.shape == (35,)
    torch.testing.assert_close(of_map.mean(), of_mean)


def test_smp_binary_cross_entropy_of_an_empty_batch():
    from pyseg.compat import smp

    empty = torch.zeros(0, 1, 4, 4)
    assert smp.SoftBCEWithLogitsLoss(reduction="sum")(empty, empty) == 0
    assert smp.SoftBCEWithLogitsLoss(reduction="none")(empty, empty).shape == empty.shape


@pytest.mark.parametrize("loss", [P.hausdorff_dt_loss, P.hausdorff_er_loss, P.boundary_loss])
def test_a_class_may_be_listed_twice(loss):
    """Maps of p are overwritten by their errors: a class that came again was computed from those."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 8, generator=generator)
    for target in (torch.randint(0, 3, (2, 9, 8), generator=generator), torch.rand(2, 3, 9, 8, generator=generator)):
        every = loss(x, target, reduction="none")
        torch.testing.assert_close(loss(x, target, classes=[1, 1, 2], reduction="none"), every[:, [1, 1, 2]])


def test_label_smoothing_checks_labels():
    with pytest.raises(RuntimeError, match="7"):
        P.weighted_binary_cross_entropy(torch.zeros(1, 1, 2, 2), torch.full((1, 2, 2), 7), label_smoothing=0.1)
