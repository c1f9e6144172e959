"""expectation_labels against the reference on both devices, bit by bit, and what its docstring promises of shares."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segmentation_cases import DTYPES, generator, in_layout

from cpu_targets import OTHER_TARGETS, run_on_cpu_target
from cuda_budget import cuda_budget
from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import expectation_labels

FIXED = {"background_bias": 1.0, "foreground_bias": 2.0}
ADAPT = {"background_share": 0.4, "foreground_share": 0.2}
METHODS = {
    "fixed": FIXED,
    "fixed, absent compete": {**FIXED, "exclude_absent": False},
    "adapt": ADAPT,
    "adapt from constants": {**ADAPT, **FIXED, "exclude_absent": False, "ignore_index": 255},
}
LAYOUTS = ("contiguous", "channels_last", "strided", "window")


def laid_out(x, layout):
    if layout == "window":  # rows of a wider map: no even steps from pixel to pixel
        return torch.nn.functional.pad(x, (2, 3))[..., 2 : 2 + x.shape[-1]]
    return in_layout(x, layout)


def make_case(shape, dtype=torch.float32, layout="contiguous", special=False, seed=0):
    """Logits in which the background is strong, some classes present (all of them in the first image), valid pixels."""
    g = generator(seed)
    x = torch.randn(shape, generator=g) * 2
    x[:, :1] += 2
    if special:
        values = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-40, -3e38])
        choice = torch.randint(0, len(values), shape, generator=g)
        x = torch.where(torch.rand(shape, generator=g) < 0.4, values[choice], x)
    present = torch.rand(shape[:2], generator=g) < 0.5
    present[:1] = True
    present[1:2] = False
    valid = torch.rand((shape[0], *shape[2:]), generator=g) < 0.8
    return laid_out(x.to(dtype), layout), present, valid


def check(logits, present, valid, device, **arguments):
    labels, bias = reference.expectation_labels(logits, present, valid=valid, **arguments)
    there = None if valid is None else valid.to(device)
    got = expectation_labels(logits.to(device), present.to(device), valid=there, return_bias=True, **arguments)
    assert [t.dtype for t in got] == [torch.int64, bias.dtype]
    assert all(t.is_contiguous() for t in got)
    assert torch.equal(got[1].cpu(), bias)
    assert torch.equal(got[0].cpu(), labels)


# One pixel; around vectors, blocks and tiles; no pixel; no image; more classes than a warp.
SHAPES = [(2, 3, 1, 1), (3, 4, 5, 7), (2, 3, 33), (2, 5, 3, 4, 5), (1, 40, 4, 9), (2, 6, 0, 4), (0, 6, 3, 4), (2, 1, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dtypes(device, shape, dtype):
    logits, present, valid = make_case(shape, dtype)
    check(logits, present, None, device, **ADAPT)
    check(logits, present, valid, device, **FIXED)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout, method):
    logits, present, valid = make_case((3, 4, 6, 16), layout=layout)
    check(logits, present, valid, device, **METHODS[method])
    check(logits[1:, 1:], present[1:, 1:], None, device, **METHODS[method])
    check(logits[:, 1:].half(), present[:, 1:], None, device, **METHODS[method])


def test_many_pixels(device):
    """Several tiles, blocks and rounds; histograms whose bins hold many."""
    for dtype in DTYPES[::2] if device == "cpu" else DTYPES[:1]:
        logits, present, valid = make_case((1, 4, 50, 99), dtype)
        check(logits, present, valid, device, **ADAPT)
        check(logits, present, valid, device, **FIXED)


def test_not_a_number(device):
    """NaN counts as +inf; signed zeros, infinities, denormal and huge numbers have defined margins."""
    for dtype in DTYPES:
        logits, present, valid = make_case((3, 4, 8, 9), dtype, special=True)
        for method in ("fixed", "adapt"):
            check(logits, present, valid, device, **METHODS[method])
    wins = expectation_labels(
        torch.tensor([[[1.0], [float("nan")], [2.0]]]).to(device), torch.ones(1, 3).bool().to(device)
    )
    assert wins.item() == 1


def test_margins_that_overflow(device):
    """A class that is ahead by more than the largest number has won the pixel."""
    for dtype, huge in ((torch.float32, 2e38), (torch.float64, 1e308)):
        logits = torch.tensor([[[-huge] * 6 + [0.0] * 4, [huge] * 6 + [-1.0, -2, -3, -4]]], dtype=dtype)
        present = torch.ones(1, 2, dtype=torch.bool)
        check(logits, present, None, device, foreground_share=0.6)
        labels = expectation_labels(logits.to(device), present.to(device), foreground_share=0.6)
        assert labels.sum() == 6


def test_equal_margins(device):
    """No bias separates the pixels of constant logits: the class that rises takes all, and rounds end."""
    logits, present = torch.zeros(2, 3, 5, 5), torch.tensor([[True, True, True], [True, False, False]])
    check(logits, present, None, device, **ADAPT)
    steps = torch.arange(75).reshape(1, 3, 5, 5) // 10 * 0.5  # few different margins
    check(steps, present[:1], None, device, **ADAPT)


def drawn_case(draw):
    shape = (
        draw(st.integers(0, 3)),
        draw(st.integers(1, 6)),
        *draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)),
    )
    layout = draw(st.sampled_from(LAYOUTS))
    case = make_case(shape, draw(st.sampled_from(DTYPES)), layout, draw(st.booleans()), draw(st.integers(0, 5)))
    arguments = {
        "background_bias": draw(st.sampled_from([0.0, 0.5])),
        "foreground_bias": draw(st.sampled_from([0.0, 1.5])),
        "background_share": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "foreground_share": draw(st.sampled_from([0.0, 0.15, 0.7])),
        "exclude_absent": draw(st.booleans()),
        "sweeps": draw(st.sampled_from([0, 1, 4])),
        "ignore_index": draw(st.sampled_from([-100, 255])),
    }
    return (*case[:2], case[2] if draw(st.booleans()) else None), arguments


def test_drawn_cases(device):
    @drawn_settings(50, 10, device)
    @given(st.data())
    def run(data):
        case, arguments = drawn_case(data.draw)
        check(*case, device, **arguments)

    run()


# ---- what is promised ----


def counts_of(labels, classes):
    return torch.stack([torch.bincount(each[each >= 0], minlength=classes) for each in labels.flatten(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shares_hold(dtype):
    """Each present class has its share of the valid pixels, absent ones nothing, ignored pixels do not count."""
    logits, present, valid = make_case((6, 5, 40, 50), dtype, seed=3)
    logits[:, 0] += 5  # without biases the background would take almost everything
    present[0, 3] = False
    labels = expectation_labels(logits, present, valid=valid, sweeps=50, **ADAPT)
    counts, pixels = counts_of(labels, 5), valid.flatten(1).sum(1)
    shares = torch.where(present, torch.tensor([0.4, 0.2, 0.2, 0.2, 0.2]), 0.0)
    shares /= shares.sum(1, keepdim=True).clamp_min(1)
    assert (counts >= (shares * pixels[:, None] - 1)).all()
    assert (counts[~present] == 0).all()
    assert torch.equal(labels == -100, ~valid | ~present.any(1)[:, None, None])
    plain = counts_of(expectation_labels(logits, present, valid=valid), 5)
    assert (plain[0, 1:] < 0.2 * pixels[0]).all()


def test_one_foreground_class_takes_one_round():
    logits = torch.randn(4, 3, 60, 60, generator=generator(1)) + torch.tensor([4.0, 0, 0])[:, None, None]
    present = torch.tensor([[True, True, False]]).expand(4, 3)
    one, many = (expectation_labels(logits, present, sweeps=n, return_bias=True, **ADAPT) for n in (1, 50))
    assert torch.equal(one[1], many[1])
    assert (counts_of(one[0], 3)[:, 1] == 0.2 * 3600).all()


def test_few_rounds_miss_little():
    """The docstring's figures, on random scores whose shares add up to 1."""
    for classes in (3, 5, 8):
        logits = torch.randn(2, classes, 90, 100, generator=generator(classes))
        logits[:, 0] += 3
        present = torch.ones(2, classes, dtype=torch.bool)
        share = 0.6 / (classes - 1)
        quota = torch.tensor([0.4] + [share] * (classes - 1)) * 9000
        for sweeps, missed in ((3, 0.01), (10, 0.002)):
            labels = expectation_labels(logits, present, background_share=0.4, foreground_share=share, sweeps=sweeps)
            assert (quota - counts_of(labels, classes)).max() <= missed * 9000


