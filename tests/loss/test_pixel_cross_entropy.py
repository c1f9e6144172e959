"""pixel_cross_entropy against its float64 reference and against torch's own losses, on both devices."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from segmentation_cases import (
    DTYPES,
    GRAD_TOLERANCE,
    LABEL_DTYPES,
    LAYOUTS,
    TOLERANCE,
    assert_near,
    generator,
    make_dense,
    make_labels,
    make_logits,
)

from drawn import drawn_settings
from pyseg import reference

operator = torch.ops.pyseg.pixel_cross_entropy
ACTIVATIONS = ("softmax", "sigmoid", "none")


def cross_entropy(*arguments):
    return operator(*arguments)[0]


def check(logits, target, weight, *arguments, device="cpu"):
    dtype, activation, gamma = logits.dtype, arguments[0], arguments[2]
    wide = logits.detach().double().contiguous().requires_grad_()
    expected = reference.pixel_cross_entropy(wide, target, weight, *arguments)
    z = logits.to(device).detach().requires_grad_()
    got = cross_entropy(z, target.to(device), None if weight is None else weight.to(device), *arguments)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(got, expected, TOLERANCE[dtype])
    if logits.shape[1] == 1 and activation == "softmax" and 0 < gamma < 1:
        return  # p is 1: the reference's gradient is infinity times zero
    grad = torch.randn(got.shape, dtype=got.dtype, generator=generator(5))
    (got_grad,) = torch.autograd.grad(got, z, grad.to(device))
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    assert got_grad.dtype == dtype
    assert_near(got_grad, expected_grad, GRAD_TOLERANCE[dtype], "gradient")


@st.composite
def drawn(draw):
    rank = draw(st.integers(1, 3))
    shape = (draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 3, 7, 19])))
    shape += tuple(draw(st.integers(1, {1: 1400, 2: 40, 3: 9}[rank])) for _ in range(rank))
    activation = draw(st.sampled_from(ACTIVATIONS))
    layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES))
    ignore = draw(st.sampled_from([None, 100, 0, 1]))
    gamma, smoothing = draw(st.sampled_from([0.0, 1.0, 2.0, 0.5, 3.7])), draw(st.sampled_from([0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        target_dtype = draw(st.sampled_from([*DTYPES, torch.uint8, torch.int64, torch.bool]))
        ignored = None if target_dtype == torch.bool else ignore
        target = make_dense(shape, target_dtype, ignored, draw(st.sampled_from(LAYOUTS)))
    else:
        target = make_labels(shape, activation, draw(st.sampled_from(LABEL_DTYPES)), ignore)
        if activation == "softmax" and smoothing:
            gamma = 0.0
    weight = torch.rand(shape[1], generator=generator(7)) if draw(st.booleans()) else None
    logits = make_logits(shape, dtype, activation, layout, seed=draw(st.integers(0, 2)))
    return logits, target, weight, activation, ignore, gamma, smoothing


def test_drawn_cases(device):
    @drawn_settings(150, 20, device)
    @given(drawn())
    def run(case):
        check(*case, device=device)

    run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layouts_and_dtypes(device, activation, layout, dtype):
    shape = (2, 5, 6, 17)
    logits = make_logits(shape, dtype, activation, layout)
    weight = torch.rand(5, generator=generator(3))
    check(logits, make_labels(shape, ignore=9), weight, activation, 9, 2.0, 0.0, device=device)
    check(logits, make_dense(shape, layout=layout), None, activation, None, 0.0, 0.1, device=device)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch_with_softmax(device, smoothing):
    logits, labels = make_logits((2, 5, 6, 7)), make_labels((2, 5, 6, 7), ignore=-100)
    weight = torch.rand(5, generator=generator(2))
    expected = F.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=smoothing)
    got = cross_entropy(*(x.to(device) for x in (logits, labels, weight)), "softmax", -100, 0.0, smoothing)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)
    dense = make_dense((2, 5, 6, 7))
    expected = F.cross_entropy(logits, dense, weight, reduction="none", label_smoothing=smoothing)
    got = cross_entropy(*(x.to(device) for x in (logits, dense, weight)), "softmax", None, 0.0, smoothing)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_equals_torch_with_sigmoid(device):
    logits, dense = make_logits((2, 5, 6, 7)), make_dense((2, 5, 6, 7))
    got = cross_entropy(logits.to(device), dense.to(device), None, "sigmoid", None, 0.0, 0.0)
    torch.testing.assert_close(got.cpu(), F.binary_cross_entropy_with_logits(logits, dense, reduction="none"))
    p = logits.sigmoid()
    p[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    got = cross_entropy(p.to(device), dense.to(device), None, "none", None, 0.0, 0.0)
    torch.testing.assert_close(got.cpu(), F.binary_cross_entropy(p, dense, reduction="none"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gamma, smoothing", [(0.0, 0.0), (0.0, 0.1), (2.0, 0.0), (0.6, 0.0)])
def test_gradcheck(activation, gamma, smoothing):
    logits = make_logits((2, 3, 4, 5), torch.float64, activation).requires_grad_()
    weight = torch.rand(3, generator=generator(2), dtype=torch.float64)
    for target in (make_labels((2, 3, 4, 5), ignore=9), make_dense((2, 3, 4, 5))):
        assert torch.autograd.gradcheck(
            lambda z, t=target: cross_entropy(z, t, weight, activation, 9, gamma, smoothing), logits
        )


def test_confident_and_hopeless_pixels(device):
    """p that rounds to 0 and 1: the loss is exact, the gradient finite, for exponents below 1 too."""
    logits = torch.tensor([[40.0, 0.0], [0.0, 40.0], [200.0, 0.0], [-200.0, 0.0], [1e4, -1e4], [9.0, 0.0]])[:, :, None]
    for gamma in (0.0, 0.3, 1.0, 2.0):
        for activation in ("softmax", "sigmoid"):
            z = logits.to(device).requires_grad_()
            labels = torch.zeros(6, 1, dtype=torch.int64)
            got = cross_entropy(z, labels.to(device), None, activation, None, gamma, 0.0)
            (grad,) = torch.autograd.grad(got.sum(), z)
            assert grad.isfinite().all()
            expected = reference.pixel_cross_entropy(logits, labels, None, activation, None, gamma)
            assert_near(got, expected, 1e-6)
            assert grad.abs().max() < 1000


def test_ignored_pixels(device):
    logits = make_logits((2, 4, 5, 6))
    logits[0, 1, 2, 3] = float("nan")
    labels = make_labels(logits.shape)
    labels[0, 2, 3] = labels[1] = 255
    z = logits.to(device).requires_grad_()
    got = cross_entropy(z, labels.to(device), None, "softmax", 255, 0.0, 0.1)
    assert got.isfinite().all()
    assert (got[1] == 0).all()
    (grad,) = torch.autograd.grad(got.sum(), z)
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()
    assert (grad[0, :, 2, 3] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (1, 1, 1), (1, 2, 1, 1, 1)])
def test_small(device, shape):
    for activation in ("softmax", "sigmoid"):
        check(make_logits(shape), make_labels(shape, activation), None, activation, None, 0.0, 0.0, device=device)


def test_same_bits_for_any_number_of_threads():
    logits, labels = make_logits((2, 6, 130, 131)), make_labels((2, 6, 130, 131), ignore=255)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            z = logits.detach().requires_grad_()
            got = cross_entropy(z, labels, None, "softmax", 255, 2.0, 0.0)
            results.append((got, *torch.autograd.grad(got.sum(), z)))
    finally:
        torch.set_num_threads(before)
    for first, other in zip(*results, strict=True):
        assert torch.equal(first, other)


def test_labels_out_of_range():
    labels = torch.full((2, 4, 5), 3)
    with pytest.raises(RuntimeError, match="pixel_cross_entropy: target must have labels from 0 to 2, got 3"):
        cross_entropy(make_logits((2, 3, 4, 5)), labels, None, "softmax", None, 0.0, 0.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({2: torch.ones(4)}, r"class_weight must be \[3\], got \[4\]"),
        ({6: 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
        ({5: 2.0, 6: 0.1}, "label_smoothing must be 0 where gamma is not"),
        ({3: "tanh"}, "activation must be softmax, sigmoid or none, got tanh"),
        ({1: torch.zeros(2, 5, dtype=torch.int64)}, "target must be"),
    ],
)
def test_errors(device, changes, message):
    arguments = [torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64), None, "softmax", None, 0.0, 0.0]
    for i, value in changes.items():
        arguments[i] = value
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    with pytest.raises(RuntimeError, match="pixel_cross_entropy: " + message):
        cross_entropy(*arguments)


def test_double_backward_is_refused():
    logits = make_logits((1, 3, 4)).requires_grad_()
    got = cross_entropy(logits, make_labels((1, 3, 4)), None, "softmax", None, 0.0, 0.0)
    (grad,) = torch.autograd.grad(got.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="pixel_cross_entropy: the gradient cannot be differentiated again"):
        grad.sum().backward()


def test_opcheck(device):
    backward = torch.ops.pyseg._pixel_cross_entropy_backward.default
    for activation in ("softmax", "sigmoid"):
        for layout in ("contiguous", "channels_last"):
            z = make_logits((2, 3, 4, 5), layout=layout).to(device).requires_grad_()
            labels = make_labels((2, 3, 4, 5)).to(device)
            arguments = (torch.rand(3).to(device), activation, None, 0.0, 0.1)
            torch.library.opcheck(operator.default, (z, labels, *arguments))
            grad = torch.rand(z.shape if activation == "sigmoid" else labels.shape).to(device)
            torch.library.opcheck(backward, (grad, z.detach(), labels, *arguments, torch.empty(0).to(device)))


def hardest(logits, labels):
    losses = cross_entropy(logits, labels, None, "softmax", 255, 0.0, 0.0)
    return losses.flatten(1).topk(8).values.mean()


def test_compile():
    compiled = torch.compile(hardest, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 6, 7), (1, 3, 9, 5)):
        z, labels = make_logits(shape), make_labels(shape, ignore=255)
        grads = []
        for f in (hardest, compiled):
            x = z.detach().requires_grad_()
            f(x, labels).backward()
            grads.append(x.grad)
        assert torch.equal(*grads)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return hardest(logits, labels)

    arguments = make_logits((2, 3, 6, 7)), make_labels((2, 3, 6, 7), ignore=255)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Loss(), arguments, dynamic_shapes=({0: batch}, {0: batch}))
    other = make_logits((3, 3, 6, 7), seed=4), make_labels((3, 3, 6, 7), ignore=255)
    assert torch.equal(program.module()(*other), hardest(*other))


# ---- _activation_vjp ----

FUNCTIONS = {"softmax": lambda z: z.softmax(1), "sigmoid": torch.sigmoid, "none": lambda z: z}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_vjp(device, activation, layout, dtype):
    for shape in ((2, 5, 6, 7), (1, 3, 1100), (0, 3, 4)):
        logits = make_logits(shape, dtype, layout=layout)
        grad_p = torch.randn(shape, generator=generator(3)).to(dtype)
        scale = torch.rand(shape[:2], generator=generator(4))
        wide = logits.double().contiguous().requires_grad_()
        weights = grad_p.double() * scale.double().view(*shape[:2], *[1] * (len(shape) - 2))
        (expected,) = torch.autograd.grad((FUNCTIONS[activation](wide) * weights).sum(), wide)
        got = torch.ops.pyseg._activation_vjp(*(x.to(device) for x in (grad_p, logits, scale)), activation)
        assert got.dtype == dtype
        assert_near(got, expected, GRAD_TOLERANCE[dtype])


def test_activation_vjp_opcheck(device):
    arguments = [x.to(device) for x in (make_dense((2, 3, 4, 5)), make_logits((2, 3, 4, 5)), torch.rand(2, 3))]
    torch.library.opcheck(torch.ops.pyseg._activation_vjp.default, (*arguments, "softmax"))
    with pytest.raises(RuntimeError, match=r"_activation_vjp: scale must be \[2, 3\], got \[2, 4\]"):
        torch.ops.pyseg._activation_vjp(*arguments[:2], torch.rand(2, 4).to(device), "softmax")
