"""bilinear_upsample and upsample_concat against the reference, torch and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from upsample_cases import DOUBLE, DTYPES, FLOAT, LAYOUTS, assert_near, doubles, make_map, make_pyramid

from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import bilinear_upsample, upsample_concat

SIZES = [((6, 7), (13, 11)), ((5, 8), (5, 16)), ((9, 4), (3, 20)), ((1, 1), (3, 4)), ((7, 5), (1, 1)), ((5, 6), (5, 6))]


def both_ways(input, function, oracle):
    """Result and gradient of `function` on input and of `oracle` on it in float64."""
    x = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    grad = make_map(y.shape, y.dtype, seed=9).to(y.device)
    (dx,) = torch.autograd.grad(y, x, grad)
    (x_ref,) = doubles([x])
    y_ref = oracle(x_ref)
    (dx_ref,) = torch.autograd.grad(y_ref, x_ref, grad.cpu().double())
    return (y, dx), (y_ref, dx_ref)


# ---- against the reference and torch ----


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "out"), SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_reference(device, size, out, align_corners, layout):
    """Enlarged, made smaller, kept, from and to one pixel; what torch computes too."""
    input = make_map((2, 5, *size), layout=layout).to(device)
    got, expected = both_ways(
        input,
        lambda x: bilinear_upsample(x, out, align_corners=align_corners),
        lambda x: reference.bilinear_upsample(x, out, align_corners),
    )
    assert_near(got[0], expected[0])
    assert_near(got[1], expected[1], terms=64)
    theirs = F.interpolate(input.cpu().double(), out, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(expected[0].detach(), theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(device, dtype, layout):
    """Channel counts on both sides of the vectors' lengths."""
    for channels in (1, 5, 40):
        input = make_map((2, channels, 6, 7), dtype, layout).to(device)
        got, expected = both_ways(
            input, lambda x: bilinear_upsample(x, (11, 20)), lambda x: reference.bilinear_upsample(x, (11, 20))
        )
        assert got[0].dtype == got[1].dtype == dtype
        assert_near(got[0], expected[0])
        assert_near(got[1], expected[1], terms=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_channel_of_channels_last(device, dtype):
    """Pixels of one element with gaps between: a slice of channels, alone and beside another; all derivatives."""
    wide, other = make_pyramid([(3, 4, 4), (3, 6, 6)], dtype, "channels_last", device=device)
    slices = [wide[:, 1:2].detach().requires_grad_(), other[:, 2:, ::2, ::2].detach().requires_grad_()]
    for function, oracle in (
        (lambda a, b: bilinear_upsample(a, (7, 9)), lambda a, b: reference.bilinear_upsample(a, (7, 9))),
        (lambda a, b: upsample_concat([a, b], (7, 9)), lambda a, b: reference.upsample_concat([a, b], (7, 9), True)),
        (lambda a, b: upsample_concat([a, b], (4, 9)), lambda a, b: reference.upsample_concat([a, b], (4, 9), True)),
        (lambda a, b: upsample_concat([a, b], (9, 4)), lambda a, b: reference.upsample_concat([a, b], (9, 4), True)),
    ):
        y, expected = function(*slices), oracle(*(ours := doubles(slices)))
        assert_near(y, expected)
        if dtype in (FLOAT, DOUBLE):
            grads, wanted = (
                torch.autograd.grad(z.sin().sum(), at, create_graph=True, allow_unused=True)
                for z, at in ((y, slices), (expected, ours))
            )
            seconds, wanted_seconds = (
                torch.autograd.grad(sum(g.cos().sum() for g in each if g is not None), at, allow_unused=True)
                for each, at in ((grads, slices), (wanted, ours))
            )
            for got, want in zip((*grads, *seconds), (*wanted, *wanted_seconds), strict=True):
                assert (got is None) == (want is None)
                if got is not None:
                    assert_near(got, want, terms=900)


@pytest.mark.parametrize("factor", [2, 1.7, 0.6, (1.3, 3), (1.2, 1.0), 1.1])
@pytest.mark.parametrize("align_corners", [False, True])
def test_scale_factor(device, factor, align_corners):
    """The size that torch finds, and its coordinates, which follow from the factor and not from the sizes."""
    x = make_map((1, 3, 7, 9), DOUBLE)
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=align_corners)
    got = bilinear_upsample(x.to(device).requires_grad_(), scale_factor=factor, align_corners=align_corners)
    torch.testing.assert_close(got.detach().cpu(), expected)
    x_ref = x.clone().requires_grad_()
    y_ref = F.interpolate(x_ref, scale_factor=factor, mode="bilinear", align_corners=align_corners)
    leaf = x.to(device).requires_grad_()
    y = bilinear_upsample(leaf, scale_factor=factor, align_corners=align_corners)
    grads = [torch.autograd.grad(out.square().sum(), at)[0].cpu() for out, at in ((y, leaf), (y_ref, x_ref))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_torch_on_large_maps(dtype, layout):
    """Large enough for blocks of channels, bands of rows and stores past the caches."""
    for shape, size in (((1, 48, 64, 60), (256, 240)), ((2, 700, 16, 24), (64, 96))):
        x = make_map(shape, dtype, layout)
        got = bilinear_upsample(x, size, align_corners=True)
        expected = F.interpolate(x.float(), size, mode="bilinear", align_corners=True)
        tolerance = 2e-4 if dtype == FLOAT else 2e-2  # torch's coordinates are in float32
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)
        assert_near(got[:, :4], reference.bilinear_upsample(x[:, :4].double(), size, True))


