"""What the CUDA kernels on segmentation maps do on the way to their results: bytes moved against the least possible.

Counts come from the fake GPU, which knows no cache: a sector that two requests touch counts twice. On a real GPU only
results are compared.
"""

import pytest
import torch
from segmentation_cases import GRAD_TOLERANCE, assert_near, generator, make_dense, make_labels, make_logits

import pyseg  # noqa: F401  registers the operators
from cuda_budget import cuda_budget
from pyseg import reference

pytestmark = pytest.mark.cuda_only

HALF, BFLOAT16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = {HALF: "__half", BFLOAT16: "__nv_bfloat16", FLOAT: "float", DOUBLE: "double"}
SHAPE = (1, 19, 32, 64)
BYTES = 1.1  # partial sums of a block's 1024 pixels, the gradient of the sums for each block


def kernel(name, dtype, tiles=True):
    return f"segmentation_{name}_kernel<{NAMES[dtype]}, {'true' if tiles else 'false'}>"


@pytest.mark.block_orders
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_statistics_read_logits_once(device, activation, layout, dtype):
    logits, labels = make_logits(SHAPE, dtype, layout=layout), make_labels(SHAPE, ignore=255)
    weight = torch.rand(labels.shape, generator=generator(3))
    grad = torch.randn(1, 19, 11, dtype=torch.float64, generator=generator(4))
    arguments = (activation, 255, 2.0, True, True, True)
    z, t, w, g = (x.to(device) for x in (logits, labels, weight, grad))
    wide = torch.float64 if dtype == DOUBLE else torch.float32
    read = logits.nbytes + labels.nbytes + weight.nbytes
    with (
        cuda_budget(kernel("statistics", dtype), launches=1, min_bytes=read, bytes_ratio=BYTES),
        cuda_budget("segmentation_statistics_reduce", launches=1),
    ):
        got, _ = torch.ops.pyseg.segmentation_statistics(z, t, w, *arguments)
    z64 = logits.double().requires_grad_()
    expected = reference.segmentation_statistics(z64, labels, weight, *arguments)
    assert_near(got, expected, 1e-5)
    assert torch.equal(torch.ops.pyseg.segmentation_statistics(z, t, w, *arguments)[0].cpu(), got.cpu())
    with cuda_budget(kernel("backward", dtype), launches=1, min_bytes=read + logits.nbytes, bytes_ratio=BYTES):
        dz = torch.ops.pyseg._segmentation_statistics_backward(g, z, t, w, *arguments, g.new_empty(0, dtype=wide))
    assert dz.stride() == z.stride()
    assert_near(dz, torch.autograd.grad(expected, z64, grad)[0], GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dense_targets_are_read_once(device, layout):
    logits, target = make_logits(SHAPE, layout=layout), make_dense(SHAPE, layout=layout)
    z, g = logits.to(device).requires_grad_(), target.to(device)
    with cuda_budget(kernel("statistics", FLOAT), launches=1, min_bytes=2 * logits.nbytes, bytes_ratio=BYTES):
        got, _ = torch.ops.pyseg.segmentation_statistics(z, g, None, "softmax", None, 0.0, True, True, False)
    with cuda_budget(kernel("backward", FLOAT), launches=1, min_bytes=3 * logits.nbytes, bytes_ratio=BYTES):
        got.sum().backward()


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pixel_cross_entropy_reads_logits_once(device, layout, dtype):
    logits, labels = make_logits(SHAPE, dtype, layout=layout), make_labels(SHAPE, ignore=255)
    size = 8 if dtype == DOUBLE else 4
    for activation, out in (("softmax", labels.numel() * size), ("sigmoid", logits.numel() * size)):
        z = logits.to(device).requires_grad_()
        least = logits.nbytes + labels.nbytes + out
        with cuda_budget(kernel("pixel_loss", dtype), launches=1, min_bytes=least, bytes_ratio=BYTES):
            got, _ = torch.ops.pyseg.pixel_cross_entropy(z, labels.to(device), None, activation, 255, 0.0, 0.0)
        grad = torch.ones_like(got)
        with cuda_budget(kernel("backward", dtype), launches=1, min_bytes=least + logits.nbytes, bytes_ratio=BYTES):
            torch.autograd.grad(got, z, grad)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_many_classes_take_no_tiles(device, dtype):
    """More than shared memory holds: read three times (forward) and four times (backward)."""
    logits = make_logits((1, 300, 2, 50), dtype)
    labels = make_labels(logits.shape)
    z = logits.to(device).requires_grad_()
    names = [kernel(name, dtype, tiles=False) for name in ("statistics", "backward", "pixel_loss")]
    with cuda_budget(names[0], launches=1), cuda_budget(names[1], launches=1):
        got, _ = torch.ops.pyseg.segmentation_statistics(
            z, labels.to(device), None, "softmax", None, 0.0, True, True, False
        )
        (dz,) = torch.autograd.grad(got.sum(), z)
    wide = logits.double().requires_grad_()
    expected = reference.segmentation_statistics(wide, labels, None, "softmax", None, 0.0, True, True, False)
    assert_near(got, expected, 1e-5)
    assert_near(dz, torch.autograd.grad(expected.sum(), wide)[0], GRAD_TOLERANCE[dtype])
    with cuda_budget(names[2], launches=1):
        loss, _ = torch.ops.pyseg.pixel_cross_entropy(z, labels.to(device), None, "softmax", None, 0.0, 0.1)
    assert_near(loss, reference.pixel_cross_entropy(logits, labels, None, "softmax", None, 0.0, 0.1), 1e-5)


@pytest.mark.parametrize("classes", [3, 300])
def test_labels_out_of_range_become_nan(device, classes):
    """Without a synchronisation nobody can raise: sums and the pixel's loss are NaN. Nothing is read outside."""
    logits = make_logits((2, classes, 4, 50)).to(device).requires_grad_()
    for wrong in (classes, -1, 2**40):
        labels = make_labels(logits.shape)
        labels[1, 2, 3] = wrong
        got, _ = torch.ops.pyseg.segmentation_statistics(
            logits, labels.to(device), None, "softmax", None, 0.0, True, True, False
        )
        assert got[0].isfinite().all()
        assert got[1].isnan().all()
        loss, _ = torch.ops.pyseg.pixel_cross_entropy(logits, labels.to(device), None, "softmax", None, 0.0, 0.0)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().sum() == 1
        assert loss[1, 2, 3].isnan()
        assert grad[1, :, 2, 3].isnan().all()
        assert grad.isnan().sum() == classes


def test_second_device(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    logits, labels = make_logits((1, 3, 4, 5)), make_labels((1, 3, 4, 5))
    arguments = (None, "softmax", None, 0.0, True, True, True)
    got, _ = torch.ops.pyseg.segmentation_statistics(logits.to("cuda:1"), labels.to("cuda:1"), *arguments)
    assert got.device == torch.device("cuda:1")
    assert_near(got, torch.ops.pyseg.segmentation_statistics(logits, labels, *arguments)[0], 1e-5)
