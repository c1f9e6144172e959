"""paste_masks and crop_masks against the reference, torchvision and pycocotools."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from torchvision.models.detection import roi_heads
from torchvision.ops import roi_align as torchvision_roi_align

from pyseg import reference
from pyseg.functional import crop_masks, paste_masks

FLOAT, DOUBLE = torch.float32, torch.float64
ROUNDING = {FLOAT: 1e-5, DOUBLE: 1e-12, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make_masks(count, size=28, dtype=FLOAT, seed=0):
    """Smooth shapes with values from 0 to 1; size: of a square, or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.randn(count, 1, height, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 5, 1, 2).mul(4).sigmoid().to(dtype)


def make_boxes(count, height, width, seed=0, dtype=FLOAT, beyond=0.2):
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([width, height], dtype=torch.float64)
    centre = (torch.rand(count, 2, generator=generator, dtype=DOUBLE) * (1 + 2 * beyond) - beyond) * extent
    half = torch.rand(count, 2, generator=generator, dtype=DOUBLE) * extent / 2
    return torch.cat([centre - half, centre + half], 1).to(dtype)


SPECIAL = torch.tensor(
    [
        [3.0, 4.0, 3.0, 4.0],  # one point
        [9.0, 8.0, 3.0, 2.0],  # inverted
        [-50.0, 3.0, -40.0, 9.0],  # beside the image
        [3.0, 100.0, 9.0, 120.0],
        [0.0, 0.0, 300.0, 200.0],  # much larger
        [0.0, 0.0, 20.0, 16.0],  # the whole image
        [-0.5, -0.5, 0.5, 0.5],
    ]
)


def check_bits(above, values, threshold):
    """Whether a comparison agrees but for values that rounding may have moved across the threshold."""
    unsure = (values - threshold).abs() < 1e-5
    assert torch.equal(above | unsure, (values > threshold) | unsure)


def unpacked(packed, width):
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=-1, count=width)).bool()


def check_all_outputs(masks, boxes, image_size, values, threshold, padding=1):
    """bool, packed and run lengths agree with each other, and with the values."""
    arguments = (masks, boxes, image_size, threshold)
    above = paste_masks(*arguments, padding=padding)
    assert above.dtype == torch.bool
    check_bits(above.cpu(), values, threshold)
    packed = paste_masks(*arguments, "packed", padding=padding)
    assert packed.shape == (len(boxes), image_size[0], (image_size[1] + 7) // 8)
    assert torch.equal(unpacked(packed, image_size[1]), above.cpu())
    runs = paste_masks(*arguments, output="rle", padding=padding)
    expected = coco.encode(np.asfortranarray(above.cpu().numpy().astype(np.uint8).transpose(1, 2, 0)))
    assert [r["size"] for r in runs] == [e["size"] for e in expected]
    assert [r["counts"] for r in runs] == [e["counts"] for e in expected]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_reference(device, dtype):
    for size, (height, width), padding in ((1, (5, 7), 1), (6, (17, 21), 1), (14, (9, 70), 0), ((3, 5), (70, 9), 2)):
        boxes = torch.cat([make_boxes(4, height, width, seed=height), SPECIAL])
        masks = make_masks(len(boxes), size, dtype)
        got = paste_masks(masks.to(device), boxes.to(device), (height, width), padding=padding)
        expected = reference.paste_masks(masks[:, 0], boxes, (height, width), padding)
        assert got.dtype == dtype
        torch.testing.assert_close(got.cpu().double(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        check_all_outputs(masks.to(device), boxes.to(device), (height, width), got.cpu().double(), 0.45, padding)


@pytest.mark.parametrize("size", [28, 14, (28, 9), (5, 20)], ids=str)
def test_torchvision(device, size):
    """On images larger than the vectors, with boxes that reach beyond them, thresholds as detectors take them."""
    height, width = 130, 203
    boxes = torch.cat([make_boxes(25, height, width, beyond=-0.02), SPECIAL[4:]])
    masks = make_masks(len(boxes), size)
    expected = roi_heads.paste_masks_in_image(masks, boxes, (height, width))[:, 0]
    got = paste_masks(masks.to(device), boxes.to(device), (height, width))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
    for threshold in (0.5, 0.0):
        check_all_outputs(masks.to(device), boxes.to(device), (height, width), got.cpu(), threshold)


@st.composite
def drawn(draw):
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    count, seed = draw(st.integers(0, 3)), draw(st.integers(0, 99))
    boxes = make_boxes(
        count, height, width, seed, draw(st.sampled_from([FLOAT, DOUBLE])), draw(st.sampled_from([0, 1.5]))
    )
    return (
        make_masks(
            count, (draw(st.integers(1, 30)), draw(st.integers(1, 30))), draw(st.sampled_from([FLOAT, DOUBLE])), seed
        ),
        boxes,
        (height, width),
    )


def test_drawn_cases(device):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn())
    def run(case):
        masks, boxes, image_size = case
        got = paste_masks(masks.to(device), boxes.to(device), image_size)
        assert got.shape == (len(boxes), *image_size)
        for mask, box, image in zip(masks, boxes, got, strict=True):
            if (box[:2] < torch.tensor([*image_size]).flip(0)).all() and (box[2:] > 0).all():  # else torchvision fails
                expected = roi_heads.paste_masks_in_image(mask[None], box[None], image_size)[0, 0]
                torch.testing.assert_close(image.cpu(), expected, rtol=1e-5, atol=1e-5)
        check_all_outputs(masks.to(device), boxes.to(device), image_size, got.cpu(), 0.5)

    run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT, DOUBLE], ids=str)
