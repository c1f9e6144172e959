"""segmentation_statistics against its float64 reference, on both devices."""

import pytest
import torch
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
from pyseg._ops.segmentation_statistics import COLUMNS

operator = torch.ops.pyseg.segmentation_statistics
backward = torch.ops.pyseg._segmentation_statistics_backward
NOTHING_KEPT = torch.empty(0)
ACTIVATIONS = ("softmax", "sigmoid", "none")
ALL = (True, True, True)


def statistics(*arguments):
    return operator(*arguments)[0]


def check(logits, target, weight, *arguments, device="cpu"):
    """Values and gradient, the latter of a random combination of the columns."""
    dtype, activation, gamma = logits.dtype, arguments[0], arguments[2]
    wide = logits.detach().double().contiguous().requires_grad_()
    expected = reference.segmentation_statistics(wide, target, weight, *arguments)
    z = logits.to(device).detach().requires_grad_()
    got = statistics(z, target.to(device), None if weight is None else weight.to(device), *arguments)
    assert got.dtype == torch.float64
    for k, name in enumerate(COLUMNS):
        assert_near(got[..., k], expected[..., k], 3 * TOLERANCE[dtype], name)
    if not expected.requires_grad or (logits.shape[1] == 1 and activation == "softmax" and 0 < gamma < 1):
        return  # no column was asked for; p is 1, and the reference's gradient infinity times zero
    grad = torch.randn(got.shape, dtype=torch.float64, generator=generator(5))
    (got_grad,) = torch.autograd.grad(got, z, grad.to(device))
    (expected_grad,) = torch.autograd.grad(expected, wide, grad)
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
    if draw(st.booleans()):
        target_dtype = draw(st.sampled_from([*DTYPES, torch.uint8, torch.int64, torch.bool]))
        ignored = None if target_dtype == torch.bool else ignore
        target = make_dense(shape, target_dtype, ignored, draw(st.sampled_from(LAYOUTS)))
    else:
        target = make_labels(shape, activation, draw(st.sampled_from(LABEL_DTYPES)), ignore)
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(shape[0], *shape[2:], generator=generator(7)).to(
            draw(st.sampled_from([torch.float32, dtype]))
        )
    gamma = draw(st.sampled_from([0.0, 1.0, 2.0, 0.5, 3.7]))
    flags = (draw(st.booleans()), draw(st.booleans()), draw(st.booleans()))
    logits = make_logits(shape, dtype, activation, layout, seed=draw(st.integers(0, 2)))
    return logits, target, weight, activation, ignore, gamma, *flags


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
    weight = torch.rand(2, 6, 17, generator=generator(3))
    check(logits, make_labels(shape, ignore=9), weight, activation, 9, 2.0, *ALL, device=device)
    check(logits, make_dense(shape, layout=layout), None, activation, None, 0.0, *ALL, device=device)


@pytest.mark.parametrize("classes", [1, 2, 21, 64, 150, 300])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_numbers_of_classes(device, activation, classes):
    for layout in ("contiguous", "channels_last"):
        shape = (1, classes, 5, 31)
        logits = make_logits(shape, activation=activation, layout=layout)
        check(
            logits,
            make_labels(shape, activation, ignore=-1),
            None,
            activation,
            -1,
            0.0,
            True,
            True,
            False,
            device=device,
        )


def test_many_pixels():
    """Several units of an image, which end in the middle of a block."""
    shape = (2, 3, 20001)
    for activation in ACTIVATIONS:
        logits = make_logits(shape, activation=activation)
        check(logits, make_labels(shape, ignore=7), None, activation, 7, 1.5, *ALL)


def test_large_gradient():
    """Larger than 4 MB: rows are stored past the caches."""
    shape = (1, 9, 352, 352)
    logits, labels = make_logits(shape), make_labels(shape, ignore=255)
    for flags in ((False, True, False), (True, False, True)):
        check(logits, labels, None, "softmax", 255, 0.0, *flags)
    check(logits, make_dense(shape), None, "softmax", None, 0.0, True, False, False)


def test_label_dtypes(device):
    shape = (2, 2, 9, 8)
    logits = make_logits(shape)
    for dtype in LABEL_DTYPES:
        check(logits, make_labels(shape, dtype=dtype, ignore=100), None, "softmax", 100, 0.0, *ALL, device=device)
    check(logits, make_labels(shape).bool(), None, "softmax", None, 0.0, *ALL, device=device)


def test_binary(device):
    """One channel that is no softmax: labels are 0 and 1."""
    logits = make_logits((3, 1, 7, 9))
    labels = make_labels((3, 1, 7, 9), "sigmoid", torch.uint8, 255)
    check(logits, labels, None, "sigmoid", 255, 2.0, *ALL, device=device)
    dense = statistics(logits.to(device), labels.unsqueeze(1).to(device), None, "sigmoid", 255, 2.0, *ALL)
    assert torch.equal(statistics(logits.to(device), labels.to(device), None, "sigmoid", 255, 2.0, *ALL), dense)


