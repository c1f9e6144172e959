"""valve_conv2d and region_gate against the reference, finite differences and torch's own operators."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from cpu_targets import OTHER_TARGETS, run_on_cpu_target
from cuda_budget import cuda_budget
from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import region_gate, valve_conv2d
from pyseg.nn import RegionGate, ValveConv2d

FLOAT, DOUBLE = torch.float32, torch.float64
DTYPES = [FLOAT, DOUBLE, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "strided"]
# Of the largest magnitude; 16-bit arguments are exact, results are rounded once, in backward features too.
TOLERANCE = {FLOAT: 2e-5, DOUBLE: 1e-13, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def made(shape, dtype=FLOAT, layout="contiguous", seed=0, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # neither rows nor channels side by side
        x = x.repeat_interleave(2, -1).to(device)[..., ::2]
    return x.to(device)


def mask(shape, dtype=FLOAT, device="cpu"):
    """A region of ones with two corners."""
    region = torch.zeros(shape, dtype=dtype)
    region[..., shape[2] // 3 :, : max(1, shape[3] // 2)] = 1
    return region.to(device)


def assert_near(got, expected):
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return
    scale = max(expected.abs().max().item(), 1e-3)
    worst = (got.detach().cpu().double() - expected.detach()).abs().max().item() / scale
    assert worst <= TOLERANCE[got.dtype], f"differs by {worst:.1e} of the largest magnitude"


def compare(function, oracle, tensors, wanted, grad_layout="contiguous"):
    """Result and gradients of the `wanted` arguments, beside the oracle's in float64."""
    leaves = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    doubles = [t if t is None else t.detach().cpu().double().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    y, expected = function(*leaves), oracle(*doubles)
    assert y.dtype == tensors[0].dtype
    assert_near(y, expected)
    grad = made(y.shape, y.dtype, grad_layout, seed=9, device=y.device)
    chosen = [i for i in wanted if tensors[i] is not None]
    got = torch.autograd.grad(y, [leaves[i] for i in chosen], grad)
    want = torch.autograd.grad(expected, [doubles[i] for i in chosen], grad.cpu().double())
    for a, b, i in zip(got, want, chosen, strict=True):
        assert a.dtype == tensors[i].dtype
        assert_near(a, b)
    return y


def pair(value):
    return (value, value) if isinstance(value, int) else value


def compare_gate(features, region, weight, bias, geometry, wanted=(0, 1, 2, 3), grad_layout="contiguous", **options):
    stride, padding, dilation = geometry

    def oracle(*tensors):
        return reference.region_gate(*tensors, pair(stride), pair(padding), pair(dilation), **options)

    def function(*tensors):
        return region_gate(*tensors, *geometry, **options)

    return compare(function, oracle, (features, region, weight, bias), wanted, grad_layout)


def compare_valve(tensors, image, valve, wanted, grad_layout="contiguous", **options):
    """tensors: input, region, weight, valve_weight, bias, valve_bias."""
    names = ("valve_stride", "valve_padding", "valve_dilation")

    def oracle(*tensors):
        own = dict(zip(names, map(pair, valve), strict=True))
        return reference.valve_conv2d(*tensors, *map(pair, image), **own, **options)

    def function(*tensors):
        return valve_conv2d(*tensors, *image, **dict(zip(names, valve, strict=True)), **options)

    return compare(function, oracle, tensors, wanted, grad_layout)


def gate_tensors(channels=7, region_channels=1, kernel=(3, 3), size=(9, 8), images=2, dtype=FLOAT, device="cpu"):
    shapes = (
        (images, channels, *size),
        (images, region_channels, *size),
        (channels, region_channels, *kernel),
        (channels,),
    )
    return [made(shape, dtype, seed=i, device=device) for i, shape in enumerate(shapes)]


def valve_tensors(channels=7, size=(9, 8), kernel=3, valve_kernel=3, inputs=3, images=2, dtype=FLOAT, device="cpu"):
    shapes = (
        (images, inputs, *size),
        (images, 1, *size),
        (channels, inputs, kernel, kernel),
        (channels, 1, valve_kernel, valve_kernel),
        (channels,),
        (channels,),
    )
    return [made(shape, dtype, seed=i, device=device) for i, shape in enumerate(shapes)]


# ---- values ----


@pytest.mark.sm(75, 80, 90)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(device, dtype, layout):
    """More than one tile of channels and of pixels, with tails; gradients in another layout than the features."""
    features, region, weight, bias = gate_tensors(67, size=(7, 11), images=1, dtype=dtype, device=device)
    features = made(features.shape, dtype, layout, device=device)
    other = "channels_last" if layout == "contiguous" else "contiguous"
    y = compare_gate(features, region, weight, bias, (1, 1, 1), relu=True, grad_layout=other)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)

    tensors = valve_tensors(19, size=(7, 11), dtype=dtype, device=device)
    tensors[0] = made(tensors[0].shape, dtype, layout, device=device)
    tensors[1] = made(tensors[1].shape, dtype, layout, seed=1, device=device)
    compare_valve(tensors, (1, 1, 1), (1, 1, 1), (2, 3, 4, 5), relu=True, grad_layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_kernel_sizes(device, kernel, layout):
    """On CUDA more columns than shared memory holds at a time."""
    features, region, weight, bias = gate_tensors(5, 2, (kernel, kernel), (8, 9), 1, device=device)
    features = made(features.shape, layout=layout, device=device)
    compare_gate(features, region, weight, bias, (1, kernel // 2, 1))
    tensors = valve_tensors(5, (8, 9), kernel, images=1, device=device)
    tensors[0] = made(tensors[0].shape, layout=layout, device=device)
    arguments = (*tensors[:3], tensors[4], tensors[3], tensors[5])  # as the operator takes them

    def fused(*leaves):
        input, region, weight, bias, valve_weight, valve_bias = leaves
        geometry = ([1, 1], [kernel // 2] * 2, [1, 1])
        return torch.ops.pyseg.valve_conv2d(
            input, region, weight, bias, valve_weight, valve_bias, *geometry, [1, 1], [1, 1], [1, 1], False, True
        )

    def oracle(*leaves):
        input, region, weight, bias, valve_weight, valve_bias = leaves
        geometry = ((1, 1), (kernel // 2,) * 2, (1, 1))
        tensors = (input, region, weight, valve_weight, bias, valve_bias)
        return reference.valve_conv2d(*tensors, *geometry, valve_padding=(1, 1), relu=True)

    compare(fused, oracle, arguments, (2, 3, 4, 5))


@pytest.mark.parametrize("combine", ["multiply", "add"])
@pytest.mark.parametrize(
    ("geometry", "region_size"),
    [((2, 1, 1), (13, 15)), (((1, 3), (0, 2), (2, 1)), (11, 20)), ((4, 9, 3), (15, 17)), ((1, 0, 1), (9, 10))],
)
def test_geometry(device, geometry, region_size, combine):
    weight, bias = made((6, 2, 3, 3), seed=2, device=device), made((6,), seed=3, device=device)
    region = made((2, 2, *region_size), seed=1, device=device)
    size = F.conv2d(region.cpu(), weight.cpu(), None, *geometry).shape
    for layout in ("contiguous", "channels_last"):
        compare_gate(made(size, layout=layout, device=device), region, weight, bias, geometry, combine=combine)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_some_gradients(device, wanted):
    compare_gate(*gate_tensors(4, device=device), (1, 1, 1), wanted, relu=True)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3, 4, 5), (1,), (0, 3), (2, 4)])
def test_gradients_of_maps(device, wanted, relu):
    """Of the image and the region of valve_conv2d: their features are made once more."""
    compare_valve(valve_tensors(4, device=device), (1, 1, 1), (1, 1, 1), wanted, relu=relu)


def test_without_biases(device):
    features, region, weight, _ = gate_tensors(device=device)
    compare_gate(features, region, weight, None, (1, 1, 1))
    tensors = [*valve_tensors(device=device)[:4], None, None]
    compare_valve(tensors, (1, 1, 1), (1, 1, 1), (2, 3))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_maps(device, size, channels):
    compare_gate(*gate_tensors(channels, size=size, images=1, device=device), (1, 1, 1))


def test_empty_batch(device):
    features, region, weight, bias = (t.requires_grad_() for t in gate_tensors(images=0, device=device))
    y = region_gate(features, region, weight, bias, padding=1)
    assert y.shape == features.shape
    grads = torch.autograd.grad(y.sum(), (features, region, weight, bias))
    assert not any(grad.any() for grad in grads)
    input, region, *parameters = (t.requires_grad_() for t in valve_tensors(images=0, device=device))
    y = valve_conv2d(input, region, *parameters, padding=1)
    assert y.shape == (0, 7, 9, 8)
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), parameters))


def test_regions_of_bool_and_open_gates(device):
    """A region of ones under a filter of one tap lets features through; zeros without a bias shut them out."""
    features = made((2, 4, 5, 6), device=device)
    region = mask((2, 1, 5, 6), torch.bool, device)
    ones = torch.ones(4, 1, 1, 1, device=device)
    assert torch.equal(region_gate(features, region, ones), features * region)
    assert torch.equal(region_gate(features, ~region, ones, combine="add"), features + (~region).float())


def test_nan_and_infinity(device):
    features, region, weight, bias = gate_tensors(3, device=device)
    features[0, 0, 2, 3], features[1, 2, 0, 0] = torch.nan, torch.inf
    region[0, 0, 8, 7] = torch.nan
    got = region_gate(features, region, weight, bias, padding=1, relu=True).cpu()
    expected = (features.cpu() * F.conv2d(region.cpu(), weight.cpu(), bias.cpu(), padding=1)).relu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())


