"""What the CUDA kernels of joint_warp do: launches, bytes, orders of blocks, capabilities, devices, capture."""

import pytest
import torch
from test_joint_warp import compare
from warp_cases import DTYPES, FLOATS, assert_near, make_factors, make_image, make_labels, make_warp

from cuda_budget import cuda_budget
from devices import ORDERS, fake_gpu
from pyseg import reference
from pyseg.functional import joint_warp

pytestmark = pytest.mark.cuda_only


@pytest.mark.sm(75, 80, 90)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", [2, 3])
def test_every_kernel(device, dtype, axes):
    """On every capability, both passes; more channels than a thread of the gradient takes."""
    size = (7, 9) if axes == 2 else (3, 4, 5)
    affine, displacement = make_warp(2, size)
    image = make_image((2, 5, *size), dtype)
    compare(image, make_labels((2, *size)), affine, displacement, *make_factors(2, 5), device)
    if dtype == torch.uint8:
        compare(image, None, affine, None, *make_factors(2, 5), device, dtype=torch.float32)
    if dtype in FLOATS:
        leaf, double = image.to(device).requires_grad_(), image.double().requires_grad_()
        (grad,) = torch.autograd.grad(joint_warp(leaf, None, affine, displacement)[0].sum(), leaf)
        y = reference.joint_warp(double, None, affine, displacement)[0]
        assert_near(grad, torch.autograd.grad(y.sum(), double)[0], scale=4)


def test_budget(device):
    """One launch for image and labels; nothing but them is read and written.

    Sectors are counted without a cache, so each of four neighbours counts: at most 4 reads of the image and a write.
    """
    image, labels = make_image((1, 3, 32, 64)).to(device), make_labels((1, 32, 64)).to(device)
    affine, displacement = torch.eye(2, 3)[None], torch.ones(1, 2, 3, 3) / 3
    least = 2 * (image.nbytes + labels.nbytes)
    with cuda_budget("::joint_warp_forward<", launches=1, min_bytes=least, bytes_ratio=3):
        joint_warp(image, labels, affine, displacement, gain=1.1, bias=0.1)
    grad, parameters = torch.ones_like(image), (affine.to(device), displacement.to(device))
    least = 2 * image.nbytes
    for kernel in ("cells", "starts"):
        with cuda_budget(f"::joint_warp_{kernel}<", launches=1):
            torch.ops.pyseg._joint_warp_backward(grad, *parameters, None, [32, 64], "reflect", -0.5, False)
    with cuda_budget("::joint_warp_gather<", launches=1, min_bytes=least, bytes_ratio=12):
        torch.ops.pyseg._joint_warp_backward(grad, *parameters, None, [32, 64], "reflect", -0.5, False)


def test_same_bits_for_every_order_of_blocks(device):
    affine, displacement = make_warp(2, (9, 12))
    image = make_image((2, 3, 9, 12)).to(device).requires_grad_()
    results = []
    for order in ORDERS:
        if fake_gpu() is not None:
            fake_gpu().set_order(order)
        y, _ = joint_warp(image, None, affine, displacement)
        results.append((y, *torch.autograd.grad(y.square().sum(), image)))
    if fake_gpu() is not None:
        fake_gpu().set_order(ORDERS[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_too_fine_a_grid(device):
    with pytest.raises(RuntimeError, match="displacement must have at most 768 control points along the last axis on"):
        joint_warp(torch.ones(1, 1, 4, 4, device=device), None, None, torch.zeros(1, 2, 1, 769))


def test_second_device(device):
    """Kernels run where the image is; parameters follow it."""
    if torch.cuda.device_count() < 2:
        return
    affine, displacement = make_warp(1, (5, 6))
    image = make_image((1, 1, 5, 6))
    there = image.to("cuda:1").requires_grad_()
    y, _ = joint_warp(there, None, affine, displacement)
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.cpu(), joint_warp(image, None, affine, displacement)[0])
    assert torch.autograd.grad(y.sum(), there)[0].any()
    arguments = ([5, 6], "reflect", 0.0, "reflect", 0, -0.5, False)
    with pytest.raises(RuntimeError, match="joint_warp: affine must be on the device of image"):
        torch.ops.pyseg.joint_warp(there, None, affine.to("cuda:0"), None, None, None, *arguments)


@pytest.mark.needs_gpu("graph capture")
def test_graph_capture(device):
    affine, displacement = (t.to(device) for t in make_warp(2, (20, 30)))
    image, labels = make_image((2, 3, 20, 30)).to(device).requires_grad_(), make_labels((2, 20, 30)).to(device)

    def run():
        y, warped = joint_warp(image, labels, affine, displacement)
        return y, warped, *torch.autograd.grad(y.sum(), image)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