FLAGS = [(True, False, False), (False, True, False), (True, True, False)]


@pytest.mark.parametrize("label_dtype", [*LABEL_DTYPES, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_binary_labels(device, dtype, label_dtype):
    """What one channel with labels and no weights adds up, around the sizes of vectors."""
    for pixels, flags in zip((1, 16, 37), FLAGS, strict=True):
        shape = (2, 1, pixels)
        for ignore in (None,) if label_dtype == torch.bool else (None, 100, 0, 1):
            labels = make_labels(shape, "sigmoid", label_dtype, ignore)
            check(make_logits(shape, dtype), labels, None, "sigmoid", ignore, 2.0, *flags, device=device)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 0.5])
def test_binary_labels_of_many_pixels(gamma, flags):
    """Blocks and units that end in the middle of a vector; strided logits; results in the caches and past them."""
    for shape, layout in (
        ((2, 1, 9001), "contiguous"),
        ((2, 1, 131, 67), "strided"),
        ((1, 1, 1088, 1024), "contiguous"),
    ):
        if gamma and shape[-1] == 1024:
            continue
        for ignore in (None, 255):
            logits = make_logits(shape, layout=layout)
            check(logits, make_labels(shape, "sigmoid", ignore=ignore), None, "sigmoid", ignore, gamma, *flags)


def test_binary_labels_out_of_range():
    """int64 labels are looked at in full: neither the low word of one nor what stands for ignored pixels passes."""
    logits = make_logits((2, 1, 9000))
    for wrong in (2, -1, 2**32, 2**32 + 1, -(2**63)):
        for at in (0, 8999):
            labels = make_labels(logits.shape, "sigmoid")
            labels[1, at] = wrong
            for flags in FLAGS:
                for ignore in (None, 255):
                    with pytest.raises(RuntimeError, match=f"labels from 0 to 1.*, got {wrong}$"):
                        statistics(logits, labels, None, "sigmoid", ignore, 0.0, *flags)
                check(logits, labels, None, "sigmoid", wrong, 0.0, *flags)
            grad = torch.ones(2, 1, 11, dtype=torch.float64)
            with pytest.raises(RuntimeError, match=f"labels from 0 to 1, got {wrong}$"):
                backward(grad, logits, labels, None, "sigmoid", None, 0.0, *FLAGS[0], NOTHING_KEPT)


def test_binary_labels_with_special_logits(device):
    """Infinite logits have probabilities 0 and 1; NaN reaches the sums of its own image, unless it is ignored."""
    logits = make_logits((3, 1, 40))
    logits[0, 0, :2] = torch.tensor([float("inf"), float("-inf")])
    logits[1, 0, 5] = logits[2, 0, 5] = float("nan")
    labels = make_labels(logits.shape, "sigmoid", ignore=255)
    labels[0, :2], labels[1, 5], labels[2, 5] = torch.tensor([1, 0]), 255, 0
    z = logits.to(device).requires_grad_()
    got = statistics(z, labels.to(device), None, "sigmoid", 255, 2.0, *FLAGS[2])
    (grad,) = torch.autograd.grad(got[..., :10].sum(), z)
    assert got[:2].isfinite().all()
    assert got[2, 0, 1].isnan()
    assert grad[:2].isfinite().all()
    assert grad[1, 0, 5] == 0
    assert grad[2, 0].isnan().nonzero().flatten().tolist() == [5]


def test_everything_ignored(device):
    logits = make_logits((2, 4, 5, 6)).to(device).requires_grad_()
    labels = torch.full((2, 5, 6), 255, dtype=torch.uint8, device=device)
    labels[1] = make_labels((1, 4, 5, 6))[0].to(device)
    for activation in ("softmax", "sigmoid"):
        got = statistics(logits, labels, None, activation, 255, 2.0, *ALL)
        (grad,) = torch.autograd.grad(got.sum(), logits)
        assert (got[0] == 0).all()
        assert (grad[0] == 0).all()
        assert (got[1, :, 9] == 30).all()
        assert grad[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 0)])
