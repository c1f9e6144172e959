"""What the depthwise, weight-gradient and plain CUDA kernels of atrous_conv2d do on the way to their results: memory
traffic against the least possible, tensor-core products, shared-memory passes. The dense forward kernels' are in
test_atrous_conv2d_cuda.py.

Counts come from the fake GPU, which knows no cache: a sector that two requests touch counts twice. On a real GPU only
results are compared.
"""

from math import ceil

import pytest
import torch

import pyseg  # noqa: F401  registers the operators
from cuda_budget import cuda_budget

pytestmark = pytest.mark.cuda_only

HALF, BFLOAT16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = {HALF: "__half", BFLOAT16: "__nv_bfloat16", FLOAT: "float", DOUBLE: "double"}
# Of the largest value: rounding of the result, for tf32 of the operands.
TOLERANCE = {HALF: 1e-3, BFLOAT16: 8e-3, FLOAT: 4e-6, DOUBLE: 1e-13}
TF32_TOLERANCE = 1.5e-3
VECTOR = {HALF: 4, BFLOAT16: 4, FLOAT: 4, DOUBLE: 2}  # channels that a depthwise thread takes together


def random(*shape, dtype, channels_last=True, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def conv(x, weight, padding, dilation, groups, allow_tf32=False):
    return torch.ops.pyseg.atrous_conv2d(
        x, weight, None, None, None, padding, dilation, groups, False, False, allow_tf32, None
    )


def backward(grad, x, weight, padding, dilation, groups, allow_tf32, need_input, need_weight):
    return torch.ops.pyseg._atrous_conv2d_backward(
        grad, x, weight, padding, dilation, groups, False, allow_tf32, need_input, need_weight
    )


def assert_near(got, expected, tolerance):
    assert (got.cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()


def pixels_of_taps(size, dilation, batch=1):
    """The output pixels whose input at each tap is inside the map, with padding == dilation."""
    along = [
        [n - abs(i - 1) * d if abs(i - 1) * d < n else 0 for i in range(3)] for n, d in zip(size, dilation, strict=True)
    ]
    return [batch * rows * columns for rows in along[0] for columns in along[1]]


# ------------------------------------------------------------------------------------------------------- depthwise

# Few pixels make short walks (4 rows; 1.5 times the rows, and 1.5 times the columns, 2 times in float64), less at the
# map's edges. Rows read only what they need, but rows of odd width begin and end in the middle of sectors.
DEPTHWISE_BYTES = {True: {HALF: 1.7, BFLOAT16: 1.7, FLOAT: 1.7, DOUBLE: 2.0}, False: dict.fromkeys(NAMES, 1.25)}


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "rows"])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3), (12, 12)], ids=str)
def test_depthwise_reads_inputs_about_once(device, dtype, channels_last, dilation):
    channels, height, width = 32, 40, 48
    x = random(1, channels, height, width, dtype=dtype, channels_last=channels_last)
    weight = random(channels, 1, 3, 3, dtype=dtype, channels_last=False, seed=2)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), None, 1, dilation, dilation, channels)
    columns = 2 if dtype == DOUBLE else 4
    kernel = (
        rf"atrous_conv2d_depthwise_channels_last<{NAMES[dtype]}, {VECTOR[dtype]}, {columns}>"
        if channels_last
        else rf"atrous_conv2d_depthwise_rows<{NAMES[dtype]}>"
    )
    with cuda_budget(
        kernel,
        launches=1,
        min_bytes=2 * x.nbytes,
        bytes_ratio=DEPTHWISE_BYTES[channels_last][dtype],
        mma=0,
        bank_conflicts=1.5,  # rows: lanes at the end of one row and the beginning of another
    ):
        y = conv(x.to(device), weight.to(device), dilation, dilation, channels)
    assert_near(y, expected, TOLERANCE[dtype])
    # The input gradient is the same kernel.
    grad = random(*x.shape, dtype=dtype, channels_last=channels_last, seed=3)
    with cuda_budget(
        kernel, launches=1, min_bytes=2 * x.nbytes, bytes_ratio=DEPTHWISE_BYTES[channels_last][dtype], mma=0
    ):
        grad_input, _ = backward(
            grad.to(device), x.to(device), weight.to(device), dilation, dilation, channels, False, True, False
        )
    expected = torch.nn.grad.conv2d_input(x.shape, weight.double(), grad.double(), 1, dilation, dilation, channels)
    assert_near(grad_input, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
def test_depthwise_rows_of_odd_width_keep_to_vectors(device, dtype):
    """Every row of a map 65 wide has another alignment."""
    x = random(1, 6, 65, 65, dtype=dtype, channels_last=False)
    weight = random(6, 1, 3, 3, dtype=dtype, channels_last=False, seed=2)
    with cuda_budget("atrous_conv2d_depthwise_rows", launches=1, min_bytes=2 * x.nbytes, bytes_ratio=1.6):
        y = conv(x.to(device), weight.to(device), (6, 6), (6, 6), 6)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), None, 1, 6, 6, 6)
    assert_near(y, expected, TOLERANCE[dtype])


