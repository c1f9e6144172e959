"""What the forward passes over a softmax with labels keep for the backward pass on the CPU."""

import pytest
import torch
from segmentation_cases import DTYPES, GRAD_TOLERANCE, assert_near, generator, make_dense, make_labels, make_logits

from pyseg import reference
from pyseg._ops.segmentation_statistics import LOG_SUM_CLASSES

statistics = torch.ops.pyseg.segmentation_statistics
statistics_backward = torch.ops.pyseg._segmentation_statistics_backward
cross_entropy = torch.ops.pyseg.pixel_cross_entropy
cross_entropy_backward = torch.ops.pyseg._pixel_cross_entropy_backward

# Blocks in place, blocks that end within a vector, several units, channels_last, maps of one and three dimensions.
SHAPES = [(2, 21, 16, 32), (2, 23, 9, 11), (1, 20, 100, 101), (2, 21, 45), (1, 40, 3, 5, 7)]
LAYOUTS = ["contiguous", "channels_last"]


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_logarithm_of_the_sum(shape, layout, dtype):
    logits, labels = make_logits(shape, dtype, layout=layout), make_labels(shape, ignore=255)
    expected = logits.double().logsumexp(1).masked_fill(labels == 255, 0)
    for flags in ((True, False, False), (False, True, False), (True, True, True)):
        kept = statistics(logits, labels, None, "softmax", 255, 2.0, *flags)[1]
        assert kept.dtype == wide(dtype)
        assert_near(kept, expected, 1e-6)
    kept = cross_entropy(logits, labels, None, "softmax", 255, 0.0, 0.1)[1]
    assert_near(kept, expected, 1e-6)