def test_empty(device, shape):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    got = statistics(
        logits, torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=device), None, "softmax", None, 0.0, *ALL
    )
    assert got.shape == (shape[0], 3, 11)
    assert (got == 0).all()
    got.sum().backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_special_values(device, activation, value):
    """They reach their own image's sums and their own pixel's gradient, unless the pixel is ignored."""
    logits = make_logits((3, 4, 5, 6))
    logits[0, 1, 2, 3] = value
    logits[1, 2, 0, 0] = value
    labels = make_labels((3, 4, 5, 6))
    labels[0, 2, 3] = 0
    labels[1, 0, 0] = 255
    z = logits.to(device).requires_grad_()
    got = statistics(z, labels.to(device), None, activation, 255, 0.0, True, True, False)
    (grad,) = torch.autograd.grad(got[..., [0, 3, 6]].sum(), z)
    wide = logits.double().requires_grad_()
    expected = reference.segmentation_statistics(wide, labels, None, activation, 255, 0.0, True, True, False)
    assert_near(got[1:], expected[1:], 1e-5)
    assert grad[1:].isfinite().all()
    assert (grad[1, :, 0, 0] == 0).all()
    rest = torch.ones(5, 6, dtype=torch.bool)
    rest[2, 3] = False
    assert grad[0][:, rest.to(device)].isfinite().all()
    if value == value and value < 0:
        assert_near(got, expected, 1e-5)
        assert grad.isfinite().all()
    elif activation == "softmax" or value != value:
        assert got[0, 1, 1].isnan()
        assert grad[0, 1, 2, 3].isnan()


def test_sums_do_not_overflow_in_half():
    """1024 x 1024 pixels: far more than 65504."""
    logits = torch.zeros(1, 2, 1024, 1024, dtype=torch.float16)
    got = statistics(logits, torch.ones(1, 1024, 1024, dtype=torch.uint8), None, "softmax", None, 0.0, *ALL)
    assert got[0, :, 1].tolist() == [2**19, 2**19]
    assert got[0, :, 2].tolist() == [0, 2**20]
    # Within a block float32 sums have at most 1024 / 4 terms a lane, each with half a unit in the last place.
    assert_near(got[0, 1, 6], torch.tensor(2**20 * 0.6931471805599453, dtype=torch.float64), 256 * 2.0**-24)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 0.6])
def test_gradcheck(activation, gamma):
    logits = make_logits((2, 3, 4, 5), torch.float64, activation).requires_grad_()
    weight = torch.rand(2, 4, 5, generator=generator(2), dtype=torch.float64)
    for target in (make_labels((2, 3, 4, 5), ignore=9), make_dense((2, 3, 4, 5))):
        assert torch.autograd.gradcheck(
            lambda z, t=target: statistics(z, t, weight, activation, 9, gamma, *ALL), logits
        )