def test_no_labeling_with_these_shares_scores_more():
    """Where rounds end by themselves the labels are those of a linear assignment with as many slots a class."""
    optimize = pytest.importorskip("scipy.optimize")
    found = 0
    for seed in range(8):
        logits = torch.randn(1, 4, 6, 10, dtype=torch.float64, generator=generator(seed)) * 3
        logits[:, 0] += 4
        present = torch.tensor([[True, True, False, True]])
        labels, bias = expectation_labels(logits, present, sweeps=100, return_bias=True, **ADAPT)
        if not torch.equal(bias, expectation_labels(logits, present, sweeps=99, return_bias=True, **ADAPT)[1]):
            continue
        found += 1
        # Slots: each class's quota, and for every pixel beyond those one slot of any class, worth its best score.
        scores = logits[0, [0, 1, 3]].flatten(1)
        quotas = [24, 12, 12]
        columns = [row for row, k in zip(scores, quotas, strict=True) for _ in range(k)]
        columns += [scores.amax(0)] * (60 - sum(quotas))
        profit = torch.stack(columns, 1).numpy()
        rows, chosen = optimize.linear_sum_assignment(profit, maximize=True)
        ours = logits[0].flatten(1).gather(0, labels.flatten(1)).sum().item()
        assert ours == pytest.approx(profit[rows, chosen].sum(), abs=1e-9)
        assert (counts_of(labels, 4)[0, [0, 1, 3]] >= torch.tensor(quotas)).all()
    assert found >= 6


