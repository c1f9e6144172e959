"""point_supervision_loss against its float64 reference, on both devices."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from segmentation_cases import (
    DTYPES,
    GRAD_TOLERANCE,
    LABEL_DTYPES,
    LAYOUTS,
    TOLERANCE,
    assert_near,
    generator,
    make_logits,
)

import pyseg
from cuda_budget import cuda_budget
from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import point_supervision_loss, points_to_labels

forward = torch.ops.pyseg.point_supervision_loss
backward = torch.ops.pyseg._point_supervision_loss_backward
UNLABELLED = 100  # fits every dtype of labels


def make_points(shape, share=0.05, dtype=torch.int64, seed=1):
    """Labels [N, *S] of a few pixels."""
    n, c, *size = shape
    labels = torch.randint(c, (n, *size), generator=generator(seed))
    labels[torch.rand(labels.shape, generator=generator(seed + 1)) >= share] = UNLABELLED
    return labels.to(dtype)


def make_map(shape, dtype=torch.float32, seed=3):
    """Numbers in [0, 1], [N, *S]; some 0 and some 1."""
    n, _, *size = shape
    return (torch.rand((n, *size), generator=generator(seed)) * 1.2 - 0.1).clamp(0, 1).to(dtype)


def make_image_labels(shape, seed=4):
    return torch.randint(-1, 2, shape[:2], generator=generator(seed))


def is_untied(logits):
    """Whether every class's best pixel is the best by more than rounding, in log-odds."""
    z = logits.double().flatten(2)
    others = [torch.cat([z[:, :c], z[:, c + 1 :]], 1).logsumexp(1) for c in range(z.shape[1])]
    best = (z - torch.stack(others, 1)).topk(min(2, z.shape[2]), 2).values
    return bool((best[..., 0] - best[..., -1] > 1e-5).all()) or best.shape[2] < 2


def check(logits, target, device="cpu", **arguments):
    """The loss of every image and its gradient; returns them."""
    dtype = logits.dtype
    wide = logits.detach().double().contiguous().requires_grad_()
    terms = reference.point_supervision_loss(wide, target, ignore_index=UNLABELLED, **arguments)
    factors = (0.7, 1.3, 2.1)
    expected = (terms * torch.tensor(factors, dtype=torch.float64)).sum(1)
    z = logits.to(device).detach().requires_grad_()
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    settings = {"factors": factors, "ignore_index": UNLABELLED, "reduction": "none"}
    got = point_supervision_loss(z, target.to(device), **settings, **moved)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(got, expected, TOLERANCE[dtype])
    grad = torch.randn(got.shape, dtype=got.dtype, generator=generator(5))
    (got_grad,) = torch.autograd.grad(got, z, grad.to(device))
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    assert got_grad.dtype == dtype
    # Gradients of averages over pixels are small: relative to their own largest element.
    scale = expected_grad.abs().max().clamp_min(1e-6) if expected_grad.numel() else 1.0
    assert_near(got_grad.cpu().double() / scale, expected_grad / scale, 4 * GRAD_TOLERANCE[dtype], "gradient")
    return got, got_grad