def test_drawn(device):
    """Geometries, layouts and options."""

    @drawn_settings(40, 6, device)
    @given(data=st.data())
    def check(data):
        draw = data.draw
        small, few = st.integers(1, 4), st.integers(1, 3)
        kernel, stride, dilation = ((draw(each), draw(each)) for each in (small, few, few))
        padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        size = [
            draw(st.integers(1, 9)) + max(0, (k - 1) * d - 2 * p)
            for k, d, p in zip(kernel, dilation, padding, strict=True)
        ]
        channels, region_channels = draw(st.integers(1, 20)), draw(few)
        dtype, layouts = draw(st.sampled_from([FLOAT, DOUBLE])), st.sampled_from(LAYOUTS)
        region = made((2, region_channels, *size), dtype, draw(layouts), 1, device)
        weight = made((channels, region_channels, *kernel), dtype, seed=2, device=device)
        bias = made((channels,), dtype, seed=3, device=device) if draw(st.booleans()) else None
        shape = F.conv2d(region.cpu(), weight.cpu(), None, stride, padding, dilation).shape
        options = {"combine": draw(st.sampled_from(["multiply", "add"])), "relu": draw(st.booleans())}
        features = made(shape, dtype, draw(layouts), 4, device)
        compare_gate(features, region, weight, bias, (stride, padding, dilation), **options)

    check()


