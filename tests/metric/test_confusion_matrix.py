"""confusion_matrix against the reference on both devices: dtypes, layouts, labels out of range, registration."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpu_targets import OTHER_TARGETS, run_on_cpu_target
from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import confusion_matrix, iou

LOGITS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LABELS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LAYOUTS = ["contiguous", "channels_last", "transposed", "window", "every_other"]
POISON = -(2**48)


def laid_out(x, layout):
    """The same values with other strides."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "window":  # rows of a wider map: no even steps from pixel to pixel
        return torch.nn.functional.pad(x, (2, 3))[..., 2 : 2 + x.shape[-1]]
    if layout == "every_other":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x.contiguous()


def logits(shape, dtype=torch.float32, seed=0, ties=True):
    """With equal values and NaN among the classes, signed zeros and infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if ties:
        special = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1.0, 0.0])
        choice = torch.randint(0, len(special), shape, generator=generator)
        x = torch.where(torch.rand(shape, generator=generator) < 0.4, special[choice], x)
    return x.to(dtype)


def labels(shape, classes, dtype=torch.int64, seed=0, ignore=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, classes, shape, generator=generator)
    if ignore is not None:
        x[torch.rand(shape, generator=generator) < 0.2] = ignore
    return x.to(dtype)


def check(prediction, target, classes, ignore, per_image, device):
    expected = reference.confusion_matrix(prediction, target, classes, ignore, per_image=per_image)
    got = confusion_matrix(prediction.to(device), target.to(device), classes, ignore, per_image=per_image)
    assert got.dtype == torch.int64
    assert got.is_contiguous()
    assert torch.equal(got.cpu(), expected)


def shape_of(n, spatial, classes=None):
    return (n, *([] if classes is None else [classes]), *spatial)


# Around vectors, blocks and tiles; one class to more than a histogram holds.
SHAPES = [
    (1, 2, (1,)),
    (2, 3, (5, 7)),
    (1, 21, (33, 32)),
    (3, 19, (4, 4)),
    (2, 5, (3, 4, 5)),
    (1, 1, (9,)),
    (7, 4, ()),
    (2, 33, (16, 8)),
    (1, 40, (40, 28)),
    (2, 6, (0, 4)),
    (0, 6, (3, 4)),
]


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_logits(device, case, dtype):
    n, classes, spatial = case
    x = logits(shape_of(n, spatial, classes), dtype)
    target = labels(shape_of(n, spatial), classes, ignore=255)
    for layout in ("contiguous", "channels_last"):
        check(laid_out(x, layout), target, classes, 255, layout == "contiguous", device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOGITS, ids=str)
def test_layouts(device, layout, dtype):
    x = laid_out(logits((3, 7, 6, 16), dtype), layout)
    target = labels((3, 6, 16), 7)
    check(x, target, 7, None, False, device)
    check(x, laid_out(target.unsqueeze(1), layout).squeeze(1), 7, 3, True, device)
    part = x[1:, :, :, :]
    check(part, target[1:], 7, None, False, device)
    check(x[:, 1:], target, 6, 6, False, device)


@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every_other"])
def test_labels(device, dtype, layout):
    prediction = laid_out(labels((2, 11, 13), 5, dtype, seed=1), layout)
    for other in LABELS if device == "cpu" else LABELS[::2]:
        check(prediction, labels((2, 11, 13), 5, other, ignore=7), 5, 7, layout == "contiguous", device)


def test_bool(device):
    prediction, target = labels((3, 40), 2, torch.bool, seed=1), labels((3, 40), 2, torch.bool)
    for classes, ignore, per_image in ((2, None, False), (2, 0, True), (3, 1, False), (2, 255, False)):
        check(prediction, target, classes, ignore, per_image, device)


@pytest.mark.parametrize("classes", [32, 33, 64, 101, 102, 256, 257, 300])
def test_many_classes(device, classes):
    """Several histograms in turns, one, none, in and out of shared memory."""
    shape = (2, classes, 4, 9)
    for layout in ("contiguous", "channels_last"):
        x = laid_out(logits(shape), layout)
        check(x, labels((2, 4, 9), classes, torch.int16, ignore=-1), classes, -1, layout == "contiguous", device)
    prediction = labels((2, 5, 300), classes, seed=1)
    check(prediction, labels((2, 5, 300), classes, torch.int32), classes, None, True, device)


def test_most_classes():
    """The argmax of 16-bit logits numbers classes in 16 bits."""
    x = torch.zeros(1, 3000, 2, dtype=torch.float16)
    x[0, 2999, 0] = x[0, 1500, 1] = 1
    matrix = confusion_matrix(x, torch.tensor([[2999, 2]]))
    assert matrix.nonzero().tolist() == [[2, 1500], [2999, 2999]]


def test_nan_is_the_largest_and_the_first_wins(device):
    nan, inf = float("nan"), float("inf")
    ties = [[1.0, 1, 0], [0, 1, 1], [-0.0, 0.0, 0.0], [-inf, -inf, -inf]]
    columns = [*ties, [inf, nan, 0], [nan, inf, nan], [2, nan, nan]]
    winners = torch.tensor([0, 1, 0, 0, 1, 0, 1])
    for dtype in LOGITS:
        x = torch.tensor(columns, dtype=dtype).T.repeat(1, 24)[None]
        assert torch.equal(x.argmax(1)[0], winners.repeat(24))
        for layout in ("contiguous", "channels_last"):
            target = winners.repeat(24)[None]
            matrix = confusion_matrix(laid_out(x, layout).to(device), target.to(device)).cpu()
            assert torch.equal(matrix, torch.diag(torch.bincount(target[0], minlength=3)))


def test_negative_nan(device):
    x = torch.zeros(1, 2, 64)
    x[0, 1] = -torch.tensor(float("nan"))
    target = torch.ones(1, 64, dtype=torch.int64)
    for dtype in LOGITS:
        assert confusion_matrix(x.to(dtype).to(device), target.to(device))[1, 1] == 64


def test_all_ignored(device):
    x, target = logits((2, 4, 6, 5)), torch.full((2, 6, 5), 255, dtype=torch.uint8)
    check(x, target, 4, 255, True, device)
    # A label that is ignored may lie inside the range, and then its row stays empty.
    check(x, labels((2, 6, 5), 4), 4, 2, False, device)
    # What was predicted at an ignored pixel does not matter.
    wild = torch.full((2, 6, 5), -77)
    assert confusion_matrix(wild.to(device), target.to(device), 4, 255).sum() == 0


def test_ignore_index_that_the_targets_type_lacks(device):
    target = labels((1, 50), 4, torch.uint8)
    check(logits((1, 4, 50)), target, 4, -100, False, device)
    check(logits((1, 4, 50)), target, 4, 256, False, device)


def drawn_case(draw):
    classes = draw(st.integers(1, 40))
    spatial = draw(st.lists(st.integers(0, 12), min_size=0, max_size=3))
    n = draw(st.integers(0, 4))
    seed = draw(st.integers(0, 5))
    ignore = draw(st.sampled_from([None, 0, 3, 100, -1, 255]))
    target_type = draw(st.sampled_from(LABELS))
    fits = ignore is not None and torch.iinfo(target_type).min <= ignore <= torch.iinfo(target_type).max
    target = labels(shape_of(n, spatial), classes, target_type, seed, ignore if fits else None)
    if draw(st.booleans()):
        x = logits(shape_of(n, spatial, classes), draw(st.sampled_from(LOGITS)), seed)
        x = laid_out(x, draw(st.sampled_from(LAYOUTS if spatial else LAYOUTS[:2])))
    else:
        x = labels(shape_of(n, spatial), classes, draw(st.sampled_from(LABELS)), seed + 1)
    return x, target, classes, ignore, draw(st.booleans())


def test_drawn_cases(device):
    @drawn_settings(150, 20, device)
    @given(st.data())
    def run(data):
        check(*drawn_case(data.draw), device)

    run()


# ---- more pixels than float32 can count ----


def test_exact_above_2_to_24():
    n = 2**24 + 3
    zeros = torch.zeros(1, n, dtype=torch.uint8)
    assert confusion_matrix(zeros, zeros, 2)[0, 0] == n


# ---- labels out of range ----


@pytest.mark.parametrize("bad", [-1, 4, 255, 2**31, -(2**40)])
def test_bad_labels_raise(bad):
    target, prediction = labels((2, 3, 700), 4), labels((2, 3, 700), 4)
    good = target.clone()
    target[1, 2, 5] = bad
    target[1, 2, 699] = bad - 1 if bad < 0 else bad + 1  # the first is named, whatever the number of threads
    with pytest.raises(RuntimeError, match=rf"^confusion_matrix: target must be in \[0, 4\), got {bad}$"):
        confusion_matrix(prediction, target, 4)
    with pytest.raises(RuntimeError, match=rf"target must be in \[0, 4\) or ignore_index = 9, got {bad}$"):
        confusion_matrix(logits((2, 4, 3, 700)), target, 4, 9)
    with pytest.raises(RuntimeError, match=rf"^confusion_matrix: prediction must be in \[0, 4\), got {bad}$"):
        confusion_matrix(target, good, 4, per_image=True)


@pytest.mark.cuda_only
def test_bad_labels_poison(device):
    """Without a wait for the device: nothing is read or written out of bounds, and nobody can miss it."""
    target, x = labels((3, 5, 7), 4, ignore=9), logits((3, 4, 5, 7))
    target[1, 2, 3] = 0
    good = confusion_matrix(x, target, 4, 9, per_image=True)
    for bad in (-1, 4, 2**31, -(2**40)):
        broken = target.clone()
        broken[1, 2, 3] = bad
        left_out = target.clone()
        left_out[1, 2, 3] = 9
        expected = confusion_matrix(x, left_out, 4, 9, per_image=True)
        got = confusion_matrix(x.to(device), broken.to(device), 4, 9, per_image=True).cpu()
        assert torch.equal(got[::2], good[::2])
        assert torch.equal(got[1], expected[1] + POISON)
        total = confusion_matrix(x.to(device), broken.to(device), 4, 9).cpu()
        assert torch.equal(total, expected.sum(0) + POISON)
        assert iou(total).isnan().all()
        assert iou(got).isnan().any(1).tolist()[1]
        swapped = confusion_matrix(broken.to(device), target.to(device), 4, 9, per_image=True).cpu()
        assert (swapped[1] < 0).all()
        assert (swapped[::2] >= 0).all()


# ---- errors ----

ERRORS = [
    ({"prediction": torch.zeros(2, 3, 5)}, r"prediction must be \[2, 4, 5\] \(logits\), got \[2, 3, 5\]"),
    ({"prediction": torch.zeros(2, 4, 6)}, r"prediction must be \[2, 4, 5\] \(logits\), got \[2, 4, 6\]"),
    ({"prediction": torch.zeros(2, 5)}, r"prediction must be \[2, 4, 5\] \(logits\), got \[2, 5\]"),
    ({"prediction": torch.zeros(2, 4, 5).long()}, r"prediction must be \[2, 5\] \(labels\), got \[2, 4, 5\]"),
    (
        {"prediction": torch.zeros(2, 4, 5).cfloat()},
        r"prediction must be logits .* or labels .*, got torch\.(complex64|ComplexFloat)",
    ),
    ({"target": torch.zeros(2, 5)}, r"target must be uint8, .*got torch\.(float32|Float)"),
    ({"target": torch.tensor(1)}, r"target must be \[N, \*S\], got \[\]"),
    ({"num_classes": 0}, r"num_classes must be in \[1, 32767\], got 0"),
    ({"num_classes": 40000}, r"num_classes must be in \[1, 32767\], got 40000"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=lambda value: next(iter(value)) if value else "")
@pytest.mark.parametrize("mode", ["eager", "fake"])
def test_errors(device, change, message, mode):
    arguments = {"prediction": torch.zeros(2, 4, 5), "target": torch.zeros(2, 5).long(), "num_classes": 4, **change}
    fake = torch._subclasses.FakeTensorMode()
    for name in ("prediction", "target"):
        tensor = arguments[name].to(device)
        arguments[name] = fake.from_tensor(tensor) if mode == "fake" else tensor
    with pytest.raises(RuntimeError, match=rf"^confusion_matrix: {message}") as error:
        confusion_matrix(**arguments)
    assert "\n" not in str(error.value).strip()


def test_num_classes_is_needed_for_labels():
    with pytest.raises(RuntimeError, match="confusion_matrix: num_classes must be given for labels, got None"):
        confusion_matrix(torch.zeros(2, 5).long(), torch.zeros(2, 5).long())


# ---- determinism, registration ----


@pytest.mark.parametrize("classes", [5, 100, 300])
def test_same_bits_for_every_number_of_threads(classes):
    x, target = logits((3, classes, 40, 50), ties=False), labels((3, 40, 50), classes, ignore=-1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results += [confusion_matrix(x, target, classes, -1, per_image=p) for p in (True, False)]
    finally:
        torch.set_num_threads(threads)
    for i, result in enumerate(results):
        assert torch.equal(result, results[i % 2])
    assert torch.equal(results[0].sum(0), results[1])


def test_opcheck(device):
    op = torch.ops.pyseg.confusion_matrix.default
    x = logits((2, 5, 6, 4)).to(device)
    target = labels((2, 6, 4), 5, ignore=9).to(device)
    torch.library.opcheck(op, (x, target, 5, 9, False))
    torch.library.opcheck(op, (x.detach().requires_grad_(), target, 5, 9, True))
    torch.library.opcheck(op, (target, target, 10, None))


def test_no_gradient():
    x = logits((2, 5, 6, 4), ties=False).requires_grad_()
    assert not confusion_matrix(x, labels((2, 6, 4), 5)).requires_grad


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_cpu_target(target):
    """The other instruction sets, in a process of their own."""
    program = "import test_confusion_matrix; test_confusion_matrix.run_all_on_cpu()"
    run_on_cpu_target(target, program, Path(__file__).parent)


def run_all_on_cpu():
    for dtype in LOGITS:
        for case in SHAPES:
            test_logits("cpu", case, dtype)
        for layout in LAYOUTS:
            test_layouts("cpu", layout, dtype)
    for dtype in LABELS:
        test_labels("cpu", dtype, "contiguous")
    test_many_classes("cpu", 300)
    test_nan_is_the_largest_and_the_first_wins("cpu")