@st.composite
def drawn(draw):
    rank = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    classes = draw(st.sampled_from([2, 3, 7, 19] if dtype.itemsize > 2 else [3, 7, 19]))
    shape = (draw(st.integers(0, 3)), classes)
    shape += tuple(draw(st.integers(1, {1: 1400, 2: 40, 3: 9}[rank])) for _ in range(rank))
    logits = make_logits(shape, dtype, layout=draw(st.sampled_from(LAYOUTS)), seed=draw(st.integers(0, 2)))
    share, label_dtype = draw(st.sampled_from([0.0, 0.02, 1.0])), draw(st.sampled_from(LABEL_DTYPES))
    target = make_points(shape, share if logits.numel() < 3000 else min(share, 0.02), label_dtype)
    arguments = {
        "image_labels": draw(st.sampled_from([None, make_image_labels(shape), make_image_labels(shape) > 0])),
        "point_weight": make_map(shape, draw(st.sampled_from(DTYPES)), 6) if draw(st.booleans()) else None,
        "objectness": make_map(shape, draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None,
        "background": draw(st.sampled_from([(0,), (1,), (0, 1)] if classes > 2 else [(0,), (1,)])),
    }
    return logits, target, arguments


def test_drawn_cases(device):
    @drawn_settings(100, 12, device)
    @given(drawn())
    def run(case):
        logits, target, arguments = case
        assume(is_untied(logits))
        check(logits, target, device, **arguments)

    run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(device, layout, dtype):
    shape = (2, 5, 6, 17)
    logits, target = make_logits(shape, dtype, layout=layout), make_points(shape)
    _, grad = check(logits, target, device, objectness=make_map(shape), point_weight=make_map(shape, seed=6))
    if layout == "channels_last":
        assert grad.is_contiguous(memory_format=torch.channels_last)
    check(logits, target, device, image_labels=make_image_labels(shape))


def test_many_pixels(device):
    """Several units of pixels of an image, on either device."""
    shape = (1, 3, 1, 1100 if device == "cuda" else 17000)
    logits = make_logits(shape)
    assert is_untied(logits)
    target = make_points(shape, 0.002)
    check(logits, target, device, objectness=make_map(shape))
    check(logits, target, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_classes(device, dtype):
    """On CUDA more than shared memory holds."""
    shape = (1, 300, 35)
    logits = make_logits(shape, dtype)
    check(logits, make_points(shape), device, objectness=make_map(shape), background=(0, 7, 299))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (1, 2, 1), (1, 2, 1, 1, 1)])
def test_small(device, shape):
    labels = torch.ones(shape[:2], dtype=torch.bool)
    check(make_logits(shape), make_points(shape, 1.0), device, image_labels=labels, objectness=make_map(shape))


@pytest.mark.parametrize("objectness", [False, True])
@pytest.mark.parametrize("image_labels", [False, True])
def test_gradcheck(objectness, image_labels):
    shape = (2, 3, 4, 5)
    logits = make_logits(shape, torch.float64).requires_grad_()
    assert is_untied(logits)
    arguments = {
        "objectness": make_map(shape) if objectness else None,
        "image_labels": make_image_labels(shape) if image_labels else None,
        "point_weight": make_map(shape, seed=6) if objectness else None,
    }
    target = make_points(shape, 0.2)
    assert torch.autograd.gradcheck(
        lambda z: point_supervision_loss(z, target, ignore_index=UNLABELLED, reduction="none", **arguments), logits
    )


# ---- the formula's corners ----


