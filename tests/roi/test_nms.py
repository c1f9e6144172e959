"""nms and batched_nms against the reference and torchvision."""

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyseg import reference
from pyseg.functional import batched_nms, nms, nms_padded


def make(count, classes=4, seed=0, dtype=torch.float32, cells=200.0):
    """Boxes, scores, classes; few cells make many overlaps and many equal scores."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * cells
    size = torch.rand(count, 2, generator=generator) * 60 + 1
    boxes = torch.cat([corner, corner + size], 1)
    scores = (torch.rand(count, generator=generator) * 500).round() / 500
    return boxes.to(dtype), scores.to(dtype), torch.randint(-2, classes, (count,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_torchvision(device, dtype, threshold):
    for count in (0, 1, 15, 16, 17, 300, 1100):
        boxes, scores, idxs = make(count, dtype=dtype, seed=count)
        on_device = (boxes.to(device), scores.to(device))
        expected = torchvision.ops.nms(boxes, scores, threshold)
        assert torch.equal(nms(*on_device, threshold).cpu(), expected)
        rows, number = nms_padded(*on_device, threshold)
        assert torch.equal(rows[: int(number)].cpu(), expected)
        assert (rows[int(number) :] == -1).all()
        got = batched_nms(*on_device, idxs.to(device), threshold).cpu()
        if count:  # its order of equal scores is not defined
            expected = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, idxs, threshold)
            assert torch.equal(got.sort().values, expected.sort().values)
            assert torch.equal(scores[got], scores[expected])
        rows, number = nms_padded(*on_device, threshold, idxs.to(device))
        assert torch.equal(rows[: int(number)].cpu(), got)


@st.composite
def drawn(draw):
    """Corners on a coarse grid: overlaps are exact fractions, ties at the threshold are common."""
    corners = st.integers(-3, 8)
    rows = draw(
        st.lists(st.tuples(corners, corners, corners, corners, st.integers(0, 3), st.integers(0, 1)), max_size=25)
    )
    boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4)
    return (
        boxes,
        torch.tensor([float(row[4]) for row in rows]),
        torch.tensor([row[5] for row in rows], dtype=torch.int64),
    )


def test_drawn_cases(device):
    @settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn(), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]))
    def run(case, threshold):
        boxes, scores, idxs = case
        got = nms(boxes.to(device), scores.to(device), threshold).cpu()
        assert torch.equal(got, torchvision.ops.nms(boxes, scores, threshold))
        assert torch.equal(got, reference.nms(boxes, scores, threshold))
        got = batched_nms(boxes.to(device), scores.to(device), idxs.to(device), threshold).cpu()
        assert torch.equal(got, reference.nms(boxes, scores, threshold, idxs))

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threshold_that_is_no_float(device, dtype):
    """A float32 overlap is compared with the threshold in double precision, as in torchvision's kernel."""
    boxes = torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 1], [10, 0, 13, 1], [10, 0, 11, 1], [0, 5, 1, 6]], dtype=dtype)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5], dtype=dtype)
    third = torch.tensor(1 / 3).item()  # as float32: a bit more than 1 / 3
    for threshold in (1 / 3, third, third + 1e-12, third - 1e-12, -0.5, -1e-50, 1e-50, 1e300, -1e300, float("nan")):
        expected = torchvision.ops.nms(boxes, scores, threshold)
        assert torch.equal(reference.nms(boxes, scores, threshold), expected)
        assert torch.equal(nms(boxes.to(device), scores.to(device), threshold).cpu(), expected)
        idxs = torch.zeros(5, dtype=torch.int64)
        got = batched_nms(boxes.to(device), scores.to(device), idxs.to(device), threshold)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_other_types_of_classes(device, dtype):
    boxes, scores, idxs = make(60)
    idxs = idxs.abs().to(dtype)
    expected = torchvision.ops.batched_nms(boxes, scores, idxs, 0.5)
    on_device = (boxes.to(device), scores.to(device))
    got = batched_nms(*on_device, idxs.to(device), 0.5)
    assert torch.equal(got.cpu().sort().values, expected.sort().values)
    rows, number = nms_padded(*on_device, 0.5, idxs.to(device))
    assert torch.equal(rows[: int(number)], got)


def test_special_values(device):
    nan, inf = float("nan"), float("inf")
    rows = [[0.0, 0, 10, 10], [1, 1, 10, 10], [0, 0, nan, 10], [0, 0, inf, inf], [5, 5, 5, 5], [9, 9, 1, 1]]
    boxes = torch.tensor([*rows, [0, 0, 9, 9]])
    scores = torch.tensor([0.5, nan, 0.9, 0.8, 0.5, inf, -inf])
    got = nms(boxes.to(device), scores.to(device), 0.5).cpu()
    assert torch.equal(got, torchvision.ops.nms(boxes, scores, 0.5))


def test_16_bits(device):
    """Compared in float32."""
    boxes, scores, _ = make(100, dtype=torch.float16)
    got = nms(boxes.to(device), scores.to(device), 0.5).cpu()
    assert torch.equal(got, torchvision.ops.nms(boxes.float(), scores.float(), 0.5))


def test_same_rows_for_every_number_of_threads():
    threads, results = torch.get_num_threads(), []
    boxes, scores, idxs = make(3000, cells=2000.0)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((nms(boxes, scores, 0.5), batched_nms(boxes, scores, idxs, 0.5)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_opcheck(device):
    boxes, scores, idxs = (t.to(device) for t in make(20))
    for op in (torch.ops.pyseg.nms.default, torch.ops.pyseg.nms_padded.default):
        torch.library.opcheck(op, (boxes, scores, idxs, 0.5))
        torch.library.opcheck(op, (boxes, scores, None, 0.5))


def test_compile(device):
    """With a size that is data, and without."""
    boxes, scores, idxs = (t.to(device) for t in make(50))

    def function(boxes, scores, idxs):
        rows, count = nms_padded(boxes * 2, scores, 0.5, idxs)
        return boxes[batched_nms(boxes, scores, idxs, 0.5)] + 1, rows, count

    fast = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(fast(boxes, scores, idxs), function(boxes, scores, idxs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, s: nms(b[:, :3], s, 0.5), r"nms: boxes must be \[K, 4\], got \[5, 3\]"),
        (lambda b, s: nms(b, s[:3], 0.5), r"scores must be \[5\], got \[3\]"),
        (lambda b, s: nms(b.int(), s, 0.5), "boxes must be float32, float64, float16 or bfloat16, got torch.Int"),
        (lambda b, s: nms(b, s.int(), 0.5), "scores must be float32, float64, float16 or bfloat16, got torch.Int"),
        (lambda b, s: batched_nms(b, s, s, 0.5), r"idxs must be \[5\] of int64, got \[5\] of torch.Float"),
        (lambda b, s: batched_nms(b, s, s[:2].long(), 0.5), r"idxs must be \[5\] of int64, got \[2\] of torch.Long"),
    ],
)
def test_errors(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(5, 4, device=device), torch.ones(5, device=device))
