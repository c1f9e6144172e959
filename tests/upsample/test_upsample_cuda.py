"""What the CUDA kernels of interpolation do: bytes, launches, orders of blocks, far dilations, devices, capture."""

import pytest
import torch
from test_upsample_concat_depthwise import compare
from upsample_cases import DTYPES, assert_near, make_filters, make_map, make_pyramid

from cuda_budget import cuda_budget
from devices import ORDERS, fake_gpu
from pyseg import reference
from pyseg.functional import bilinear_upsample, upsample_concat, upsample_concat_depthwise

pytestmark = pytest.mark.cuda_only


@pytest.mark.sm(75, 80, 90)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_dilations(device, dtype, layout):
    """Beyond what shared memory holds: taps read the maps themselves."""
    size = (50, 51) if layout == "contiguous" else (19, 20)
    maps = make_pyramid([(1, *size), (2, 5, 4)], dtype, layout, images=1, device=device)
    compare(maps, make_filters(2, 3, dtype, device), (2, 60), terms=4000)


@pytest.mark.sm(75, 80, 90)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(device, dtype, layout):
    """On every capability: vectors of channels and single ones, both passes."""
    for channels in (16, 3):
        maps = make_pyramid([(channels, 9, 8), (16, 4, 5)], dtype, layout, images=1, device=device)
        leaves = [m.requires_grad_() for m in maps]
        y = upsample_concat(leaves, (11, 35))
        assert_near(y, reference.upsample_concat([m.detach().cpu().double() for m in maps], (11, 35)))
        assert torch.autograd.grad(y.sum(), leaves)[0].any()
    compare(maps, make_filters(2, 19, dtype, device), (1, 3))


def moved(*tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_upsample_budget(device, layout):
    """A launch a map; source elements are read for two columns, not for four outputs.

    Sectors are counted without a cache: an element of the gradient by each of the four that it goes to.
    """
    maps = make_pyramid([(16, 16, 32), (16, 8, 16)], layout=layout, images=1, device=device)
    with cuda_budget("::upsample_taps<", launches=1):
        y = upsample_concat(maps)
    with cuda_budget("::upsample_forward<", launches=2, min_bytes=moved(*maps, y), bytes_ratio=2):
        upsample_concat(maps)
    grad = torch.ones_like(y)
    sizes = [size for m in maps for size in m.shape]
    with cuda_budget("::upsample_gather<", launches=2, min_bytes=moved(*maps, grad), bytes_ratio=8):
        torch.ops.pyseg._upsample_concat_backward(grad, sizes, layout == "channels_last", True, None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_depthwise_budget(device, layout):
    """One launch for all maps and rates; outputs are written once, gradients read for their tiles' surroundings.

    Sectors are counted without a cache: four neighbours and the table's entry for every interpolated element.
    """
    maps = make_pyramid([(16, 32, 64), (16, 16, 32)], layout=layout, images=1, device=device)
    weight, scale, shift = make_filters(2, 32, device=device)
    outputs = 2 * 32 * 32 * 64
    with cuda_budget(
        "::upsample_depthwise_forward<", launches=1, min_bytes=4 * outputs + moved(*maps), bytes_ratio=4.5
    ):
        y = upsample_concat_depthwise(maps, weight, (1, 2), scale=scale, shift=shift)
    grad = torch.ones_like(y)

    def backward(*needed):
        torch.ops.pyseg._upsample_concat_depthwise_backward(grad, maps, weight, [1, 2], True, *needed)

    least = moved(grad) + 4 * 32 * 32 * 64
    with cuda_budget("::upsample_depthwise_grad_maps<", launches=1, min_bytes=least, bytes_ratio=2.8):
        backward(True, False)
    with cuda_budget("::upsample_depthwise_grad_weights<", launches=1, min_bytes=moved(grad, *maps), bytes_ratio=3.5):
        backward(False, True)
    with cuda_budget("::upsample_depthwise_add_sums<", launches=1):
        backward(False, True)


@pytest.mark.sm(75, 80, 90)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_every_order_of_blocks(device, layout):
    """Nothing is added up across blocks but by one that follows."""
    maps = make_pyramid([(9, 19, 18), (3, 5, 6)], layout=layout, device=device)
    leaves = [t.requires_grad_() for t in (*maps, *make_filters(2, 12, device=device))]
    results = []
    for order in ORDERS:
        if fake_gpu() is not None:
            fake_gpu().set_order(order)
        y = upsample_concat_depthwise(leaves[:2], leaves[2], (1, 2), scale=leaves[3], shift=leaves[4])
        z = upsample_concat(leaves[:2])
        results.append(torch.autograd.grad(y.square().sum() + z.square().sum(), leaves))
    if fake_gpu() is not None:
        fake_gpu().set_order(ORDERS[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_device(device):
    """Kernels run where the tensors are, and arguments of two devices are refused."""
    if torch.cuda.device_count() < 2:
        return
    x = make_map((1, 3, 5, 6))
    there = x.to("cuda:1").requires_grad_()
    y = bilinear_upsample(there, 9)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_near(y, reference.bilinear_upsample(x.double(), (9, 9)))
    assert torch.autograd.grad(y.sum(), there)[0].any()
    weight = torch.ones(1, 3, 3, 3, device="cuda:1")
    assert upsample_concat_depthwise([there], weight, (1,)).device == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="inputs must be on the device of the inputs"):
        torch.ops.pyseg.upsample_concat([there, x.to("cuda:0")], [5, 6], True)
    with pytest.raises(RuntimeError, match="weight must be on the device of the inputs"):
        upsample_concat_depthwise([x.to("cuda:0")], weight, (1,))


def test_too_many_maps(device):
    x = torch.ones(1, 1, 4, 4, device=device)
    with pytest.raises(RuntimeError, match="inputs must be at most 16 maps on CUDA devices, got 17"):
        upsample_concat([x] * 17)


@pytest.mark.needs_gpu("graph capture")
def test_graph_capture(device):
    maps = [m.requires_grad_() for m in make_pyramid([(9, 19, 18), (3, 5, 6)], device=device)]
    weight, scale, shift = make_filters(2, 12, device=device)

    def run():
        y = upsample_concat_depthwise(maps, weight, (1, 2), scale=scale, shift=shift)
        return [y, upsample_concat(maps), *torch.autograd.grad(y.sum(), maps)]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
