"""What the CUDA kernels of atrous_conv2d do on the way to their results: which instance runs, how many tensor-core
products it takes, how it moves memory. Results alone are tested with the CPU's in test_atrous_conv2d.py.

On a real GPU only the results are compared.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import pytest
import torch
import torch.nn.functional as F

import pyseg  # noqa: F401  registers the operators
from cuda_budget import cuda_budget
from devices import fake_gpu

pytestmark = pytest.mark.cuda_only

HALF, BFLOAT16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
TENSOR_CORE_TYPES = [HALF, BFLOAT16, FLOAT]
NAMES = {HALF: "__half", BFLOAT16: "__nv_bfloat16", FLOAT: "float"}
# Of the largest output: rounding of the output for 16-bit types, of the operands for tf32.
TOLERANCE = {HALF: 1e-3, BFLOAT16: 8e-3, FLOAT: 1e-3, DOUBLE: 1e-13}
MIN_STRIP_WIDTH = 4


@dataclass
class Case:
    """One dense convolution with everything in the epilogue."""

    shape: tuple[int, int, int, int]  # N, C_in, H, W
    out_channels: int
    dilation: tuple[int, int]
    padding: tuple[int, int] | None = None  # None: the output is as large as the input
    dtype: torch.dtype = HALF
    channels_last: bool = True
    allow_tf32: bool = True

    def __post_init__(self):
        self.padding = self.padding or self.dilation
        generator = torch.Generator().manual_seed(1)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        c_in = self.shape[1]
        self.x = random(*self.shape)
        if self.channels_last:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.weight = random(self.out_channels, c_in, 3, 3)
        self.vectors = [random(self.out_channels) for _ in range(3)]

    def expected(self):
        bias, scale, shift = (v.double().view(1, -1, 1, 1) for v in self.vectors)
        y = F.conv2d(self.x.double(), self.weight.double(), None, 1, self.padding, self.dilation)
        return ((y + bias) * scale + shift).relu()

    def arguments(self, device, packed=None):
        tensors = [t.to(device) for t in (self.x, self.weight, *self.vectors)]
        return (*tensors, self.padding, self.dilation, 1, True, False, self.allow_tf32, packed)

    def run(self, device, packed=None):
        return torch.ops.pyseg.atrous_conv2d(*self.arguments(device, packed))

    def pack(self, device):
        return torch.ops.pyseg._atrous_conv2d_pack(self.weight.to(device))

    def assert_right(self, y):
        expected = self.expected()
        error = (y.cpu().double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[self.dtype]

    # What the kernel has to do, from its description.

    @property
    def out_size(self):
        return tuple(n + 2 * p - 2 * d for n, p, d in zip(self.shape[2:], self.padding, self.dilation, strict=True))

    def taps_hit(self, axis, at):
        """Which of an axis' three taps lie on the map for output coordinate `at`."""
        start = at - self.padding[axis]
        return {t for t in range(3) if 0 <= start + t * self.dilation[axis] < self.shape[2 + axis]}

    def pixels(self):
        """The taps on the map of each output pixel, in the order in which the kernel numbers pixels: column strip by
        strip, cut where the left taps begin to hit the map and where the right ones cease to."""
        height, width = self.out_size
        left = min(max(self.padding[1], 0), width)
        right = min(max(self.shape[3] + self.padding[1] - 2 * self.dilation[1], 0), width)
        left, right = sorted((left, right))
        left = left if left >= MIN_STRIP_WIDTH else 0
        right = right if width - right >= MIN_STRIP_WIDTH else width
        right = right if right - left >= MIN_STRIP_WIDTH else left
        columns = [self.taps_hit(1, x) for x in range(width)]
        rows = [self.taps_hit(0, y) for y in range(height)]
        for start, end in ((0, left), (left, right), (right, width)):
            for y in list(range(height)) * self.shape[0]:
                for x in range(start, end):
                    yield {3 * ky + kx for ky in rows[y] for kx in columns[x]}

    def block_taps(self, tile_pixels):
        """The number of taps that each block along the pixels has to multiply."""
        taps = list(self.pixels())
        return [len(set().union(*taps[i : i + tile_pixels])) for i in range(0, len(taps), tile_pixels)]

    def multiply_adds(self, tile_pixels, tile_channels):
        """Of a kernel that leaves out the taps that no pixel of the block needs, and rounds channels up."""
        step = 32 // self.x.element_size()  # input channels of one mma
        channels = step * ceil(self.shape[1] / step)
        columns = tile_channels * ceil(self.out_channels / tile_channels)
        return sum(self.block_taps(tile_pixels)) * tile_pixels * columns * channels