@pytest.mark.block_orders
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "rows"])
def test_depthwise_weight_gradient_reads_maps_about_once(device, dtype, channels_last):
    channels, size, dilation = 32, (40, 48), (2, 3)
    x = random(2, channels, *size, dtype=dtype, channels_last=channels_last)
    grad = random(2, channels, *size, dtype=dtype, channels_last=channels_last, seed=2)
    weight = torch.zeros(channels, 1, 3, 3, dtype=dtype)
    arguments = [t.to(device) for t in (grad, x, weight)]
    kernel = "atrous_conv2d_depthwise_weight_gradient_" + ("channels_last" if channels_last else "rows")
    with (
        cuda_budget(
            f"{kernel}<{NAMES[dtype]}",
            launches=1,
            min_bytes=2 * x.nbytes,
            bytes_ratio=2.0 if channels_last else 1.25,  # x: 2 columns read 4, 8 rows read 10; partial sums
            mma=0,
            bank_conflicts=1.5,
        ),
        cuda_budget(f"atrous_conv2d_depthwise_weight_gradient_reduce<{NAMES[dtype]}", launches=1, bank_conflicts=1.01),
    ):
        _, got = backward(*arguments, dilation, dilation, channels, False, False, True)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), 1, dilation, dilation, channels)
    assert_near(got, expected, TOLERANCE[dtype])
    again = backward(*arguments, dilation, dilation, channels, False, False, True)[1]
    assert torch.equal(again.cpu(), got.cpu())


# --------------------------------------------------------------------------------------------- dense weight gradient


@pytest.mark.block_orders
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16, FLOAT], ids=str)
@pytest.mark.parametrize(
    "c_in, c_out, size, dilation, tile",
    [
        (64, 64, (9, 11), (2, 2), 64),
        (40, 72, (9, 13), (5, 7), 64),
        (128, 136, (9, 7), (4, 3), 128),
        (16, 8, (3, 3), (4, 4), 64),  # only the middle tap touches the map
    ],
)
def test_weight_gradient_multiplies_only_what_is_on_the_map(device, dtype, c_in, c_out, size, dilation, tile):
    x = random(1, c_in, *size, dtype=dtype)
    grad = random(1, c_out, *size, dtype=dtype, seed=2)
    weight = torch.zeros(c_out, c_in, 3, 3, dtype=dtype)
    arguments = [t.to(device) for t in (grad, x, weight)]
    taps = pixels_of_taps(size, dilation)
    assert max(taps) <= 128  # one split a tap
    step = 64 // x.element_size()
    tiles = ceil(c_in / tile) * ceil(c_out / tile)
    products = sum(ceil(pixels / step) * step for pixels in taps) * tiles * tile * tile
    # Each tile reads both operands' channels at every pixel of its tap; the partial sums are written once.
    bytes_read = sum(taps) * (c_in * ceil(c_out / tile) + c_out * ceil(c_in / tile)) * x.element_size()
    bytes_written = sum(pixels > 0 for pixels in taps) * c_in * c_out * 4
    with (
        cuda_budget(
            f"atrous_conv2d_wgrad_tensor_cores<{NAMES[dtype]}, {tile}>",
            launches=1,
            min_bytes=bytes_read + bytes_written,
            bytes_ratio=1.1,  # pixels of an odd number of 16 bytes begin in the middle of a sector
            mma=products,
            mma_ratio=1,
            max_fma=0,
            bank_conflicts=1.001,
        ),
        cuda_budget(f"atrous_conv2d_wgrad_reduce<{NAMES[dtype]}", launches=1, bank_conflicts=1.01),
    ):
        _, got = backward(*arguments, dilation, dilation, 1, True, False, True)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), 1, dilation, dilation)
    assert_near(got, expected, TF32_TOLERANCE if dtype == FLOAT else TOLERANCE[dtype])
    assert torch.equal(backward(*arguments, dilation, dilation, 1, True, False, True)[1].cpu(), got.cpu())