def test_first_of_equal_pixels(device):
    logits = torch.zeros(1, 3, 40, 50).to(device).requires_grad_()
    labels = torch.tensor([[1, 1, 0]]).to(device)
    loss = point_supervision_loss(logits, image_labels=labels)
    assert_near(loss, torch.log(torch.tensor(3.0)) - torch.log(torch.tensor(2 / 3)), 1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad[..., 0, 0].abs().min() > 0.01
    assert grad.count_nonzero() == 3


@pytest.mark.parametrize("size", [40.0, 300.0, 1e4])
def test_probabilities_that_round_to_0_and_1(device, size):
    """-log S and -log(1 - S) of a logit that dominates, present and absent, and the same of the objects together."""
    logits = torch.tensor([[size, 0.0, 0.0], [0.0, size, 0.0]]).view(2, 3, 1)
    log_odds = size - torch.log(torch.tensor(2.0))
    z = logits.to(device).requires_grad_()
    absent = torch.tensor([[0, -1, -1], [-1, 1, -1]]).to(device)
    loss = point_supervision_loss(z, image_labels=absent, reduction="none")
    assert_near(loss, torch.stack([log_odds, F.softplus(-log_odds)]), 1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert_near(grad[..., 0], torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0]]), 1e-6)

    target = torch.tensor([[1], [1]]).to(device)
    loss = point_supervision_loss(z, target, factors=(0, 1, 0), reduction="none")
    assert_near(loss[0], torch.tensor(size), 1e-6)
    assert loss[1] <= 1e-6

    objectness = torch.ones(2, 1).to(device)
    loss = point_supervision_loss(z, objectness=objectness, reduction="none")
    assert_near(loss, torch.stack([log_odds, F.softplus(-z[1, :, 0].detach().cpu())[0] * 0]), 1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert_near(grad[..., 0], torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0]]), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_best_of_pixels_that_are_certain(device, dtype):
    """Probabilities that all round to 1, or to 0, are told apart; also where exponentials vanish."""
    for scores in ([20.0, 60, 100], [200, 500, 2000], [-100, -60, -20], [-2000, -500, -1.5, 0.25, 7]):
        logits = torch.zeros(1, 2, len(scores), dtype=dtype)
        logits[0, 0] = torch.tensor(scores)
        for labels in (torch.tensor([[0, 1]]), torch.tensor([[1, 0]])):
            loss, _ = check(logits, torch.full((1, len(scores)), UNLABELLED), device, image_labels=labels)
        assert loss.isfinite().all()
    logits = (50 * make_logits((2, 5, 70))).to(dtype)
    for objectness in (None, make_map(logits.shape)):
        check(logits, make_points(logits.shape), device, objectness=objectness, background=(0, 3))


def test_without_objectness_few_pixels_have_a_gradient(device):
    shape = (2, 5, 30, 40)
    target = torch.full((2, 30, 40), UNLABELLED)
    target[0, 3, 4], target[1, 29, 39] = 2, 4
    for layout in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.float16):
            logits = make_logits(shape, dtype, layout=layout)
            _, grad = check(logits, target, device)
            pixels = grad.cpu().abs().amax(1) > 0
            assert pixels[0, 3, 4]
            assert pixels[1, 29, 39]
            assert 2 <= pixels.sum() <= 2 + 2 * 5


def test_labels_of_images_from_their_points():
    """Present: the points' classes and the background; images without points are left alone."""
    shape = (3, 4, 5, 6)
    logits = make_logits(shape)
    target = torch.full((3, 5, 6), -100)
    target[0, 1, 2], target[2, 0, 0] = 3, 0
    derived = point_supervision_loss(logits, target, reduction="none")
    labels = torch.tensor([[1, 0, 0, 1], [-1, -1, -1, -1], [1, 0, 0, 0]])
    torch.testing.assert_close(derived, point_supervision_loss(logits, target, image_labels=labels, reduction="none"))
    assert derived[1] == 0


def test_nan_is_not_lost(device):
    for where in ((0, 1, 3, 4), (0, 0, 0, 0)):
        logits = make_logits((2, 3, 5, 6))
        logits[where] = float("nan")
        loss = point_supervision_loss(
            logits.to(device), image_labels=torch.ones(2, 3, dtype=torch.int64).to(device), reduction="none"
        )
        assert loss[0].isnan()
        assert loss[1].isfinite()


def test_infinite_logits(device):
    """-inf is a class that a pixel cannot have; with other infinities the image-level term of the image is NaN."""
    infinity = float("inf")
    logits = torch.zeros(4, 3, 5)
    logits[0, 2] = -infinity
    logits[1, 1, 3] = infinity
    logits[2, 1:, 3] = -infinity
    labels = torch.tensor([[1, 1, 0], [-1, 1, -1], [0, -1, -1], [1, 1, 0]])
    z = logits.to(device).requires_grad_()
    loss = point_supervision_loss(z, image_labels=labels.to(device), reduction="none")
    nan, log_2, log_3 = float("nan"), torch.tensor(2.0).log(), torch.tensor(3.0).log()
    assert_near(loss, torch.stack([log_2, log_2 * nan, log_2 * nan, log_3 - (2 / log_3.exp()).log()]), 1e-6)
    (grad,) = torch.autograd.grad(loss[0], z)
    assert grad[0].isfinite().all()
    loss = point_supervision_loss(z, image_labels=torch.tensor([[-1, -1, 1]]).expand(4, 3).to(device), reduction="none")
    assert loss[0] == infinity