@st.composite
def drawn(draw):
    images, channels = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    size, out = ([draw(st.integers(1, 17)) for _ in range(2)] for _ in range(2))
    shape = (images, channels, *size)
    layout = draw(st.sampled_from(LAYOUTS[:4]))
    return make_map(shape, draw(st.sampled_from(DTYPES)), layout, draw(st.integers(0, 9))), out, draw(st.booleans())


def test_drawn_cases(device):
    @drawn_settings(80, 15, device)
    @given(drawn())
    def run(case):
        input, out, align_corners = case
        got, expected = both_ways(
            input.to(device),
            lambda x: bilinear_upsample(x, out, align_corners=align_corners),
            lambda x: reference.bilinear_upsample(x, out, align_corners),
        )
        assert_near(got[0], expected[0])
        assert_near(got[1], expected[1], terms=400)

    run()


# ---- concatenation ----

SHAPES = [(5, 12, 13), (18, 6, 7), (16, 12, 13), (33, 3, 4), (1, 1, 1), (3, 20, 17)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concat(device, dtype, layout):
    maps = make_pyramid(SHAPES, dtype, "contiguous" if layout == "mixed" else layout, device=device)
    if layout == "mixed":
        maps[1::2] = [m.contiguous(memory_format=torch.channels_last) for m in maps[1::2]]
    for size in (None, (15, 8)):
        for align_corners in (True, False):
            leaves = [m.detach().requires_grad_() for m in maps]
            y = upsample_concat(leaves, size, align_corners)
            ours = doubles(leaves)
            expected = reference.upsample_concat(ours, size or (12, 13), align_corners)
            assert_near(y, expected)
            grad = make_map(y.shape, dtype, seed=9)
            grads = torch.autograd.grad(y, leaves, grad.to(device))
            for got, want in zip(grads, torch.autograd.grad(expected, ours, grad.double()), strict=True):
                assert_near(got, want, terms=400)


def test_concat_copies(device):
    """Maps at the size already, bit by bit, whatever is in them."""
    maps = make_pyramid([(3, 4, 5), (2, 4, 5)], device=device)
    maps[1][0, 1, 2, 3] = float("nan")
    maps[0][1, 1, 2, 3] = float("inf")
    y = upsample_concat(maps)
    assert torch.equal(y[:, :3], maps[0])
    assert torch.equal(y[:, 3:].nan_to_num(7), maps[1].nan_to_num(7))


def test_some_inputs_need_no_gradient(device):
    x, y = make_pyramid([(3, 4, 5), (2, 2, 3)], device=device)
    y.requires_grad_()
    upsample_concat([x, y]).sum().backward()
    assert x.grad is None
    assert y.grad.sum().item() == pytest.approx(2 * 2 * 20, rel=1e-5)


def test_memory_formats(device):
    x = make_map((2, 5, 6, 7), layout="channels_last").to(device).requires_grad_()
    y = bilinear_upsample(x, 9)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert bilinear_upsample(x.contiguous(), 9).is_contiguous()
    other = make_map((2, 3, 6, 7)).to(device)
    for maps in ([x, other], [other, x]):
        assert upsample_concat(maps).is_contiguous(memory_format=torch.channels_last)
    assert upsample_concat([other, other]).is_contiguous()


def test_nothing_to_compute(device):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        y = bilinear_upsample(x, (8, 9))
        assert y.shape == (*shape[:2], 8, 9)
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape
    x = torch.ones(2, 3, 4, 5, device=device, requires_grad=True)
    y = upsample_concat([x, x[:, :0]], (8, 9))
    assert torch.autograd.grad(y.sum(), x)[0].sum().item() == pytest.approx(2 * 3 * 72)


def test_values_that_are_not_finite(device):
    """NaN and infinity reach what reads them, and nothing else."""
    x = torch.ones(1, 20, 5, 5)
    x[:, 3, 2, 2], x[:, 4, 0, 4] = float("nan"), float("inf")
    for layout in (torch.contiguous_format, torch.channels_last):
        on_device = x.to(device).contiguous(memory_format=layout)
        y = bilinear_upsample(on_device, (9, 9), align_corners=False).cpu()
        expected = F.interpolate(x, (9, 9), mode="bilinear")
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert y[:, 3].isnan().any()


# ---- derivatives ----


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device, align_corners, layout):
    x = make_map((2, 2, 4, 3), DOUBLE, layout).to(device).requires_grad_()
    for size in ((7, 5), (2, 6)):
        function = lambda x, size=size: bilinear_upsample(x, size, align_corners=align_corners)  # noqa: E731
        assert torch.autograd.gradcheck(function, x, fast_mode=device == "cuda")
        assert torch.autograd.gradgradcheck(function, x, fast_mode=device == "cuda")
    scaled = lambda x: bilinear_upsample(x, scale_factor=1.6, align_corners=align_corners)  # noqa: E731
    assert torch.autograd.gradcheck(scaled, x)
    assert torch.autograd.gradgradcheck(scaled, x)