@pytest.mark.block_orders
@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
def test_weight_gradient_splits_many_pixels(device, dtype):
    x = random(2, 16, 30, 31, dtype=dtype)
    grad = random(2, 8, 30, 31, dtype=dtype, seed=2)
    weight = torch.zeros(8, 16, 3, 3, dtype=dtype)
    arguments = [t.to(device) for t in (grad, x, weight)]
    products = sum(pixels_of_taps((30, 31), (3, 3), 2)) * 64 * 64
    with cuda_budget("atrous_conv2d_wgrad_tensor_cores", launches=1, mma=products, mma_ratio=1.1, bank_conflicts=1.001):
        _, got = backward(*arguments, (3, 3), (3, 3), 1, True, False, True)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), 1, 3, 3)
    assert_near(got, expected, TF32_TOLERANCE if dtype == FLOAT else TOLERANCE[dtype])
    assert torch.equal(backward(*arguments, (3, 3), (3, 3), 1, True, False, True)[1].cpu(), got.cpu())


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("c_in, c_out", [(20, 12), (19, 13)])
def test_plain_weight_gradient(device, dtype, c_in, c_out):
    """float32 without tf32 and float64; 16 bits where channels don't fill 16 bytes."""
    if dtype in (HALF, BFLOAT16) and c_in == 20:
        c_in, c_out = 22, 14
    x = random(1, c_in, 9, 11, dtype=dtype)
    grad = random(1, c_out, 9, 11, dtype=dtype, seed=2)
    weight = torch.zeros(c_out, c_in, 3, 3, dtype=dtype)
    arguments = [t.to(device) for t in (grad, x, weight)]
    products = sum(ceil(pixels / 16) * 16 for pixels in pixels_of_taps((9, 11), (2, 2))) * 64 * 64
    with cuda_budget(f"atrous_conv2d_wgrad_plain<{NAMES[dtype]}>", launches=1, fma=products, fma_ratio=1, mma=0):
        _, got = backward(*arguments, (2, 2), (2, 2), 1, False, False, True)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), 1, 2, 2)
    assert_near(got, expected, TOLERANCE[dtype])


# ---------------------------------------------------------------------------------------------- dense, no tensor cores


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "rows"])
def test_plain_leaves_taps_out(device, dtype, channels_last):
    # 64 pixels a block: rows 0 to 3, or 4 to 7, of which none reaches the taps above and below the map.
    size, dilation, c_in, c_out = (8, 16), (9, 2), 24, 40
    x = random(1, c_in, *size, dtype=dtype, channels_last=channels_last)
    weight = random(c_out, c_in, 3, 3, dtype=dtype, channels_last=False, seed=2)
    products = 2 * 3 * 64 * 64 * ceil(c_in / 16) * 16
    rows = "false" if channels_last else "true"
    with cuda_budget(
        f"atrous_conv2d_plain<{NAMES[dtype]}, .*{rows}>",
        launches=1,
        fma=products,
        fma_ratio=1.05,  # the epilogue
        mma=0,
        bank_conflicts=1.01 if dtype == FLOAT else 2,  # two accesses for each four doubles
    ):
        y = conv(x.to(device), weight.to(device), dilation, dilation, 1)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), None, 1, dilation, dilation)
    assert_near(y, expected, TOLERANCE[dtype])


@pytest.mark.sm(75)
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
def test_sixteen_bits_on_old_devices(device, dtype, channels_last):
    x = random(1, 24, 9, 11, dtype=dtype, channels_last=channels_last)
    weight = random(40, 24, 3, 3, dtype=dtype, channels_last=False, seed=2)
    grad = random(1, 40, 9, 11, dtype=dtype, channels_last=channels_last, seed=3)
    with (
        cuda_budget(f"atrous_conv2d_plain<{NAMES[dtype]}", launches=2, mma=0, bank_conflicts=1.01),
        cuda_budget(f"atrous_conv2d_wgrad_plain<{NAMES[dtype]}", launches=1, mma=0, bank_conflicts=1.01),
    ):
        y = conv(x.to(device), weight.to(device), (2, 2), (2, 2), 1)
        got = backward(*(t.to(device) for t in (grad, x, weight)), (2, 2), (2, 2), 1, True, True, True)
    assert_near(y, torch.nn.functional.conv2d(x.double(), weight.double(), None, 1, 2, 2), TOLERANCE[dtype])
    expected = torch.nn.grad.conv2d_input(x.shape, weight.double(), grad.double(), 1, 2, 2)
    assert_near(got[0], expected, TOLERANCE[dtype])
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), 1, 2, 2)
    assert_near(got[1], expected, TOLERANCE[dtype])