# ---- where the convolution is not ours ----


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_channels(device, layout):
    """atrous_conv2d and the gate, without gradients in place."""
    tensors = valve_tensors(6, (5, 6), 3, inputs=24, images=1, device=device)
    tensors[0] = made(tensors[0].shape, layout=layout, device=device)
    y = compare_valve(tensors, (1, 1, 1), (1, 1, 1), (0, 1, 2, 3, 4, 5), relu=True)
    with torch.no_grad():
        again = valve_conv2d(*tensors, padding=1, relu=True)
    torch.testing.assert_close(again, y.detach(), rtol=1e-5, atol=1e-5)


def test_wider_image_filters(device):
    """7x7 filters of stride 2 with 3x3 valves whose centres coincide, as on a ResNet."""
    tensors = valve_tensors(4, (11, 12), 7, 3, images=1, device=device)
    got = valve_conv2d(*tensors, stride=2, padding=3)
    features = F.conv2d(tensors[0].cpu(), tensors[2].cpu(), tensors[4].cpu(), 2, 3)
    expected = features * F.conv2d(tensors[1].cpu(), tensors[3].cpu(), tensors[5].cpu(), 2, 1)
    assert_near(got, expected.double())


def test_in_place(device):
    features, region, weight, bias = gate_tensors(device=device)
    expected = region_gate(features, region, weight, bias, padding=1)
    arguments = (region, weight, bias, [1, 1], [1, 1], [1, 1], False, False)
    version = features._version
    torch.ops.pyseg.region_gate_(features, *arguments)
    assert features._version > version
    assert torch.equal(features, expected)
    with pytest.raises(RuntimeError, match="region_gate_: features must be contiguous or channels_last"):
        torch.ops.pyseg.region_gate_(features[..., :1].expand_as(features), *arguments)
    for name, overlapping in (
        ("region", (features[:, :1], *arguments[1:])),
        ("bias", (region, weight, features[0, 0, 0, :7], *arguments[3:])),
    ):
        with pytest.raises(RuntimeError, match=f"region_gate_: {name} must not overlap features"):
            torch.ops.pyseg.region_gate_(features, *overlapping)
    with pytest.raises(RuntimeError, match="region_gate_: must be called without gradients"):
        torch.ops.pyseg.region_gate_(features, region.requires_grad_(), *arguments[1:])