def test_is_kept_where_it_pays(device):
    shape = (1, LOG_SUM_CLASSES, 4, 5)
    few = (1, LOG_SUM_CLASSES - 1, 4, 5)
    for size, activation, dense in (
        (shape, "softmax", False),
        (few, "softmax", False),
        (shape, "sigmoid", False),
        (shape, "softmax", True),
    ):
        logits = make_logits(size).to(device)
        target = (make_dense(size) if dense else make_labels(size)).to(device)
        kept = size == shape and activation == "softmax" and not dense and device == "cpu"
        expected = (1, 4, 5) if kept else (0,)
        assert statistics(logits, target, None, activation, None, 0.0, True, True, False)[1].shape == expected
        assert cross_entropy(logits, target, None, activation, None, 0.0, 0.0)[1].shape == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_statistics(shape, layout, dtype):
    """From what was kept, from nothing and of the reference."""
    logits, labels = make_logits(shape, dtype, layout=layout), make_labels(shape, ignore=255)
    weight = torch.rand(labels.shape, generator=generator(3))
    grad = torch.randn(shape[0], shape[1], 11, dtype=torch.float64, generator=generator(4))
    for gamma in (0.0, 1.0, 2.0, 0.5):
        for flags in ((True, False, False), (False, True, False), (True, True, not gamma), (False, True, not gamma)):
            arguments = (weight, "softmax", 255, gamma, *flags)
            kept = statistics(logits, labels, *arguments)[1]
            got = statistics_backward(grad, logits, labels, *arguments, kept)
            without = statistics_backward(grad, logits, labels, *arguments, kept.new_empty(0))
            assert got.stride() == without.stride()
            z = logits.double().contiguous().requires_grad_()
            expected = torch.autograd.grad(reference.segmentation_statistics(z, labels, *arguments), z, grad)[0]
            assert_near(got, expected, GRAD_TOLERANCE[dtype])
            assert_near(without, expected, GRAD_TOLERANCE[dtype])
            assert (got.movedim(1, -1)[labels == 255] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_cross_entropy(shape, layout, dtype):
    logits, labels = make_logits(shape, dtype, layout=layout), make_labels(shape, ignore=255)
    weight = torch.rand(shape[1], generator=generator(3))
    grad = torch.randn(labels.shape, generator=generator(4))
    for gamma, smoothing in ((0.0, 0.0), (0.0, 0.1), (2.0, 0.0)):
        arguments = (weight, "softmax", 255, gamma, smoothing)
        kept = cross_entropy(logits, labels, *arguments)[1]
        got = cross_entropy_backward(grad, logits, labels, *arguments, kept)
        z = logits.double().contiguous().requires_grad_()
        loss = reference.pixel_cross_entropy(z, labels, *arguments)
        assert_near(got, torch.autograd.grad(loss, z, grad.to(loss.dtype))[0], GRAD_TOLERANCE[dtype])
        assert (got.movedim(1, -1)[labels == 255] == 0).all()


@pytest.mark.parametrize("value", [1e3, -1e3, float("inf"), float("nan")], ids=str)
def test_large_sums_do_not_serve(value):
    """Where the logarithm has lost the digits that exp needs, the block is computed anew, with the same bits."""
    logits, labels = make_logits((1, 21, 64, 96)), make_labels((1, 21, 64, 96))
    logits[0, :, 3, 5] += value
    arguments = (None, "softmax", 255, 0.0, True, True, False)
    grad = torch.randn(1, 21, 11, dtype=torch.float64, generator=generator(4))
    kept = statistics(logits, labels, *arguments)[1]
    got = statistics_backward(grad, logits, labels, *arguments, kept)
    without = statistics_backward(grad, logits, labels, *arguments, kept.new_empty(0))
    torch.testing.assert_close(got[..., 3, :64], without[..., 3, :64], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got, without, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("classes", [3, 21])
@pytest.mark.parametrize("gap", [30.0, 63.0, 65.0, 90.0, 500.0])
def test_labels_far_below(gap, classes):
    """Exponentials are taken relative to the label's logit where they stay in range, else to the largest."""
    logits, labels = make_logits((2, classes, 8, 96)), make_labels((2, classes, 8, 96), ignore=255)
    logits[1, 1, 2] += gap
    labels[1, 2, ::2] = 0
    z64 = logits.double().requires_grad_()
    for flags in ((True, False, False), (False, True, False), (True, True, False)):
        z = logits.clone().requires_grad_()
        arguments = (None, "softmax", 255, 0.0, *flags)
        sums, expected = (
            statistics(z, labels, *arguments)[0],
            reference.segmentation_statistics(z64, labels, *arguments),
        )
        assert_near(sums, expected, 1e-5)
        weights = torch.randn(sums.shape, dtype=torch.float64, generator=generator(4))
        got, want = torch.autograd.grad(sums, z, weights)[0], torch.autograd.grad(expected, z64, weights)[0]
        assert_near(got, want, GRAD_TOLERANCE[torch.float32])
    loss = cross_entropy(logits, labels, None, "softmax", 255, 2.0, 0.0)[0]
    assert_near(loss, reference.pixel_cross_entropy(logits.double(), labels, None, "softmax", 255, 2.0), 1e-5)


def test_a_probability_of_one_has_a_gradient(device):
    """Rounding may put exp(z - L) above 1: focal factors of any exponent stay finite."""
    logits = torch.full((1, 21, 8, 64), -20.0)
    logits[:, 3] = torch.linspace(0, 30, 512).view(8, 64)
    z, labels = logits.to(device).requires_grad_(), torch.full((1, 8, 64), 3).to(device)
    for gamma in (0.5, 1.5, 2.0):
        loss, _ = cross_entropy(z, labels, None, "softmax", None, gamma, 0.0)
        (grad,) = torch.autograd.grad(loss.sum(), z)
        assert grad.isfinite().all()


@pytest.mark.parametrize("mode", ["eager", "fake"])
def test_errors(mode):
    logits, labels = make_logits((1, 21, 4, 5)), make_labels((1, 21, 4, 5))
    grad, wrong = torch.zeros(1, 21, 11, dtype=torch.float64), torch.zeros(1, 4, 6)
    if mode == "fake":
        fake = torch._subclasses.FakeTensorMode()
        logits, labels, grad, wrong = map(fake.from_tensor, (logits, labels, grad, wrong))
    with pytest.raises(RuntimeError, match=r"log_sum must be .*\[1, 4, 5\].*, got \[1, 4, 6\]"):
        statistics_backward(grad, logits, labels, None, "softmax", None, 0.0, True, True, False, wrong)
    with pytest.raises(RuntimeError, match=r"log_sum must be .*\[1, 4, 5\].*, got \[1, 4, 6\]"):
        cross_entropy_backward(wrong[..., :5], logits, labels, None, "softmax", None, 0.0, 0.0, wrong)
    with pytest.raises(RuntimeError, match="log_sum must be float32, got .*([dD]ouble|float64)"):
        statistics_backward(
            grad, logits, labels, None, "softmax", None, 0.0, True, True, False, wrong[..., :5].contiguous().double()
        )


def test_opcheck():
    logits, labels = make_logits((2, 21, 4, 5)).requires_grad_(), make_labels((2, 21, 4, 5))
    torch.library.opcheck(statistics.default, (logits, labels, None, "softmax", None, 0.0, True, True, False))
    torch.library.opcheck(cross_entropy.default, (logits, labels, None, "softmax", None, 0.0, 0.0))
    kept = logits.detach().logsumexp(1)
    grad = torch.zeros(2, 21, 11, dtype=torch.float64)
    torch.library.opcheck(
        statistics_backward.default,
        (grad, logits.detach(), labels, None, "softmax", None, 0.0, True, True, False, kept),
    )
    torch.library.opcheck(
        cross_entropy_backward.default,
        (torch.ones(2, 4, 5), logits.detach(), labels, None, "softmax", None, 0.0, 0.0, kept),
    )