def test_reductions_and_module(device):
    shape = (3, 4, 5, 6)
    logits, target = make_logits(shape).to(device), make_points(shape).to(device)
    maps = {"objectness": make_map(shape).to(device), "point_weight": make_map(shape, seed=6).to(device)}
    each = point_supervision_loss(logits, target, ignore_index=UNLABELLED, reduction="none", **maps)
    for reduction, expected in (("mean", each.mean()), ("sum", each.sum())):
        module = pyseg.nn.PointSupervisionLoss(ignore_index=UNLABELLED, reduction=reduction)
        torch.testing.assert_close(module(logits, target, **maps), expected)
    assert repr(module) == "PointSupervisionLoss(ignore_index=100, reduction='sum')"


def test_points_to_labels(device):
    points = torch.tensor([[0, 2, 1, 3], [1, 1, 0, 0], [0, 3, 1, 3], [1, 0, 4, 5]]).to(device)
    weight = torch.tensor([0.5, 1.0, 0.25, 2.0]).to(device)
    labels, weights = points_to_labels(points, (2, 5, 6), weight)
    expected, expected_weights = torch.full((2, 5, 6), -100), torch.zeros(2, 5, 6)
    expected[0, 1, 3], expected[1, 0, 0], expected[1, 4, 5] = 3, 1, 0
    expected_weights[0, 1, 3], expected_weights[1, 0, 0], expected_weights[1, 4, 5] = 0.5, 1.0, 2.0
    assert torch.equal(labels.cpu(), expected)
    assert torch.equal(weights.cpu(), expected_weights)
    assert points_to_labels(points, (2, 5, 6))[1] is None
    with pytest.raises(ValueError, match=r"points_to_labels: points must be \[K, 3\], got \[4, 4\]"):
        points_to_labels(points, (2, 5))
    assert (points_to_labels(points[:0], (2, 5, 6))[0] == -100).all()
    with pytest.raises(ValueError, match=r"points_to_labels: points must be \[K, 4\], got \[0\]"):
        points_to_labels(torch.tensor([]).to(device), (2, 5, 6))
    with pytest.raises(ValueError, match=r"points_to_labels: points must be of integers, got torch.float32"):
        points_to_labels(points.float(), (2, 5, 6))
    with pytest.raises(ValueError, match=r"points_to_labels: weight must be of floating point, got torch.int64"):
        points_to_labels(points, (2, 5, 6), points[:, 0])
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"points_to_labels: points must lie on maps of \[2, 5, 5\]"):
            points_to_labels(points, (2, 5, 5))


# ---- the operator ----


def arguments_of(shape, device="cpu", dtype=torch.float32):
    """All arguments of the forward operator."""
    tensors = (make_logits(shape, dtype), make_points(shape), make_map(shape, seed=6), make_map(shape))
    return [*(x.to(device) for x in tensors), make_image_labels(shape).to(device), [0], UNLABELLED]