# ---- the contract ----


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("combine", ["multiply", "add"])
def test_gradcheck(combine, relu):
    """The operator's own gradients, batched ones, and those of the formula in torch's operators.

    On CUDA, where kernels are interpreted, the comparisons with the reference stand for it.
    """
    leaves = [t.requires_grad_() for t in gate_tensors(2, 1, (2, 3), (4, 3), 1, DOUBLE)]

    def gate(features, region, weight, bias):
        return region_gate(features, region, weight, bias, (1, 1), (0, 1), combine=combine, relu=relu)

    leaves[0] = made((1, 2, 3, 3), DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(gate, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(gate, leaves)

    tensors = [t.requires_grad_() for t in valve_tensors(2, (3, 3), 3, 1, 1, 1, DOUBLE)]

    def valve(*tensors):
        return valve_conv2d(*tensors, padding=1, combine=combine, relu=relu)

    def of_parameters(*parameters):
        return valve(tensors[0].detach(), tensors[1].detach(), *parameters)

    assert torch.autograd.gradcheck(of_parameters, tensors[2:], check_batched_grad=True)
    assert torch.autograd.gradcheck(valve, tensors)
    if relu == (combine == "add"):  # one case of each: second derivatives are torch's
        assert torch.autograd.gradgradcheck(valve, tensors)


def test_opcheck(device):
    features, region, weight, bias = (t.requires_grad_() for t in gate_tensors(3, size=(4, 5), device=device))
    geometry = ([1, 1], [1, 1], [1, 1])
    ops = torch.ops.pyseg
    arguments = (features, region, weight, bias, *geometry, False, True)
    if device == "cuda":  # the other registrations are the same Python
        torch.library.opcheck(ops.region_gate.default, arguments, test_utils=("test_schema", "test_faketensor"))
        return
    torch.library.opcheck(ops.region_gate.default, arguments)
    grad, needed = made(features.shape, device=device), (True, False, True)
    arguments = [t.detach() for t in (features, region, weight, bias)]
    torch.library.opcheck(ops._region_gate_backward.default, (grad, *arguments, *geometry, True, False, *needed))
    input, region, weight, valve_weight, bias, valve_bias = valve_tensors(3, (4, 5), device=device)
    ordered = (input, region, weight.requires_grad_(), bias, valve_weight, valve_bias.requires_grad_())
    torch.library.opcheck(ops.valve_conv2d.default, (*ordered, *geometry, *geometry, False, True))
    detached = [t.detach() for t in ordered]
    arguments = (grad, *detached, *geometry, *geometry, False, True)
    torch.library.opcheck(ops._valve_conv2d_backward.default, arguments)


@pytest.mark.block_orders
def test_same_bits_in_every_order(device):
    """Of blocks on CUDA, with several blocks that share a sum; of threads on the CPU."""
    if device == "cuda":
        compare_gate(*gate_tensors(66, size=(16, 9), device=device), (1, 1, 1))
        return
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = []
            for layout in ("contiguous", "channels_last"):
                leaves = [t.requires_grad_() for t in gate_tensors(20, size=(60, 61))]
                features = made(leaves[0].shape, layout=layout).requires_grad_()
                y = region_gate(features, *leaves[1:], padding=1, relu=True)
                result += [y.detach(), *torch.autograd.grad(y.sin().sum(), (features, *leaves[1:]))]
                input, region, *leaves = (t.requires_grad_() for t in valve_tensors(20, (60, 61)))
                y = valve_conv2d(input.detach(), region.detach(), *leaves, padding=1)
                result += [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_sums():
    """Weight gradients over many pixels lose nothing: blocks are summed before they are added up."""
    input, region, weight, valve_weight, bias, valve_bias = valve_tensors(8, (200, 200), images=3)
    region = mask(region.shape)
    compare_valve((input, region, weight, valve_weight, bias, valve_bias), (1, 1, 1), (1, 1, 1), (2, 3, 4, 5))


@pytest.mark.parametrize("capability", OTHER_TARGETS)
def test_cpu_capability(capability):
    script = """
import torch
import test_valve_conv2d as tests
for dtype in tests.DTYPES:
    for layout in ("contiguous", "channels_last"):
        tests.test_dtypes_and_layouts("cpu", dtype, layout)
tests.test_kernel_sizes("cpu", 5, "contiguous")
tests.test_large_sums()
"""
    run_on_cpu_target(capability, script, Path(__file__).parent)


@pytest.mark.cuda_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cuda_budget(device, layout):
    """Features are read and results written once; neither convolution goes to memory.

    Sectors are counted without a cache: a pixel of the image once for each tap.
    """
    features, region, weight, bias = gate_tensors(64, size=(16, 16), images=1, device=device)
    features = made(features.shape, layout=layout, device=device)
    least, taps = 2 * features.nbytes, features.numel() * 10
    with cuda_budget("::valve_forward<", launches=1, min_bytes=least, bytes_ratio=2, fma=taps, bank_conflicts=1.5):
        y = region_gate(features, region, weight, bias, padding=1)
    geometry = ([1, 1], [1, 1], [1, 1])
    with cuda_budget("::valve_backward<", launches=1, min_bytes=3 * features.nbytes, bytes_ratio=2, bank_conflicts=2):
        torch.ops.pyseg._region_gate_backward(
            y, features, region, weight, bias, *geometry, False, False, True, False, True
        )
    input, region, *parameters = valve_tensors(64, (16, 16), images=1, device=device)
    input = made(input.shape, layout=layout, device=device)
    with cuda_budget("::valve_forward<", launches=1, min_bytes=y.nbytes + input.nbytes + region.nbytes, bytes_ratio=7):
        assert valve_conv2d(input, region, *parameters, padding=1).stride() == y.stride()


def test_vmap(device):
    features, region, weight, bias = gate_tensors(3, images=6, size=(4, 5), device=device)
    maps = [each.unflatten(0, (3, 2)) for each in (features, region)]

    def gate(features, region, weight):
        return region_gate(features, region, weight, bias, padding=1, relu=True)

    got = torch.vmap(gate, (0, 0, None))(*maps, weight)
    assert torch.equal(got, torch.stack([gate(f, r, weight) for f, r in zip(*maps, strict=True)]))
    weights = torch.stack([weight, -weight, weight * 2])
    got = torch.vmap(gate, (None, None, 0))(features, region, weights)
    assert torch.equal(got, torch.stack([gate(features, region, each) for each in weights]))


def test_forward_mode():
    """In torch's operators: the derivative along a direction is that of finite differences."""
    tensors = valve_tensors(3, (4, 5), images=1, dtype=DOUBLE)
    directions = [made(t.shape, DOUBLE, seed=20 + i) for i, t in enumerate(tensors)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*each) for each in zip(tensors, directions, strict=True)]
        tangent = forward_ad.unpack_dual(valve_conv2d(*duals, padding=1)).tangent
    ends = [
        valve_conv2d(*[t + s * d for t, d in zip(tensors, directions, strict=True)], padding=1) for s in (1e-6, -1e-6)
    ]
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-6)


def test_autocast(device):
    features, region, weight, bias = gate_tensors(device=device)
    input, mask, *parameters = (t.requires_grad_() for t in valve_tensors(device=device))
    deep = valve_tensors(6, (5, 6), 3, inputs=24, device=device)
    with torch.autocast(device, torch.bfloat16):
        gate = region_gate(features, region, weight, bias, padding=1)
        valve = valve_conv2d(input, mask, *parameters, padding=1)
        with torch.no_grad():
            assert valve_conv2d(*deep, padding=1).dtype == torch.bfloat16
    assert gate.dtype == valve.dtype == torch.bfloat16
    cast = [t.bfloat16() for t in (features, region, weight, bias)]
    assert torch.equal(gate, region_gate(*cast, padding=1))
    assert all(grad.dtype == FLOAT for grad in torch.autograd.grad(valve.float().sum(), parameters))


# ---- modules ----


def test_modules(device):
    """New valves are open; the names in the state_dict are those of nn.Conv2d and of the valve."""
    torch.manual_seed(0)
    layer = ValveConv2d(3, 8, 3, padding=1, relu=True).to(device)
    assert list(layer.state_dict()) == ["weight", "bias", "valve_weight", "valve_bias"]
    image, region = made((2, 3, 6, 5), device=device), mask((2, 1, 6, 5), device=device)
    plain = nn.Conv2d(3, 8, 3, padding=1).to(device)
    layer.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(image).relu()
    torch.testing.assert_close(layer(image, region), expected, rtol=1e-5, atol=1e-5)
    gate = RegionGate(8).to(device)
    assert list(gate.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(gate(expected, region), expected)
    assert torch.equal(RegionGate(8, combine="add").to(device)(expected, region), expected)
    drawn = ValveConv2d(3, 8, 3, valve_std=0.01, valve_kernel_size=1, bias=False)
    assert drawn.valve_weight.shape == (8, 1, 1, 1)
    assert 0 < drawn.valve_weight.std() < 0.05
    assert drawn.valve_bias is None
    assert "valve_kernel_size=(1, 1)" in repr(drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(3, 6, 5)}, r"input must be \[N, C, H, W\], got \[3, 6, 5\]"),
        ({"input": torch.ones(2, 33, 6, 5).int()}, "input must be float32, float64, float16 or bfloat16, got torch"),
        ({"input": torch.ones(2, 4, 6, 5)}, r"weight must be \[K, 4, kH, kW\] for input of 4 channels, got"),
        ({"region": torch.ones(2, 2, 6, 5)}, r"valve_weight must be \[K, 2, kH, kW\] for region of 2 channels"),
        ({"region": torch.ones(2, 1, 6, 4)}, r"region and valve_weight must give \[2, 7, 6, 5\] like input and weight"),
        ({"region": torch.ones(2, 1, 6, 5).double()}, "region must be torch.* like the first argument, got"),
        ({"weight": torch.ones(7, 3, 3)}, r"weight must be \[K, C, kH, kW\], got \[7, 3, 3\]"),
        ({"bias": torch.ones(6)}, r"bias must be \[7\], got \[6\]"),
        ({"valve_bias": torch.ones(7).half()}, "valve_bias must be torch.* like the first argument, got"),
        ({"padding": -1}, r"padding must be two integers from 0 to 2\^29 - 1, got \[-1, -1\]"),
        ({"stride": 0}, r"stride must be two integers from 1 to 2\^29 - 1, got \[0, 0\]"),
        ({"stride": (1, 1, 1)}, r"stride must be one or two integers, got \[1, 1, 1\]"),
        ({"dilation": 9}, "with padding .* must reach over 19 rows or columns of taps, got"),
        ({"combine": "divide"}, "combine must be 'multiply' or 'add', got 'divide'"),
        ({"valve_weight": torch.ones(7, 1, 2, 2)}, "valve_padding must be given where the windows' centres cannot"),
    ],
)
@pytest.mark.parametrize("channels", [3, 33])
def test_errors(device, channels, change, message):
    """The same in one kernel and in two steps, with gradients and without."""
    arguments = {
        "input": torch.ones(2, channels, 6, 5),
        "region": torch.ones(2, 1, 6, 5),
        "weight": torch.ones(7, channels, 3, 3),
        "valve_weight": torch.ones(7, 1, 3, 3),
        "padding": 1,
        **change,
    }
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    on_device["weight"].requires_grad_()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(RuntimeError, match=f"valve_conv2d: .*{message}"):
            valve_conv2d(**on_device)


def test_gate_errors(device):
    features, region, weight, bias = gate_tensors(device=device)
    with pytest.raises(
        RuntimeError, match=r"region_gate: features must be \[2, 7, 9, 8\] like the output of the region"
    ):
        region_gate(features[:, :, :5], region, weight, bias, padding=1)
    backward = torch.ops.pyseg._region_gate_backward
    with pytest.raises(RuntimeError, match=r"grad must be \[2, 7, 9, 8\], got \[2, 7, 9, 7\]"):
        rest = ([1, 1], [1, 1], [1, 1], False, False, True, True, True)
        backward(features[..., 1:], features, region, weight, bias, *rest)