def test_concat_gradcheck(device):
    x, y = (m.requires_grad_() for m in make_pyramid([(2, 4, 3), (1, 2, 2)], DOUBLE, images=1, device=device))
    assert torch.autograd.gradcheck(lambda x, y: upsample_concat([x, y]), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: upsample_concat([x, y]).square(), (x, y))


# ---- the contract ----


def test_same_bits_for_every_number_of_threads():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = []
            for layout in ("contiguous", "channels_last"):
                for channels in (2, 100):
                    x = make_map((1, channels, 40, 50), layout=layout).requires_grad_()
                    y = bilinear_upsample(x, (90, 77))
                    result += [y.detach(), *torch.autograd.grad(y.sin().sum(), x)]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck(device):
    x = make_map((2, 3, 5, 7), layout="channels_last").to(device).requires_grad_()
    y = make_map((2, 2, 3, 4)).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.pyseg.bilinear_upsample.default, (x, [8, 9], True, None))
    torch.library.opcheck(torch.ops.pyseg.bilinear_upsample.default, (y, [6, 8], False, [2.1, 2.1]))
    torch.library.opcheck(torch.ops.pyseg.upsample_concat.default, ([x, y], [8, 9], True))
    grad = make_map((2, 5, 8, 9)).to(device).requires_grad_()
    sizes = [2, 3, 5, 7, 2, 2, 3, 4]
    torch.library.opcheck(torch.ops.pyseg._upsample_concat_backward.default, (grad, sizes, True, True, None))