def test_same_bits_for_any_number_of_threads():
    arguments = arguments_of((2, 6, 130, 131))
    grad = torch.rand(2, 7, dtype=torch.float64, generator=generator(8))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            terms, kept = forward(*arguments)
            results.append((terms, kept, backward(grad, *arguments[:4], *arguments[5:], kept)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_opcheck(device):
    *tensors, background, ignore_index = arguments_of((2, 3, 4, 5), device)
    tensors[0].requires_grad_()
    torch.library.opcheck(forward.default, (*tensors, background, ignore_index))
    kept = forward(*tensors, background, ignore_index)[1]
    grad = torch.rand(2, 7, dtype=torch.float64).to(device)
    torch.library.opcheck(backward.default, (grad, tensors[0].detach(), *tensors[1:4], background, ignore_index, kept))


def test_second_derivative_raises(device):
    z = make_logits((1, 3, 4, 5)).to(device).requires_grad_()
    loss = point_supervision_loss(z, make_points(z.shape).to(device), ignore_index=UNLABELLED)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="point_supervision_loss: the gradient cannot be differentiated again"):
        torch.autograd.grad(grad.sum(), z)


def test_autocast_and_vmap(device):
    logits, target = make_logits((2, 3, 4, 5), torch.bfloat16).to(device), make_points((2, 3, 4, 5)).to(device)
    expected = point_supervision_loss(logits, target, ignore_index=UNLABELLED, reduction="none")
    with torch.autocast(device, torch.bfloat16):
        got = point_supervision_loss(logits, target, ignore_index=UNLABELLED, reduction="none")
    assert torch.equal(got, expected)
    each = torch.vmap(lambda z, t: point_supervision_loss(z[None], t[None], ignore_index=UNLABELLED))
    assert torch.equal(each(logits, target), expected)


def test_vmap():
    """In one call, with tensors that are batched or not; gradients of samples, and a batch of gradients."""
    shape = (6, 3, 4, 5)
    logits, target, prior = make_logits(shape), make_points(shape, 0.2), make_map((2, 3, 4, 5))

    def loss(z, target, prior):
        return point_supervision_loss(z, target, objectness=prior, ignore_index=UNLABELLED, reduction="none")

    expected = loss(logits, target, prior.repeat(3, 1, 1))
    z, t = logits.unflatten(0, (3, 2)), target.unflatten(0, (3, 2))
    got = torch.vmap(loss, in_dims=(1, 0, None))(z.transpose(0, 1), t, prior)
    assert torch.equal(got.flatten(0, 1), expected)

    def sum_of(*arguments):
        return loss(*arguments).sum()

    grads = torch.vmap(torch.func.grad(sum_of), in_dims=(0, 0, None))(z, t, prior)
    expected = torch.func.grad(sum_of)(logits, target, prior.repeat(3, 1, 1))
    torch.testing.assert_close(grads.flatten(0, 1), expected)

    jacobians = [
        torch.autograd.functional.jacobian(lambda x: loss(x, t[0], prior), z[0], vectorize=vectorize)
        for vectorize in (False, True)
    ]
    torch.testing.assert_close(*jacobians)


def weak_loss(logits, target, objectness):
    return point_supervision_loss(logits, target, objectness=objectness, ignore_index=UNLABELLED)


def test_compile():
    compiled = torch.compile(weak_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 6, 7), (1, 3, 9, 5)):
        z, target, prior = make_logits(shape), make_points(shape), make_map(shape)
        grads = []
        for f in (weak_loss, compiled):
            x = z.detach().requires_grad_()
            f(x, target, prior).backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, logits, target, objectness):
            return weak_loss(logits, target, objectness)

    def example(shape):
        return make_logits(shape), make_points(shape), make_map(shape)

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Loss(), example((2, 3, 6, 7)), dynamic_shapes=(batch, batch, batch))
    other = example((3, 3, 6, 7))
    torch.testing.assert_close(program.module()(*other), weak_loss(*other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: (2, 1, 4, 5)}, r"logits must have 2 to 1024 classes, got \[2, 1, 4, 5\]"),
        ({1: (2, 3, 4, 5)}, r"target must be (labels )?\[2, 4, 5\], got \[2, 3, 4, 5\]"),
        ({1: (2, 5, 4)}, r"target must be .*\[2, 4, 5\].*, got \[2, 5, 4\]"),
        ({2: (2, 4)}, r"point_weight must be \[2, 4, 5\], got \[2, 4\]"),
        ({3: (1, 4, 5)}, r"objectness must be \[2, 4, 5\], got \[1, 4, 5\]"),
        ({4: (2, 4)}, r"image_labels must be \[2, 3\], got \[2, 4\]"),
        ({5: [3]}, r"background must name some of the classes 0 to 2, got \[3\]"),
        ({5: []}, r"background must name some of the classes 0 to 2 and not all, got \[\]"),
        ({5: [-1]}, r"background must name some of the classes 0 to 2, got \[-1\]"),
        ({5: [0, 1, 2]}, r"background must name some of the classes 0 to 2 and not all, got \[0, 1, 2\]"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "fake"])
