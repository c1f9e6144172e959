"""lovasz_statistics against its float64 reference, on both devices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segmentation_cases import (
    DTYPES,
    GRAD_TOLERANCE,
    LAYOUTS,
    assert_near,
    generator,
    in_layout,
    make_dense,
    make_labels,
    make_logits,
)

from drawn import drawn_settings
from pyseg import reference

lovasz = torch.ops.pyseg.lovasz_statistics
ACTIVATIONS = ("softmax", "sigmoid", "none", "hinge")


def check(logits, target, *arguments, device="cpu"):
    """Logits without equal errors, whose order would be a matter of rounding."""
    wide = logits.detach().double().contiguous().requires_grad_()
    expected = reference.lovasz_statistics(wide, target, *arguments)
    z = logits.to(device).detach().requires_grad_()
    got, grad_p = lovasz(z, target.to(device), *arguments)
    assert got.dtype == torch.float64
    assert grad_p.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert not grad_p.requires_grad
    assert_near(got, expected, 1e-12 if logits.dtype == torch.float64 else 1e-5)
    if not expected.requires_grad:
        return  # no images
    grad = torch.randn(got.shape, dtype=torch.float64, generator=generator(5))
    (got_grad,) = torch.autograd.grad(got, z, grad.to(device))
    (expected_grad,) = torch.autograd.grad(expected, wide, grad)
    assert_near(got_grad, expected_grad, 2 * GRAD_TOLERANCE[logits.dtype], "gradient")


def distinct_logits(shape, dtype, layout="contiguous", seed=0):
    """Values whose magnitudes differ within each class, so that no errors are equal; exact in 16 bits too."""
    magnitudes = torch.cat([torch.arange(128, 256) * 2.0**k for k in range(-9, -5)])  # 0.25 to 8, 8 bits each
    logits = torch.zeros(shape)
    n, c, *size = shape
    count = n * torch.Size(size).numel()
    for k in range(c):
        values = magnitudes[torch.randperm(len(magnitudes), generator=generator(seed + k))[:count]]
        signs = torch.randint(2, (count,), generator=generator(seed + k)) * 2 - 1
        logits[:, k] = (values * signs).view(n, *size)
    return in_layout(logits.to(dtype), layout)


@st.composite
def drawn(draw):
    rank = draw(st.integers(1, 3))
    shape = (draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 3, 7])))
    shape += tuple(draw(st.integers(1, {1: 1400, 2: 30, 3: 8}[rank])) for _ in range(rank))
    activation = draw(st.sampled_from(ACTIVATIONS))
    ignore = draw(st.sampled_from([None, 100, 1]))
    if draw(st.booleans()):
        target = make_dense(shape, torch.uint8, ignore, draw(st.sampled_from(LAYOUTS)))
    else:
        target = make_labels(shape, activation, torch.int64, ignore)
    logits = make_logits(shape, torch.float64, activation, draw(st.sampled_from(LAYOUTS)))
    return logits, target, activation, ignore, draw(st.booleans())


def test_drawn_cases(device):
    @drawn_settings(120, 15, device)
    @given(drawn())
    def run(case):
        check(*case, device=device)

    run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["sigmoid", "hinge"])
def test_layouts_and_dtypes(device, activation, layout, dtype):
    logits = distinct_logits((2, 3, 5, 8), dtype, layout)
    for per_image in (False, True):
        check(logits, make_labels(logits.shape, ignore=9), activation, 9, per_image, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax(device, dtype, layout):
    logits = make_logits((2, 5, 9, 31), dtype, layout=layout)
    for per_image in (False, True):
        check(logits, make_labels(logits.shape, ignore=255), "softmax", 255, per_image, device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_slopes_of_half_logits_are_float32(device, dtype, layout):
    """Slopes of a large class are smaller than float16 has numbers for: what they are in float32, bit for bit."""
    logits = make_logits((2, 3, 24, 25), dtype, "sigmoid", layout)
    labels = make_labels(logits.shape)
    for activation in ("softmax", "hinge"):
        z = logits.to(device)
        loss, slopes = lovasz(z, labels.to(device), activation, None, False)
        wide_loss, wide_slopes = lovasz(z.float(), labels.to(device), activation, None, False)
        assert torch.equal(loss, wide_loss)
        assert torch.equal(slopes, wide_slopes)
        assert slopes.stride() == wide_slopes.stride()


@pytest.mark.parametrize("activation", ["softmax", "hinge"])
def test_many_pixels(activation):
    logits = make_logits((2, 3, 150, 161), torch.float64)
    check(logits, make_labels(logits.shape, ignore=255), activation, 255, False)


def test_absent_class_and_perfect_prediction(device):
    """A class without elements costs its largest error; without errors everything is zero."""
    labels = torch.zeros(1, 4, 5, dtype=torch.int64)
    logits = make_logits((1, 3, 4, 5))
    got, _ = lovasz(logits.to(device), labels.to(device), "softmax", None, False)
    assert_near(got[0, 1:], logits.softmax(1)[0, 1:].flatten(1).amax(1), 1e-6)
    check(logits, labels, "softmax", None, False, device=device)
    perfect = torch.tensor([40.0, -300.0, -300.0]).view(1, 3, 1, 1).expand(1, 3, 4, 5)
    z = perfect.contiguous().to(device).requires_grad_()
    got, _ = lovasz(z, labels.to(device), "softmax", None, True)
    assert (got == 0).all()
    (grad,) = torch.autograd.grad(got.sum(), z)
    assert (grad == 0).all()


def test_everything_ignored(device):
    z = make_logits((2, 3, 4, 5)).to(device).requires_grad_()
    labels = torch.full((2, 4, 5), 255, device=device)
    got, _ = lovasz(z, labels, "softmax", 255, True)
    (grad,) = torch.autograd.grad(got.sum(), z)
    assert (got == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0), (1, 1, 1), (2, 2, 1, 1, 1)])
@pytest.mark.parametrize("per_image", [False, True])
def test_small(device, shape, per_image):
    z = make_logits(shape, torch.float64).to(device).requires_grad_()
    got, grad_p = lovasz(z, make_labels(shape, "hinge").to(device), "hinge", None, per_image)
    assert got.shape == (shape[0] if per_image else 1, shape[1])
    assert grad_p.shape == shape
    got.sum().backward()
    assert z.grad.isfinite().all()


def test_nan_reaches_the_loss(device):
    logits = make_logits((2, 3, 4, 5))
    logits[0, 1, 2, 3] = float("nan")
    got, _ = lovasz(logits.to(device), make_labels(logits.shape).to(device), "softmax", None, True)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    logits = distinct_logits((2, 2, 3, 4), torch.float64).requires_grad_()
    if activation == "none":
        logits = logits.detach().sigmoid().requires_grad_()
    labels = make_labels((2, 2, 3, 4), ignore=9)
    for per_image in (False, True):
        assert torch.autograd.gradcheck(lambda z, p=per_image: lovasz(z, labels, activation, 9, p)[0], logits)


def test_same_bits_for_any_number_of_threads():
    logits, labels = make_logits((3, 4, 90, 91)), make_labels((3, 4, 90, 91), ignore=255)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([x for flag in (False, True) for x in lovasz(logits, labels, "softmax", 255, flag)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_errors(device):
    z, labels = torch.zeros(2, 3, 4, device=device), torch.zeros(2, 4, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match="lovasz_statistics: activation must be softmax, sigmoid or none, got relu"):
        lovasz(z, labels, "relu", None, False)
    with pytest.raises(RuntimeError, match="lovasz_statistics: target must be"):
        lovasz(z, labels[:, :2], "softmax", None, False)


def test_labels_out_of_range():
    with pytest.raises(RuntimeError, match="lovasz_statistics: target must have labels from 0 to 2, got 7"):
        lovasz(torch.zeros(2, 3, 4), torch.full((2, 4), 7), "softmax", None, False)


def test_opcheck(device):
    for activation, dtype in (("softmax", torch.float32), ("hinge", torch.float32), ("softmax", torch.bfloat16)):
        z = make_logits((2, 3, 4, 5), dtype).to(device).requires_grad_()
        torch.library.opcheck(lovasz.default, (z, make_labels((2, 3, 4, 5)).to(device), activation, None, True))


def loss_of(logits, labels):
    return lovasz(logits, labels, "softmax", 255, False)[0].mean()


def test_compile_and_export():
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 6, 7), (1, 3, 9, 5)):
        z, labels = make_logits(shape), make_labels(shape, ignore=255)
        grads = []
        for f in (loss_of, compiled):
            x = z.detach().requires_grad_()
            f(x, labels).backward()
            grads.append(x.grad)
        assert torch.equal(*grads)

    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return loss_of(logits, labels)

    arguments = make_logits((2, 3, 6, 7)), make_labels((2, 3, 6, 7), ignore=255)
    program = torch.export.export(Loss(), arguments)
    assert torch.equal(program.module()(*arguments), loss_of(*arguments))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_image", [True, False])
def test_good_predictions(device, activation, per_image):
    """Most elements have a smaller error than any of the class, and the slope 0."""
    shape = (2, 4, 37, 41)
    labels = make_labels(shape, activation, ignore=255)
    one_hot = torch.stack([labels == c for c in range(4)], 1) if activation == "softmax" else make_dense(shape).round()
    target = labels if activation == "softmax" else one_hot.to(torch.uint8)
    logits = make_logits(shape, torch.float64, seed=3).tanh() * 0.8 + (2.0 * one_hot - 1)
    if activation == "none":
        logits = logits.sigmoid()
    check(logits, target, activation, 255, per_image, device=device)


def test_nan_is_seen_everywhere():
    """Of the class, of another, and where there is no element of the class."""
    for label in (0, 1, 2):
        logits, labels = make_logits((1, 3, 40)), torch.full((1, 40), label)
        logits[0, 0, 7] = float("nan")
        loss, _ = lovasz(logits, labels, "softmax", None, True)
        assert loss.isnan().all()