def test_double_backward_is_refused():
    logits = make_logits((1, 3, 4)).requires_grad_()
    got = statistics(logits, make_labels((1, 3, 4)), None, "softmax", None, 0.0, *ALL)
    (grad,) = torch.autograd.grad(got.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="segmentation_statistics: the gradient cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(layout):
    logits = make_logits((2, 6, 130, 131), layout=layout)
    labels = make_labels(logits.shape, ignore=255)
    grad = torch.randn(2, 6, 11, dtype=torch.float64, generator=generator(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for activation in ("softmax", "sigmoid"):
                arguments = (None, activation, 255, 2.0, *ALL)
                results.append(statistics(logits, labels, *arguments))
                results.append(backward(grad, logits, labels, *arguments, NOTHING_KEPT))
            binary = logits[:, :1].contiguous(), labels.clamp_max(1), None, "sigmoid", None, 2.0, True, True, False
            results.append(statistics(*binary))
            results.append(backward(grad[:, :1], *binary, NOTHING_KEPT))
    finally:
        torch.set_num_threads(before)
    for first, other in zip(results[:6] * 2, results[6:], strict=True):
        assert torch.equal(first, other)


def test_labels_out_of_range():
    logits = make_logits((2, 3, 4, 5))
    labels = make_labels(logits.shape)
    for wrong in (3, -1, 2**40):
        labels[1, 2, 3] = wrong
        message = f"segmentation_statistics: target must have labels from 0 to 2, got {wrong}"
        with pytest.raises(RuntimeError, match=message):
            statistics(logits, labels, None, "softmax", None, 0.0, *ALL)
        statistics(logits, labels, None, "softmax", wrong, 0.0, *ALL)
    with pytest.raises(RuntimeError, match="labels from 0 to 1 or ignore_index = 255, got 2"):
        statistics(logits[:, :1], torch.full((2, 4, 5), 2), None, "sigmoid", 255, 0.0, *ALL)
    with pytest.raises(RuntimeError, match="elements from 0 to 1, got 7"):
        statistics(logits, torch.full(logits.shape, 7), None, "sigmoid", None, 0.0, *ALL)


WRONG = [
    ({"logits": torch.zeros(2, 3)}, r"logits must be \[N, C, \*S\]"),
    ({"logits": torch.zeros(2, 3, 4, dtype=torch.int32)}, "logits must be float32"),
    ({"target": torch.zeros(2, 5, dtype=torch.int64)}, r"target must be .*\[2, 4\].*, got \[2, 5\]"),
    ({"target": torch.zeros(2, 4)}, "target must be of integers or bool"),
    ({"weight": torch.ones(2, 5)}, r"pixel_weight must be \[2, 4\], got \[2, 5\]"),
    ({"weight": torch.ones(2, 4, dtype=torch.int64)}, "pixel_weight must be of floating point"),
    ({"activation": "relu"}, "activation must be softmax, sigmoid or none, got relu"),
    ({"gamma": -1.0}, "gamma must be a number >= 0, got -1"),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_errors(device, changes, message):
    arguments = {
        "logits": torch.zeros(2, 3, 4),
        "target": torch.zeros(2, 4, dtype=torch.int64),
        "weight": None,
        "activation": "softmax",
        "ignore": None,
        "gamma": 0.0,
        **changes,
    }
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments.values()]
    with pytest.raises(RuntimeError, match="segmentation_statistics: " + message):
        statistics(*arguments, *ALL)


def test_opcheck(device):
    shape = (2, 3, 4, 5)
    weight = torch.rand(2, 4, 5).to(device)
    for logits in (make_logits(shape), make_logits(shape, layout="channels_last"), make_logits((2, 1, 3, 4, 5))):
        z = logits.to(device).requires_grad_()
        labels = make_labels(logits.shape).to(device)
        arguments = (weight if logits.dim() == 4 else None, "softmax", None, 0.0, *ALL)
        torch.library.opcheck(operator.default, (z, labels, *arguments))
        grad = torch.rand(2, logits.shape[1], 11, dtype=torch.float64).to(device)
        nothing = NOTHING_KEPT.to(device)
        torch.library.opcheck(backward.default, (grad, z.detach(), labels, *arguments, nothing))


def test_vectorised_logarithm():
    """-log p of single elements, each an image of one pixel: within 2 units in the last place, denormal numbers too."""
    least, most = torch.tensor(1e-44).log2().item(), 0.0
    p = torch.cat(
        [torch.logspace(least, most, 20000, 2), 1 - torch.logspace(-24, -1, 5000, 2), torch.tensor([1.0, 0.0])]
    )
    got = statistics(p.view(-1, 1, 1), torch.ones(len(p), 1, dtype=torch.uint8), None, "none", None, 0.0, *ALL)[:, 0, 6]
    expected = -p.double().log().clamp_min(-100)
    unit = torch.finfo(torch.float32).eps * expected.abs()
    assert ((got - expected).abs() <= 2 * unit).all()


def test_vectorised_exponential():
    """p of two classes is a ratio of exponentials: within 3 units in the last place, 0 where it would be denormal."""
    d = torch.linspace(-100, 0, 30001)
    z = torch.stack([d, torch.zeros_like(d)], 1).unsqueeze(2)
    got = statistics(z, torch.zeros(len(d), 1, dtype=torch.uint8), None, "softmax", None, 0.0, *ALL)[:, 0, 1]
    expected = z.double().softmax(1)[:, 0, 0]
    unit = torch.finfo(torch.float32).eps * expected
    normal = d > -87.3
    assert ((got - expected).abs()[normal] <= 3 * unit[normal]).all()
    assert (got[d < -87.4] == 0).all()


def test_autocast(device):
    logits = make_logits((1, 3, 4, 5), torch.bfloat16).to(device)
    labels = make_labels(logits.shape).to(device)
    plain = statistics(logits, labels, None, "softmax", None, 0.0, *ALL)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert torch.equal(statistics(logits, labels, None, "softmax", None, 0.0, *ALL), plain)


def test_inference_mode(device):
    with torch.inference_mode():
        logits = make_logits((1, 3, 4, 5)).to(device)
        assert not statistics(
            logits, make_labels(logits.shape).to(device), None, "softmax", None, 0.0, *ALL
        ).requires_grad


def loss_of(logits, labels, activation="softmax"):
    rows = statistics(logits, labels, None, activation, 255, 2.0, True, True, False).sum(0)
    return (rows[:, 6] / rows[:, 9] - rows[:, 0] / (rows[:, 1] + rows[:, 2])).mean()


def test_compile():
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape, layout in (((2, 3, 6, 7), "contiguous"), ((1, 3, 9, 5), "contiguous"), ((2, 3, 6, 7), "channels_last")):
        z = make_logits(shape, layout=layout)
        labels = make_labels(shape, ignore=255)
        grads = []
        for f in (loss_of, compiled):
            x = z.detach().requires_grad_()
            f(x, labels).backward()
            grads.append(x.grad)
        assert torch.equal(*grads)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return loss_of(logits, labels)

    arguments = make_logits((2, 3, 6, 7)), make_labels((2, 3, 6, 7), ignore=255)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Loss(), arguments, dynamic_shapes=({0: batch}, {0: batch}))
    other = make_logits((3, 3, 6, 7), seed=4), make_labels((3, 3, 6, 7), ignore=255)
    assert torch.equal(program.module()(*other), loss_of(*other))