def test_errors(device, changes, message, mode):
    arguments = arguments_of((2, 3, 4, 5), device)
    for index, value in changes.items():
        is_shape = index < 5
        arguments[index] = arguments[index].new_zeros(value) if is_shape else value
    if mode == "fake":
        fake = torch._subclasses.FakeTensorMode()
        arguments = [fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    with pytest.raises(RuntimeError, match="^point_supervision_loss: " + message):
        forward(*arguments)


def test_errors_of_the_function():
    logits = make_logits((2, 3, 4, 5))
    with pytest.raises(ValueError, match="point_supervision_loss: reduction must be"):
        point_supervision_loss(logits, reduction="avg")
    with pytest.raises(ValueError, match="point_supervision_loss: factors must be three numbers"):
        point_supervision_loss(logits, factors=(1.0, 2.0))
    with pytest.raises(RuntimeError, match=r"point_supervision_loss: input must be \[N, C, \*S\]"):
        point_supervision_loss(logits[0, 0])


def test_labels_out_of_range(device):
    logits = make_logits((2, 3, 4, 50)).to(device).requires_grad_()
    for wrong in (3, -1, 2**40):
        target = torch.full((2, 4, 50), UNLABELLED)
        target[1, 2, 3] = wrong
        if device == "cpu":
            with pytest.raises(RuntimeError, match=rf"target must have labels from 0 to 2 .*, got {wrong}"):
                point_supervision_loss(logits, target, ignore_index=UNLABELLED)
            continue
        loss = point_supervision_loss(logits, target.to(device), ignore_index=UNLABELLED, reduction="none")
        assert loss[0].isfinite()
        assert loss[1].isnan()
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert grad[1, :, 2, 3].isnan().all()


# ---- what the CUDA kernels do ----


@pytest.mark.cuda_only
@pytest.mark.block_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_logits_are_read_once(device, layout, dtype):
    shape = (1, 19, 32, 64)
    logits, objectness = make_logits(shape, dtype, layout=layout), make_map(shape).to(device)
    target = torch.full((1, 32, 64), UNLABELLED, dtype=torch.uint8)
    z, t = logits.to(device).requires_grad_(), target.to(device)
    least = logits.nbytes + target.nbytes
    more = {"image_labels": torch.ones(1, 19, dtype=torch.int64).to(device), "ignore_index": UNLABELLED}
    budget = {"launches": 1, "bytes_ratio": 1.1}
    with cuda_budget("point_supervision_kernel", min_bytes=least + objectness.nbytes, **budget):
        loss = point_supervision_loss(z, t, objectness=objectness, **more)
    with cuda_budget("point_supervision_backward", min_bytes=least + objectness.nbytes + logits.nbytes, **budget):
        torch.autograd.grad(loss, z)
    with cuda_budget("point_supervision_kernel", min_bytes=least, **budget):
        loss = point_supervision_loss(z, t, objectness=None, **more)
    # Tiles without a best pixel are zeros: only two of 64 are read, which hold all that are raised.
    logits[0, torch.arange(19), 0, torch.arange(19) * 3] += 50
    z = logits.to(device).requires_grad_()
    loss = point_supervision_loss(z, t, objectness=None, **more)
    with cuda_budget("point_supervision_backward", min_bytes=least, bytes_ratio=1.1 + 2 / 16, launches=1):
        (grad,) = torch.autograd.grad(loss, z)
    assert 0 < (grad != 0).any(1).sum() <= 19