def instance(dtype, pixels, channels, access=16):
    """A regular expression for one instance of the tensor-core kernel."""
    return rf"atrous_conv2d_dense_kernel<{NAMES[dtype]}, .*DenseTile<{pixels}, {channels}, \d+, \d+, \d+>, {access}>"


@contextmanager
def counted(kernels):
    """Yields a dictionary that holds, after the block, what kernels of that name did in it; empty on a real GPU."""

    def totals():
        total = {}
        for entry in fake_gpu().counters() if fake_gpu() else []:
            if re.search(kernels, entry["kernel"]):
                for key, value in entry.items():
                    if isinstance(value, int | float):
                        total[key] = total.get(key, 0) + value
        return total

    used: dict[str, float] = {}
    before = totals()
    yield used
    used.update({key: value - before.get(key, 0) for key, value in totals().items()})


# Every tile, by shapes that the launcher gives it to: few output channels, or many, with few or many pixels. A rate
# beyond the map's height leaves the largest with three taps.
TILES = {
    (128, 16): ((2, 24, 9, 17), 16, (2, 2)),
    (128, 32): ((1, 40, 11, 13), 24, (1, 3)),
    (64, 64): ((1, 48, 9, 13), 72, (6, 6)),
    (128, 64): ((1, 8, 132, 129), 56, (140, 2)),
    (128, 128): ((1, 8, 132, 129), 72, (140, 9)),
}


@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_tile_runs_on_the_tensor_cores(device, tile, dtype):
    case = Case(*TILES[tile], dtype=dtype)
    epilogue = 3 * ceil(len(list(case.pixels())) / tile[0]) * tile[0] * ceil(case.out_channels / tile[1]) * tile[1]
    with cuda_budget(
        instance(dtype, *tile),
        launches=1,
        mma=case.multiply_adds(*tile),
        mma_ratio=1,
        max_fma=epilogue,
        bank_conflicts=1.01,
    ):
        y = case.run(device)
    case.assert_right(y)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("channels, access", [(38, 4), (37, 2), (3, 2)])
def test_odd_channels_stay_on_the_tensor_cores(device, channels, access, dtype):
    case = Case((1, channels, 9, 11), 21, (2, 3), dtype=dtype)
    kernel = instance(dtype, 64, 64, access)
    with cuda_budget(kernel, launches=1, mma=case.multiply_adds(64, 64), mma_ratio=1, bank_conflicts=1.01):
        y = case.run(device)
    case.assert_right(y)


def test_odd_channels_in_tf32(device):
    case = Case((1, 37, 9, 11), 21, (2, 3), dtype=FLOAT)
    with cuda_budget(instance(FLOAT, 64, 64, 4), launches=1, mma=case.multiply_adds(64, 64), mma_ratio=1):
        y = case.run(device)
    case.assert_right(y)


@pytest.mark.parametrize(
    "size, dilation, padding, share",
    [
        ((40, 48), (2, 2), None, 1.0),
        ((24, 32), (12, 18), None, 0.6),
        ((24, 32), (40, 18), None, 0.25),
        ((24, 32), (24, 32), None, 1 / 9),
        ((12, 16), (2, 2), (12, 20), 0.85),
        ((24, 32), (5, 7), (0, 0), 1.0),
    ],
)
def test_taps_that_miss_the_map_are_left_out(device, size, dilation, padding, share):
    case = Case((2, 16, *size), 16, dilation, padding)
    blocks = ceil(case.shape[0] * case.out_size[0] * case.out_size[1] / 128)
    assert sum(case.block_taps(128)) <= share * 9 * blocks
    with cuda_budget(instance(HALF, 128, 16), mma=case.multiply_adds(128, 16), mma_ratio=1):
        y = case.run(device)
    case.assert_right(y)


