"""What the CUDA kernels of confusion_matrix do on the way to their results: which one runs, how much memory it moves.

Counts come from the fake GPU, which knows no cache: a sector that two requests touch counts twice. On a real GPU only
results are compared.
"""

import pytest
import torch

from cuda_budget import cuda_budget
from pyseg import reference
from pyseg.functional import confusion_matrix

pytestmark = pytest.mark.cuda_only

LOGITS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = {torch.float32: "float", torch.float64: "double", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def kernel(predictor):
    return rf"confusion_matrix_kernel<.*{predictor}"


def inputs(n, classes, h, w, dtype, target_dtype=torch.uint8):
    """Targets of few classes: blocks of these small maps would otherwise move more of matrices than of logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, classes, h, w, generator=generator).to(dtype)
    target = torch.randint(0, 2, (n, h, w), generator=generator) + classes - 2
    return x, target.to(target_dtype)


def check(x, target, device, **budget):
    expected = reference.confusion_matrix(x, target, x.shape[1], 3)
    x_there, target_there = x.to(device), target.to(device)
    with cuda_budget(**budget):
        matrix = confusion_matrix(x_there, target_there, None, 3)
    assert torch.equal(matrix.cpu(), expected)


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
@pytest.mark.block_orders
def test_rows(device, dtype):
    """Each logit once, 16 bytes at a time; the histogram comes on top."""
    x, target = inputs(2, 9, 32, 64, dtype)
    least = x.nbytes + target.nbytes
    name = kernel(rf"FromRows<{NAMES[dtype]}>")
    check(x, target, device, kernels=name, launches=1, min_bytes=least, bytes_ratio=1.2)


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
@pytest.mark.parametrize("classes", [9, 16, 21])
@pytest.mark.block_orders
def test_channels_last(device, dtype, classes):
    x, target = inputs(2, classes, 32, 64, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    least = x.nbytes + target.nbytes
    name = kernel(rf"FromChannelsLast<{NAMES[dtype]}>")
    # More classes than a pass takes: the parts of a pixel end within sectors.
    ratio = 1.2 if dtype != torch.float64 or classes <= 16 else 1.8
    check(x, target, device, kernels=name, launches=1, min_bytes=least, bytes_ratio=ratio, bank_conflicts=1.6)


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
def test_unaligned_rows(device, dtype):
    """Rows of an odd number of pixels start anywhere."""
    x, target = inputs(2, 9, 33, 31, dtype)
    least = x.nbytes + target.nbytes
    name = kernel(rf"FromAnyStrides<{NAMES[dtype]}>")
    check(x, target, device, kernels=name, launches=1, min_bytes=least, bytes_ratio=1.8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.block_orders
def test_labels(device, dtype):
    _, target = inputs(2, 9, 32, 64, torch.float32, dtype)
    prediction = target.flip(0)
    expected = reference.confusion_matrix(prediction, target, 9)
    a, b = prediction.to(device), target.to(device)
    with cuda_budget(kernel("FromLabels"), launches=1, min_bytes=2 * target.nbytes, bytes_ratio=1.6):
        matrix = confusion_matrix(a, b, 9)
    assert torch.equal(matrix.cpu(), expected)


@pytest.mark.block_orders
def test_blocks_add_to_one_matrix(device):
    """Many blocks and images, in shared memory and without, in every order of the blocks."""
    for classes in (5, 120):
        x, target = inputs(5, classes, 8, 40, torch.float32, torch.int64)
        target[3, 2, 7] = classes  # out of range
        valid = torch.where(target < classes, target, -1)
        expected = reference.confusion_matrix(x, valid, classes, -1, per_image=True)
        expected[3] -= 2**48
        got = confusion_matrix(x.to(device), target.to(device), per_image=True)
        assert torch.equal(got.cpu(), expected)
        got = confusion_matrix(x.to(device), target.to(device))
        assert torch.equal(got.cpu(), expected.sum(0))


def test_same_cell_is_added_once_a_warp(device):
    """All pixels in one cell, as in the middle of an object: one addition for 32 of them."""
    target = torch.ones(1, 4096, dtype=torch.uint8, device=device)
    with cuda_budget(kernel("FromLabels"), launches=1, bank_conflicts=1.05):
        matrix = confusion_matrix(target, target, 4)
    assert matrix[1, 1] == 4096


def test_second_device(device):
    """The tensors' own device, whichever is current."""
    if torch.cuda.device_count() < 2:
        return
    x, target = inputs(2, 9, 8, 8, torch.float32)
    matrix = confusion_matrix(x.to("cuda:1"), target.to("cuda:1"))
    assert matrix.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(matrix.cpu(), reference.confusion_matrix(x, target, 9))
    with pytest.raises(RuntimeError, match=r"^confusion_matrix: prediction must be on the device of target"):
        confusion_matrix(x.to("cuda:1"), target.to("cuda:0"))


@pytest.mark.needs_gpu("graph capture")
def test_graph_capture(device):
    x, target = (t.to(device) for t in inputs(2, 9, 32, 64, torch.float32))
    expected = confusion_matrix(x, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matrix = confusion_matrix(x, target)
    matrix.zero_()
    graph.replay()
    assert torch.equal(matrix, expected)