def test_vmap(device):
    x = make_map((3, 2, 4, 5, 6)).to(device)
    each = torch.stack([bilinear_upsample(sample, 9) for sample in x])
    assert torch.equal(torch.vmap(lambda x: bilinear_upsample(x, 9))(x), each)
    y = make_map((2, 1, 3, 3)).to(device)
    got = torch.vmap(lambda x, y: upsample_concat([x, y], 9), (0, None))(x, y)
    assert torch.equal(got, torch.stack([upsample_concat([sample, y], 9) for sample in x]))
    leaves = x.clone().requires_grad_()
    vectors = torch.eye(2, device=device)

    def total(vector):
        y = bilinear_upsample(leaves[0], 9).sum((1, 2, 3))
        return torch.autograd.grad(y, leaves, vector, retain_graph=True)[0]

    got = torch.vmap(total)(vectors)
    assert torch.equal(got, torch.stack([total(vector) for vector in vectors]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batched_gradients(device, layout):
    """Many gradients in one call, and the derivatives of such."""
    x, y = (m.requires_grad_() for m in make_pyramid([(2, 4, 3), (1, 2, 2)], DOUBLE, layout, device=device))
    assert torch.autograd.gradcheck(lambda x: bilinear_upsample(x, 5), x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: bilinear_upsample(x, 5).square(), x, check_batched_grad=True)
    concat = lambda x, y: upsample_concat([x, y], (5, 3)).square()  # noqa: E731
    assert torch.autograd.gradcheck(concat, (x, y), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(concat, (x, y), check_batched_grad=True)


def test_jacobian(device):
    x = make_map((1, 2, 4, 3), DOUBLE).to(device)
    function = lambda x: bilinear_upsample(x, 5).square()  # noqa: E731
    got, each = (torch.autograd.functional.jacobian(function, x, vectorize=batched) for batched in (True, False))
    torch.testing.assert_close(got, each)


def test_autocast(device):
    """16-bit maps are taken as they are; of maps of several types the widest is."""
    x = make_map((1, 20, 6, 7), torch.bfloat16).to(device)
    y = make_map((1, 3, 6, 7)).to(device)
    with torch.autocast(device, torch.bfloat16):
        assert bilinear_upsample(x, 9).dtype == torch.bfloat16
        got = upsample_concat([x, y], 9)
    assert got.dtype == FLOAT
    assert torch.equal(got, upsample_concat([x.float(), y], 9))


def test_large_offsets():
    """Elements beyond 2^31 are found."""
    memory = torch.empty(2**31 + 2**16, dtype=torch.bfloat16)  # pages that are never touched cost nothing
    for strides in ((2**31, 20, 5, 1), (2**31, 1, 15, 3)):
        x = memory.as_strided((2, 3, 4, 5), strides)
        x.copy_(make_map((2, 3, 4, 5)))
        assert torch.equal(bilinear_upsample(x, 7), bilinear_upsample(x.clone(), 7))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: bilinear_upsample(x[0], 2), r"bilinear_upsample: input must be \[N, C, H, W\], got \[3, 5, 6\]"),
        (lambda x: bilinear_upsample(x.long(), 2), "input must be float32, float64, float16 or bfloat16, got torch."),
        (lambda x: bilinear_upsample(x), "one of size and scale_factor must be given, got None and None"),
        (lambda x: bilinear_upsample(x, 2, 2.0), "one of size and scale_factor must be given, got 2 and 2.0"),
        (lambda x: bilinear_upsample(x, (1, 2, 3)), r"size must be one or two integers, got \(1, 2, 3\)"),
        (lambda x: bilinear_upsample(x, 2.5), "size must be one or two integers, got 2.5"),
        (lambda x: bilinear_upsample(x, (3, 0)), r"size must have positive H and W, got \[3, 0\]"),
        (lambda x: bilinear_upsample(x, -1), r"size must have positive H and W, got \[-1, -1\]"),
        (lambda x: bilinear_upsample(x, None, 0.1), r"size must have positive H and W, got \[0, 0\]"),
        (lambda x: bilinear_upsample(x, None, -1.0), "scale_factor must be one or two positive numbers, got -1.0"),
        (lambda x: bilinear_upsample(x, None, float("inf")), "scale_factor must be one or two positive numbers"),
        (lambda x: bilinear_upsample(x[:, :, :0], 3), r"input must have positive H and W, got \[1, 3, 0, 6\]"),
        (lambda x: upsample_concat([]), "upsample_concat: inputs must not be empty"),
        (lambda x: upsample_concat([x, x[0]]), r"inputs must be \[N, C, H, W\], got \[3, 5, 6\]"),
        (lambda x: upsample_concat([x, x.double()]), "inputs must have one dtype, got torch.* beside torch."),
        (
            lambda x: upsample_concat([x, x.expand(2, 3, 5, 6)]),
            r"inputs must have the same N, got \[2, 3, 5, 6\] beside \[1, 3, 5, 6\]",
        ),
    ],
)
def test_errors(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(1, 3, 5, 6, device=device))
