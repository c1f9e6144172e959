"""What the CUDA kernels of the RoI operators do: bytes, launches, orders of blocks, devices, graph capture."""

import pytest
import torch
import torchvision
from roi_cases import make_boxes, make_map
from test_nms import make as make_scored
from test_paste_masks import make_boxes as paste_boxes
from test_paste_masks import make_masks
from test_roi_align import SCALES, assert_near, make_pyramid, pyramid_boxes

import pyseg
from cuda_budget import cuda_budget
from devices import ORDERS, fake_gpu
from pyseg import reference
from pyseg.functional import batched_nms, multiscale_roi_align, nms, nms_padded, roi_align

pytestmark = pytest.mark.cuda_only


def test_roi_align_budget(device):
    """One launch for all levels; loads of whole vectors where channels lie side by side; one writer an output."""
    features = [f.to(device) for f in make_pyramid(16, layout="channels_last")]
    boxes = pyramid_boxes().to(device)
    with cuda_budget("::roi_align_forward<", launches=1):
        y = multiscale_roi_align(features, boxes, 2, SCALES, 2)
    grad, sizes = torch.ones_like(y), [size for f in features for size in f.shape]
    written = sum(f.nbytes for f in features)
    with cuda_budget("::roi_align_grad_maps<", launches=1, min_bytes=written, bytes_ratio=60):
        torch.ops.pyseg._roi_align_backward(
            grad, [], boxes, sizes, [1] * 4, SCALES, 2, False, "avg", [2.0, 5.0, 224.0, 4.0, 0.0, 1e-6], True, False
        )


@pytest.mark.sm(75, 80, 90)
def test_same_bits_for_every_order_of_blocks(device):
    """Nothing is added up across blocks."""
    x = make_map((2, 70, 9, 11)).to(device).requires_grad_()
    boxes = make_boxes(6, 2, (9, 11), seed=4).to(device).requires_grad_()
    results = []
    for order in ORDERS:
        if fake_gpu() is not None:
            fake_gpu().set_order(order)
        results.append(torch.autograd.grad(roi_align(x, boxes, 3, 1.0, 2).square().sum(), (x, boxes)))
    if fake_gpu() is not None:
        fake_gpu().set_order(ORDERS[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_device(device):
    """Kernels run where the tensors are, and arguments of two devices are refused."""
    if torch.cuda.device_count() < 2:
        return
    x, boxes = make_map((1, 3, 5, 6)), make_boxes(2, 1, (5, 6))
    there, rows = x.to("cuda:1").requires_grad_(), boxes.to("cuda:1")
    y = roi_align(there, rows, 2, 1.0, 2)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_near(y.detach(), reference.roi_align(x, boxes, (2, 2), 1.0, 2))
    assert torch.autograd.grad(y.sum(), there)[0].any()
    kept = pyseg.functional.nms(rows[:, 1:], torch.ones(2, device="cuda:1"), 0.9)
    assert kept.device == torch.device("cuda:1")
    masks = torch.ones(2, 4, 4, device="cuda:1")
    for output in ("dense", "rle"):
        pasted = pyseg.functional.paste_masks(masks, rows[:, 1:], (5, 6), output=output)
        assert len(pasted) == 2
    with pytest.raises(RuntimeError, match="roi_align: boxes must be on the device of the maps"):
        torch.ops.pyseg.roi_align(there, boxes.to("cuda:0"), [2, 2], 1.0, 2, True, "avg")


def test_too_many_levels(device):
    x = torch.ones(1, 1, 4, 4, device=device)
    with pytest.raises(RuntimeError, match="features must be at most 16 maps on CUDA devices, got 17"):
        multiscale_roi_align([x] * 17, torch.zeros(1, 5, device=device), 2, [1.0] * 17)


@pytest.mark.block_orders
@pytest.mark.sm(75, 80, 90)
def test_nms_of_many_words(device):
    """More than one block of words, with and without classes, whatever the order of the blocks."""
    boxes, scores, idxs = make_scored(200, cells=400.0)
    on_device = boxes.to(device), scores.to(device)
    assert torch.equal(nms(*on_device, 0.4).cpu(), torchvision.ops.nms(boxes, scores, 0.4))
    got = batched_nms(*on_device, idxs.to(device), 0.4).cpu()
    assert torch.equal(got, reference.nms(boxes, scores, 0.4, idxs))


def test_nms_budget(device):
    """Half a matrix of bits, one launch each, and no more."""
    boxes, scores, _ = (t.to(device) for t in make_scored(256))
    with cuda_budget("::nms_overlaps<", launches=1, min_bytes=256 * 4 * 8 // 2 + boxes.nbytes, bytes_ratio=20):
        nms_padded(boxes, scores, 0.5)
    with cuda_budget("::nms_reduce", launches=1):
        nms_padded(boxes, scores, 0.5)


def test_paste_masks_budget(device):
    """Each output is written once; run lengths hold no image."""
    masks, boxes = make_masks(4).to(device), paste_boxes(4, 60, 90, beyond=-0.3).to(device)
    inside = 4 * 60 * 90
    for kind, size in (("values", 4 * inside), ("bool", inside), ("packed", 4 * 60 * 12)):
        with cuda_budget("::paste_masks<", launches=1):
            torch.ops.pyseg.paste_masks(masks[:, 0], boxes, 60, 90, 0.5, kind, 1)
        far = boxes + 1000  # nothing but the output, and where its rows' boxes are
        with cuda_budget("::paste_masks<", min_bytes=size, bytes_ratio=50 if kind == "packed" else 10):
            torch.ops.pyseg.paste_masks(masks[:, 0], far, 60, 90, 0.5, kind, 1)


@pytest.mark.needs_gpu("graph capture")
def test_graph_capture(device):
    """Nothing waits for the device but nms and run lengths, whose sizes are data."""
    features, boxes = [f.to(device) for f in make_pyramid()], pyramid_boxes().to(device)
    scores, masks = torch.rand(len(boxes), device=device), torch.rand(len(boxes), 14, 14, device=device)

    def run():
        pooled = multiscale_roi_align(features, boxes, 2, SCALES, 2)
        pasted = pyseg.functional.paste_masks(masks, boxes[:, 1:], (192, 256), 0.5, "packed")
        return [pooled, pasted, *nms_padded(boxes[:, 1:], scores, 0.5)]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