@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES, ids=str)
def test_memory_is_read_and_written_in_whole_sectors(device, dtype):
    case = Case((1, 64, 16, 24), 64, (2, 2), dtype=dtype)
    size = case.x.element_size()
    with counted(instance(dtype, 64, 64)) as used:
        y = case.run(device)
    case.assert_right(y)
    if used:
        assert used["global_store_bytes"] == y.nbytes
        assert 32 * used["global_store_sectors"] == y.nbytes
        # A block reads its pixels once for each tap on the map, and the weights of its taps; the epilogue's vectors.
        pixels = sum(len(taps) for taps in case.pixels()) * 64 * size
        weights = sum(case.block_taps(64)) * 64 * 64 * size
        assert pixels + weights <= 32 * used["global_load_sectors"] <= 1.05 * (pixels + weights)


@pytest.mark.parametrize("total, first, whole_sectors", [(112, 32, True), (100, 4, False), (97, 33, False)])
def test_output_goes_straight_into_a_channel_slice(device, total, first, whole_sectors):
    case = Case((2, 16, 7, 9), 48, (2, 2))
    concatenation = torch.full((2, 7, 9, total), 7.0, dtype=HALF).to(device)
    out = concatenation.permute(0, 3, 1, 2)[:, first : first + 48]
    arguments = case.arguments(device, case.pack(device))
    with counted("pyseg::") as used:
        torch.ops.pyseg.atrous_conv2d_out(*arguments, out)
    case.assert_right(out)
    rest = concatenation.cpu()
    assert (rest[..., :first] == 7).all() and (rest[..., first + 48 :] == 7).all()
    if used:
        assert used["launches"] == 1
        assert used["global_store_bytes"] == out.numel() * 2
        assert 32 * used["global_store_sectors"] <= (1 if whole_sectors else 2) * out.numel() * 2


@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES, ids=str)
def test_rows_are_copied_once_and_written_directly(device, dtype):
    case = Case((2, 40, 8, 16), 24, (2, 2), dtype=dtype, channels_last=False)
    packed = case.pack(device)
    with (
        cuda_budget("copy_map_kernel", launches=1, min_bytes=2 * case.x.nbytes, bytes_ratio=1.3, bank_conflicts=1.2),
        cuda_budget(instance(dtype, 128, 32), launches=1, mma=case.multiply_adds(128, 32), mma_ratio=1),
        counted("atrous_conv2d_dense_kernel") as used,
    ):
        y = case.run(device, packed)
    assert y.is_contiguous()
    case.assert_right(y)
    if used:
        assert used["global_store_bytes"] == 32 * used["global_store_sectors"] == y.nbytes


@pytest.mark.parametrize("dtype", [*TENSOR_CORE_TYPES, DOUBLE], ids=str)
def test_packed_weight(device, dtype):
    weight = torch.randn(40, 36, 3, 3, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        source = weight.contiguous(memory_format=layout).to(device)
        with cuda_budget("pack_weight_kernel", launches=1, min_bytes=2 * weight.nbytes, bytes_ratio=10):
            packed = torch.ops.pyseg._atrous_conv2d_pack(source)
        assert torch.equal(packed.cpu(), weight.permute(2, 3, 0, 1))
    whole_tiles = torch.randn(32, 64, 3, 3, dtype=dtype)
    with cuda_budget("pack_weight_kernel", min_bytes=2 * whole_tiles.nbytes, bytes_ratio=1.1, bank_conflicts=2):
        torch.ops.pyseg._atrous_conv2d_pack(whole_tiles.to(device))


@pytest.mark.block_orders
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES, ids=str)
def test_few_tiles_split_the_input_channels(device, dtype, channels_last):
    """33 x 33 maps of ResNet have too few tiles for a GPU, but thousands of input channels."""
    case = Case((1, 296, 9, 11), 40, (3, 3), dtype=dtype, channels_last=channels_last)
    with (
        cuda_budget(instance(dtype, 64, 64), launches=1, mma=case.multiply_adds(64, 64), mma_ratio=1),
        cuda_budget(f"atrous_conv2d_dense_finish_kernel<{NAMES[dtype]}>", launches=1),
        counted(instance(dtype, 64, 64)) as used,
    ):
        y = case.run(device)
    case.assert_right(y)
    assert torch.equal(case.run(device).cpu(), y.cpu())
    if used:
        assert used["blocks"] > len(case.block_taps(64))


