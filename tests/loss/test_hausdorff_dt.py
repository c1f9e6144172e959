"""_hausdorff_dt, which computes the Hausdorff loss of labels in C++, against the loss put together in PyTorch."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segmentation_cases import DTYPES, LAYOUTS, generator, in_layout

import pyseg.functional as P
from drawn import drawn_settings
from pyseg.functional.losses import boundary

hausdorff = torch.ops.pyseg._hausdorff_dt


def blobs(shape, dtype=torch.float32, layout="contiguous", seed=0):
    """Smooth maps, of which some classes have no pixels, and their labels."""
    n, c, *size = shape
    mode = "bilinear" if len(size) == 2 else "trilinear"

    def smooth(s):
        small = torch.randn(n, c, *(max(2, k // 5) for k in size), generator=generator(seed + s))
        return torch.nn.functional.interpolate(small, size, mode=mode, align_corners=True)

    logits, labels = 4 * smooth(0), smooth(1)
    return in_layout(logits.to(dtype), layout), labels.argmax(1)


def check(logits, labels, **arguments):
    """Loss table and gradient of a random combination of it, by the operator and without it in float64."""
    call = functools.partial(P.hausdorff_dt_loss, target=labels, reduction="none", **arguments)
    results = []
    for z, fused in ((logits, True), (logits.detach().double().contiguous(), False)):
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr(boundary, "_takes_fused", lambda of: False)
            z = z.detach().requires_grad_()
            table = call(z)
            factor = torch.randn(table.shape, generator=generator(1), dtype=torch.float64).to(table)
            results.append((table.double(), torch.autograd.grad(table, z, factor)[0].double()))
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}.get(logits.dtype, 1e-2)
    for got, expected in zip(*results, strict=True):
        scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1
        torch.testing.assert_close(got, expected, rtol=min(tolerance, 1e-4), atol=tolerance * scale)


@st.composite
def drawn(draw):
    rank = draw(st.integers(2, 3))
    shape = (draw(st.integers(0, 2)), draw(st.sampled_from([2, 3, 6, 23])))
    shape += tuple(draw(st.integers(1, {2: 70, 3: 12}[rank])) for _ in range(rank))
    layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([torch.float32, torch.float64]))
    logits, labels = blobs(shape, dtype, layout, draw(st.integers(0, 5)))
    arguments = {
        "one_sided": draw(st.booleans()),
        "spacing": draw(st.sampled_from([None, (2.0, 0.5, 1.5)[:rank]])),
    }
    if shape[1] > 2 and draw(st.booleans()):
        arguments["classes"] = draw(st.sampled_from([[1], [2, 0], [1, 1, 2]]))
    return logits, labels, arguments


@drawn_settings(80)
@given(drawn())
def test_drawn_cases(case):
    check(*case[:2], **case[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(dtype, layout):
    logits, labels = blobs((2, 5, 33, 47), dtype=dtype, layout=layout)
    check(logits, labels)
    for label_dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(P.hausdorff_dt_loss(logits, labels.to(label_dtype)), P.hausdorff_dt_loss(logits, labels))


def test_many_pixels():
    """Several units of an image, which end in the middle of a block; a result beyond 4 MB, past the caches."""
    for shape in ((1, 3, 131, 127), (1, 9, 352, 352)):
        check(*blobs(shape))


def test_images_of_one_label():
    """Absent classes and classes that are everywhere have no boundary: only the other side counts."""
    logits, labels = blobs((3, 3, 17, 19))
    labels[0], labels[1] = 2, 0
    logits[1] = torch.tensor([9.0, 0.0, 0.0]).view(3, 1, 1)
    check(logits, labels)
    assert P.hausdorff_dt_loss(logits[1:2], labels[1:2]) == 0
    check(*blobs((2, 3, 1, 1)))


def test_nan_stays_in_its_pixel():
    logits, labels = blobs((2, 3, 17, 19))
    logits[0, 1, 3, 4] = float("nan")
    loss, error = hausdorff(logits, labels.to(torch.uint8), [0, 1, 2], [1.0, 1.0], False)
    assert loss[0].isnan().all()
    assert loss[1].isfinite().all()
    assert error.isnan().sum() == 3
    assert error[0, :, 3, 4].isnan().all()


def test_same_bits_for_any_number_of_threads():
    logits, labels = blobs((2, 5, 150, 151))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(hausdorff(logits, labels.to(torch.uint8), [0, 1, 2, 4], [1.0, 1.0], False))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_classes_that_are_not_listed_are_zero():
    logits, labels = blobs((2, 3, 9, 8))
    for classes in ([], [1], [2, 2, 1]):
        loss, error = hausdorff(logits, labels.to(torch.uint8), classes, [1.0, 1.0], False)
        for c in range(3):
            assert loss[:, c].any().item() == error[:, c].any().item() == (c in classes)


ARGUMENTS = {
    "logits": torch.zeros(2, 3, 4, 5),
    "target": torch.zeros(2, 4, 5, dtype=torch.uint8),
    "classes": [0],
    "spacing": [1.0, 1.0],
    "one_sided": False,
}
WRONG = [
    ({"target": torch.zeros(2, 4, 5, dtype=torch.int64)}, r"target must be uint8 labels \[2, 4, 5\]"),
    ({"target": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)}, r"target must be uint8 labels \[2, 4, 5\]"),
    ({"target": torch.full((2, 4, 5), 3, dtype=torch.uint8)}, "target must have labels from 0 to 2, got 3"),
    ({"classes": [3]}, r"classes must be from 0 to 2, got \[3\]"),
    ({"spacing": [1.0]}, r"spacing must have 2 values, got \[1\]"),
    ({"spacing": [1.0, 0.0]}, "spacing must be positive"),
    (
        {"logits": torch.zeros(1, 256, 2, 2), "target": torch.zeros(1, 2, 2, dtype=torch.uint8)},
        "logits must have up to 255 classes",
    ),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_errors(changes, message):
    with pytest.raises(RuntimeError, match="_hausdorff_dt: " + message):
        hausdorff(*{**ARGUMENTS, **changes}.values())


def test_opcheck():
    for dtype, layout in ((torch.float32, "contiguous"), (torch.float16, "channels_last")):
        logits, labels = blobs((2, 3, 6, 7), dtype=dtype, layout=layout)
        arguments = (logits, labels.to(torch.uint8), [0, 2], [1.0, 1.0], False)
        torch.library.opcheck(hausdorff.default, arguments)