def test_threshold_of_the_masks_type(device, dtype):
    """Is rounded to it, as in torch: a value that equals it is not above it."""
    boxes = torch.tensor([[2.0, 2.0, 20.0, 20.0]], device=device)
    for threshold in (0.3, 1 / 3, 0.7):
        masks = torch.full((1, 6, 6), threshold, dtype=dtype, device=device)
        values = paste_masks(masks, boxes, (24, 24))
        assert values[0, 10, 10] == masks[0, 0, 0]
        above = (values > threshold).cpu()
        assert torch.equal(paste_masks(masks, boxes, (24, 24), threshold).cpu(), above)
        assert torch.equal(unpacked(paste_masks(masks, boxes, (24, 24), threshold, "packed"), 24), above)
        (runs,) = paste_masks(masks, boxes, (24, 24), threshold, output="rle")
        assert runs["counts"] == coco.encode(np.asfortranarray(above[0].numpy().astype(np.uint8)))["counts"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_boxes_of_integers(device, dtype):
    masks, boxes = make_masks(3), torch.tensor([[2, 3, 20, 16], [0, 0, 30, 20], [5, 9, 6, 11]], dtype=dtype)
    expected = roi_heads.paste_masks_in_image(masks, boxes, (22, 33))[:, 0]
    got = paste_masks(masks.to(device), boxes.to(device), (22, 33))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_full_and_empty_masks(device):
    """Runs that go on from column to column, and masks without any."""
    boxes = torch.tensor(
        [[-20.0, -20.0, 60.0, 60.0], [5.0, -20.0, 12.0, 60.0], [-20.0, 3.0, 60.0, 9.0], [4.0, 4.0, 8.0, 8.0]]
    )
    for value in (1.0, 0.0):
        masks = torch.full((4, 6, 6), value)
        got = paste_masks(masks.to(device), boxes.to(device), (30, 37))
        check_all_outputs(masks.to(device), boxes.to(device), (30, 37), got.cpu(), 0.5)
    far = torch.tensor([[-1e12, -1e12, 1e12, 1e12], [1e30, 1e30, 3e38, 3e38]], device=device)
    assert paste_masks(torch.ones(2, 6, 6, device=device), far, (30, 37)).isfinite().all()
    nothing = paste_masks(torch.zeros(0, 1, 28, 28, device=device), torch.zeros(0, 4, device=device), (30, 37))
    assert nothing.shape == (0, 30, 37)
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (30, 37), output="rle") == []
    assert paste_masks(torch.ones(1, 3, 3), torch.ones(1, 4), (0, 5), 0.5).shape == (1, 0, 5)


def test_not_a_number(device):
    masks = torch.full((1, 4, 4), float("nan"), device=device)
    boxes = torch.tensor([[2.0, 2.0, 9.0, 9.0]], device=device)
    assert paste_masks(masks, boxes, (12, 12))[0, 5, 5].isnan()
    assert not paste_masks(masks, boxes, (12, 12), 0.5).any()


def test_large_output_is_written_whole():
    """Stores that pass by the caches: every byte, beside what is stored the usual way."""
    masks, boxes = make_masks(3), make_boxes(3, 1100, 1501)
    small = torch.cat([paste_masks(m[None], b[None], (1100, 1501)) for m, b in zip(masks, boxes, strict=True)])
    assert torch.equal(paste_masks(masks, boxes, (1100, 1501)), small)
    many = paste_masks(masks.repeat(4, 1, 1, 1), boxes.repeat(4, 1), (1100, 1501), 0.5)
    assert torch.equal(many, (small > 0.5).repeat(4, 1, 1))