@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES, ids=str)
@pytest.mark.parametrize("padding", [(2, 2), (0, 3), (6, 5)], ids=str)
def test_input_gradient_runs_on_the_tensor_cores(device, dtype, padding):
    """It is the convolution of the output's gradient with padding 2 * dilation - padding, negative where it crops."""
    case = Case((2, 24, 9, 11), 16, (2, 2), padding, dtype)
    height, width = case.out_size
    gradient = Case((2, 16, height, width), 24, (2, 2), (4 - padding[0], 4 - padding[1]), dtype)
    arguments = [t.to(device) for t in (gradient.x, case.x, case.weight)]
    with (
        cuda_budget("pack_weight_kernel<.*true>", launches=1),
        cuda_budget(instance(dtype, 128, 32), launches=1, mma=gradient.multiply_adds(128, 32), mma_ratio=1),
    ):
        grad_input, grad_weight = torch.ops.pyseg._atrous_conv2d_backward(
            *arguments, padding, (2, 2), 1, False, True, True, False
        )
    expected = torch.nn.grad.conv2d_input(case.shape, case.weight.double(), gradient.x.double(), 1, padding, (2, 2))
    assert (grad_input.cpu().double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()
    assert grad_weight.numel() == 0


@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES, ids=str)
def test_weight_gradient_runs_on_the_tensor_cores(device, dtype):
    case = Case((2, 24, 9, 11), 16, (2, 2), dtype=dtype)
    grad = torch.randn(2, 16, 9, 11).to(dtype).contiguous(memory_format=torch.channels_last)
    arguments = [t.to(device) for t in (grad, case.x, case.weight)]
    with counted("pyseg::") as used:
        grad_input, grad_weight = torch.ops.pyseg._atrous_conv2d_backward(
            *arguments, (2, 2), (2, 2), 1, False, True, False, True
        )
    expected = torch.nn.grad.conv2d_weight(case.x.double(), case.weight.shape, grad.double(), 1, 2, 2)
    assert (grad_weight.cpu().double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()
    assert grad_input.numel() == 0
    if used:
        assert used["mma_flops"] >= 2 * sum(len(taps) for taps in case.pixels()) * 24 * 16


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_full_precision_avoids_the_tensor_cores(device, dtype):
    case = Case((1, 20, 9, 11), 24, (2, 2), dtype=dtype, allow_tf32=False)
    with counted("pyseg::") as used:
        y = case.run(device)
    expected = case.expected()
    assert (y.cpu().double() - expected).abs().max() < (2e-6 if dtype == FLOAT else 1e-14) * expected.abs().max()
    if used:
        assert used["mma_instructions"] == 0
        assert used["fma_lanes"] + used["fma64_lanes"] >= sum(len(taps) for taps in case.pixels()) * 20 * 24


@pytest.mark.sm(75)
@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES, ids=str)
def test_old_devices_take_the_plain_path(device, dtype):
    case = Case((1, 20, 9, 11), 24, (2, 2), dtype=dtype)
    with counted("pyseg::") as used:
        y = case.run(device)
    case.assert_right(y)
    if used:
        assert used["mma_instructions"] == 0


def test_runs_on_the_device_of_its_tensors(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    case = Case((1, 16, 9, 11), 16, (2, 2), channels_last=False)
    y = case.run("cuda:1")
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    case.assert_right(y)
    with pytest.raises(RuntimeError, match="^atrous_conv2d: weight must be on"):
        torch.ops.pyseg.atrous_conv2d(
            case.x.to("cuda:1"), case.weight.to("cuda:0"), None, None, None, (2, 2), (2, 2), 1, False, False, True, None
        )


def test_packed_weight_must_fit(device):
    case = Case((1, 16, 9, 11), 24, (2, 2))
    wrong = torch.empty(3, 3, 16, 24, dtype=HALF, device=device)
    with pytest.raises(RuntimeError, match=r"^atrous_conv2d: packed must be .*\[3, 3, 24, 16\], got \[3, 3, 16, 24\]"):
        case.run(device, wrong)