def test_labels_are_the_argmax_of_biased_logits(device):
    logits, present, _ = make_case((3, 5, 9, 8))
    for method in METHODS.values():
        labels, bias = expectation_labels(logits.to(device), present.to(device), return_bias=True, **method)
        some = bias.isfinite().any(1).cpu()
        expected = (logits + bias.cpu()[..., None, None]).argmax(1)
        assert torch.equal(labels.cpu()[some], expected[some])
        assert (labels.cpu()[~some] == method.get("ignore_index", -100)).all()


def test_same_bits_for_every_number_of_threads():
    logits, present, valid = make_case((5, 4, 90, 101))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for method in ("fixed", "adapt"):
                results.append(expectation_labels(logits, present, valid=valid, return_bias=True, **METHODS[method]))
    finally:
        torch.set_num_threads(threads)
    for i, result in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(result, results[i % 2], strict=True))


# ---- errors ----

ERRORS = [
    ({"logits": torch.zeros(2, 3)}, r"logits must be \[N, C, \*S\] with S of 1 to 3 dimensions, got \[2, 3\]"),
    ({"logits": torch.zeros(2, 3, 4).int()}, r"logits must be float32, .*, got torch\.(int32|Int)"),
    ({"logits": torch.zeros(2, 2049, 1)}, r"logits must have 1 to 2048 classes, got \[2, 2049, 1\]"),
    ({"present": torch.ones(2, 3)}, r"present must be bool, got torch\.(float32|Float)"),
    ({"present": torch.ones(2, 4).bool()}, r"present must be \[2, 3\], got \[2, 4\]"),
    ({"valid": torch.ones(2, 4).int()}, r"valid must be bool, got torch\.(int32|Int)"),
    ({"valid": torch.ones(2, 5).bool()}, r"valid must be \[2, 4\], got \[2, 5\]"),
    ({"background_bias": -1.0}, r"background_bias must be from 0 to 1e\+30, got -1"),
    ({"foreground_bias": float("nan")}, r"foreground_bias must be from 0 to 1e\+30, got nan"),
    ({"background_share": 1.5}, r"background_share must be from 0 to 1, got 1\.5"),
    ({"foreground_share": -0.5}, r"foreground_share must be from 0 to 1, got -0\.5"),
    ({"sweeps": -1}, r"sweeps must be at least 0, got -1"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=lambda value: next(iter(value)) if value else "")
@pytest.mark.parametrize("mode", ["eager", "fake"])
def test_errors(device, change, message, mode):
    arguments = {"logits": torch.zeros(2, 3, 4), "present": torch.ones(2, 3).bool(), **change}
    fake = torch._subclasses.FakeTensorMode()
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            there = value.to(device)
            arguments[name] = fake.from_tensor(there) if mode == "fake" else there
    with pytest.raises(RuntimeError, match=rf"^expectation_labels: {message}") as error:
        expectation_labels(**arguments)
    assert "\n" not in str(error.value).strip()


# ---- registration ----


def test_opcheck(device):
    op = torch.ops.pyseg.expectation_labels.default
    logits, present, valid = (t.to(device) for t in make_case((2, 3, 4, 5)))
    torch.library.opcheck(op, (logits, present, valid, 0.0, 0.0, 0.4, 0.2, True, 3, -100))
    torch.library.opcheck(op, (logits.detach().requires_grad_(), present, None, 1.0, 2.0, 0.0, 0.0, False, 0, 255))


def test_no_gradient(device):
    logits, present, _ = make_case((2, 3, 4, 5))
    logits = logits.to(device).requires_grad_()
    labels, bias = expectation_labels(logits, present.to(device), return_bias=True, **ADAPT)
    assert not labels.requires_grad
    assert not bias.requires_grad


def test_vmap():
    logits, present, _ = make_case((6, 3, 4, 5))
    expected = expectation_labels(logits, present, **ADAPT)
    logits, present = logits.unflatten(0, (2, 3)), present.unflatten(0, (2, 3))
    mapped = torch.vmap(lambda f, z: expectation_labels(f, z, **ADAPT), in_dims=(0, 0))(logits, present)
    assert torch.equal(mapped.flatten(0, 1), expected)
    mapped = torch.vmap(lambda f: expectation_labels(f, present[0], **ADAPT), in_dims=1)(logits.transpose(0, 1))
    assert torch.equal(mapped[0], expected[:3])


def test_autocast_changes_nothing(device):
    logits, present, _ = make_case((2, 3, 4, 5))
    logits, present = logits.to(device), present.to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got = expectation_labels(logits, present, **ADAPT)
    assert torch.equal(got, expectation_labels(logits, present, **ADAPT))


# ---- CUDA ----


@pytest.mark.cuda_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_read_present_classes_once(device, dtype):
    """Whole sectors, and none of the classes that are excluded."""
    logits, present, _ = make_case((2, 9, 32, 32), dtype)
    present[:] = torch.tensor([True, False, True, False, False, True, False, False, False])
    labels, _ = reference.expectation_labels(logits, present, **FIXED)
    logits, present = logits.to(device), present.to(device)
    least = logits.nbytes // 3 + labels.nbytes
    with cuda_budget("expectation_labels_kernel<.*, 2>", launches=1, min_bytes=least, bytes_ratio=1.15):
        got = expectation_labels(logits, present, **FIXED)
    assert torch.equal(got.cpu(), labels)


@pytest.mark.cuda_only
def test_biases_are_found_without_host(device):
    """Two launches, whatever the number of rounds and classes."""
    logits, present, valid = make_case((2, 4, 16, 33))
    labels, _ = reference.expectation_labels(logits, present, valid=valid, **ADAPT)
    logits, present, valid = logits.to(device), present.to(device), valid.to(device)
    with cuda_budget("expectation_", launches=2):
        got = expectation_labels(logits, present, valid=valid, **ADAPT)
    assert torch.equal(got.cpu(), labels)


@pytest.mark.cuda_only
def test_second_device(device):
    if torch.cuda.device_count() < 2:
        return
    logits, present, _ = make_case((2, 3, 4, 5))
    labels = expectation_labels(logits.to("cuda:1"), present.to("cuda:1"), **ADAPT)
    assert labels.device == torch.device("cuda:1")
    assert torch.equal(labels.cpu(), expectation_labels(logits, present, **ADAPT))
    with pytest.raises(RuntimeError, match=r"^expectation_labels: present must be on the device of logits"):
        expectation_labels(logits.to("cuda:1"), present.to("cuda:0"))


# ---- other instruction sets ----


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_cpu_targets(target):
    """The other instruction sets, in processes of their own."""
    run_on_cpu_target(target, "import test_expectation_labels as t; t.run_all_on_cpu()", Path(__file__).parent)


def run_all_on_cpu():
    for dtype in DTYPES:
        for shape in SHAPES[2:5]:
            test_dtypes("cpu", shape, dtype)
    for layout in LAYOUTS:
        test_layouts("cpu", layout, "adapt")
    test_many_pixels("cpu")
    test_not_a_number("cpu")