def test_layouts(device):
    masks, boxes = make_masks(3).to(device), make_boxes(3, 40, 50).to(device)
    expected = paste_masks(masks, boxes, (40, 50))
    strided = masks.repeat_interleave(2, 3)[..., ::2].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(paste_masks(strided, boxes.t().contiguous().t(), (40, 50)), expected)
    assert torch.equal(paste_masks(masks[:, 0], boxes.double().float(), torch.Size((40, 50))), expected)


def test_gradients(device):
    boxes = make_boxes(3, 11, 13, seed=1).to(device)
    masks = make_masks(3, 4, DOUBLE)[:, 0].to(device).requires_grad_()

    def paste(masks):
        return paste_masks(masks, boxes, (11, 13))

    assert torch.autograd.gradcheck(paste, masks)
    assert torch.autograd.gradgradcheck(paste, masks)
    assert not paste_masks(masks, boxes, (11, 13), 0.5).requires_grad
    grad = torch.randn(3, 11, 13, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).to(device)
    (expected,) = torch.autograd.grad(paste(masks), masks, grad)
    for dtype in (FLOAT, torch.float16, torch.bfloat16):
        own = masks.detach().to(dtype).requires_grad_()
        (got,) = torch.autograd.grad(paste(own), own, grad.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])


def test_same_bits_for_every_number_of_threads():
    threads, results = torch.get_num_threads(), []
    masks, boxes = make_masks(9).requires_grad_(), make_boxes(9, 150, 170)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            values = paste_masks(masks, boxes, (150, 170))
            (gradient,) = torch.autograd.grad(values.square().sum(), masks)
            results.append([values, gradient, paste_masks(masks, boxes, (150, 170), 0.5, "packed")])
            results[-1].append(crop_masks(values.detach() > 0.5, boxes, torch.arange(9), 14))
            results[-1].append(str(paste_masks(masks, boxes, (150, 170), output="rle")))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:-1], other[:-1], strict=True))
        assert results[0][-1] == other[-1]


@pytest.mark.parametrize("kind", ["values", "bool", "packed"])
def test_opcheck(device, kind):
    masks = make_masks(3, 4)[:, 0].to(device).requires_grad_()
    boxes = make_boxes(3, 11, 13).to(device)
    torch.library.opcheck(torch.ops.pyseg.paste_masks.default, (masks, boxes, 11, 13, 0.5, kind, 1))
    torch.library.opcheck(torch.ops.pyseg.paste_masks_rle.default, (masks.detach(), boxes, 11, 13, 0.5, 1))
    grad = torch.randn(3, 11, 13, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.pyseg._paste_masks_backward.default, (grad, boxes, 4, 4, 1))
    rows = torch.tensor([[0.0, 1, 1, 5, 6]], device=device)
    torch.library.opcheck(torch.ops.pyseg.crop_masks.default, (masks.detach() > 0.5, rows, [3, 4], 0, True))


# ---- crop_masks ----


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, FLOAT, torch.float16], ids=str)
def test_crop_like_torchvision(device, dtype):
    """project_masks_on_boxes, and detectron2's aligned form of it."""
    masks = paste_masks(make_masks(4), make_boxes(4, 90, 120, seed=3, beyond=0), (90, 120), 0.5).to(dtype)
    boxes, indices = make_boxes(20, 90, 120, seed=5), torch.arange(20) % 4
    got = crop_masks(masks.to(device), boxes.to(device), indices.to(device), 28)
    expected = roi_heads.project_masks_on_boxes(masks.float(), boxes, indices, 28)
    tolerance = 1e-3 if dtype == torch.float16 else 1e-4
    torch.testing.assert_close(got.cpu().float(), expected, rtol=tolerance, atol=1e-4)
    rows = torch.cat([indices[:, None].float(), boxes], 1)
    for ratio, size in ((0, (5, 9)), (2, (14, 14))):
        got = crop_masks(
            masks.to(device), boxes.to(device), indices.to(device), size, sampling_ratio=ratio, aligned=True
        )
        expected = torchvision_roi_align(masks[:, None].float(), rows, size, 1.0, ratio, True)[:, 0]
        torch.testing.assert_close(
            got.cpu().float(), expected, rtol=1e-3 if dtype == torch.float16 else 1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
def test_crop_with_boxes_that_require_gradients(device, dtype):
    masks = torch.ones(1, 16, 20, dtype=dtype, device=device)
    boxes = make_boxes(3, 16, 20).to(device).requires_grad_()
    got = crop_masks(masks, boxes, torch.zeros(3, dtype=torch.int64, device=device), 4)
    assert not got.requires_grad
    assert torch.equal(got, crop_masks(masks, boxes.detach(), torch.zeros(3, dtype=torch.int64, device=device), 4))


def test_crop_of_special_boxes(device):
    masks = torch.ones(1, 16, 20, dtype=torch.bool)
    boxes = torch.cat([SPECIAL])
    index = torch.zeros(len(boxes), dtype=torch.int64)
    got = crop_masks(masks.to(device), boxes.to(device), index.to(device), 4)
    rows = torch.cat([index[:, None].float(), boxes], 1)
    expected = torchvision_roi_align(masks[:, None].float(), rows, (4, 4), 1.0)[:, 0]
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert crop_masks(masks[:, :, ::2].to(device), boxes[:0].to(device), index[:0].to(device), 4).shape == (
        0,
        4,
        4,
    )


def test_back_and_forth(device):
    """A mask that is pasted and cropped is much the same mask."""
    masks, boxes = make_masks(4), make_boxes(4, 300, 400, seed=2, beyond=-0.2)
    pasted = paste_masks(masks.to(device), boxes.to(device), (300, 400), 0.5)
    back = crop_masks(pasted, boxes.to(device), torch.arange(4, device=device), 28)
    agree = (back.cpu() > 0.5) == (masks[:, 0] > 0.5)
    assert agree.float().mean() > 0.85


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: paste_masks(m[0, 0], b, (5, 5)), r"paste_masks: masks must be \[K, m_h, m_w\], got \[6, 6\]"),
        (
            lambda m, b: paste_masks(m.int(), b, (5, 5)),
            "masks must be float32, float64, float16 or bfloat16, got torch.Int",
        ),
        (lambda m, b: paste_masks(m, b[:1], (5, 5)), r"boxes must be \[2, 4\] for as many masks, got \[1, 4\]"),
        (lambda m, b: paste_masks(m, b[:, :3], (5, 5)), r"boxes must be \[2, 4\] for as many masks, got \[2, 3\]"),
        (lambda m, b: paste_masks(m[..., :0], b, (5, 5)), r"masks must be \[K, m_h, m_w\], got \[2, 6, 0\]"),
        (lambda m, b: paste_masks(m, b, (-1, 5)), "image_size must not be negative, got -1 and 5"),
        (lambda m, b: paste_masks(m, b, (5, 5), padding=-1), "padding must not be negative, got -1"),
        (lambda m, b: paste_masks(m, b, (5, 5), output="png"), "output must be dense, packed or rle, got png"),
        (
            lambda m, b: torch.ops.pyseg.paste_masks(m[:, 0], b, 5, 5, 0.5, "dense", 1),
            "output must be values, bool or packed",
        ),
        (
            lambda m, b: crop_masks(m[:, 0].int(), b, torch.arange(2), 3),
            "crop_masks: masks must be bool or uint8, got torch.Int",
        ),
        (lambda m, b: crop_masks(m > 0, b, torch.arange(2), 3), r"masks must be \[N, H, W\], got \[2, 1, 6, 6\]"),
        (lambda m, b: crop_masks(m[:, 0] > 0, b[:, :3], torch.arange(2), 3), r"boxes must be \[K, 5\], got \[2, 4\]"),
        (
            lambda m, b: crop_masks(m[:, 0] > 0, b, torch.arange(2), 0),
            r"output_size must be 2 positive integers, got \[0, 0\]",
        ),
    ],
)
def test_errors(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(2, 1, 6, 6, device=device), torch.tensor([[0.0, 1, 4, 4], [0, 0, 2, 3]], device=device))


def test_invalid_boxes(device):
    """Errors on the CPU; on CUDA, where nobody waits for the boxes, masks of zeros and crops of NaN."""
    masks, boxes = torch.ones(2, 6, 6, device=device), torch.tensor([[0.0, 1, 4, 4], [0, 0, 2, 3]], device=device)
    far = boxes * torch.tensor([[float("inf")], [1.0]], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"boxes must be finite, got .*(inf|nan) in row 0"):
            paste_masks(masks, far, (5, 5))
        with pytest.raises(RuntimeError, match="boxes must have batch indices from 0 to 1, got 2"):
            crop_masks(masks > 0, boxes, torch.arange(2) + 1, 3)
        return
    for output in (paste_masks(masks, far, (5, 5)), paste_masks(masks, far, (5, 5), 0.5)):
        assert not output[0].any()
        assert output[1].any()
    assert next(run["counts"] for run in paste_masks(masks, far, (5, 5), output="rle")) == b"i0"
    crops = crop_masks(masks > 0, boxes, torch.arange(2) + 1, 3)
    assert crops[0].isfinite().all()
    assert crops[1].isnan().all()
