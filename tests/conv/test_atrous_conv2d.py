"""Values of atrous_conv2d against the float64 reference, on both devices."""

import itertools
from pathlib import Path

import pytest
import torch
from conv2d_cases import DTYPES, EXACT_BOUNDS, LAYOUTS, check, dense, depthwise, magnitude, make, oracle, vectors
from hypothesis import given
from hypothesis import strategies as st

from cpu_targets import OTHER_TARGETS, run_on_cpu_target
from drawn import drawn_settings
from pyseg.functional import atrous_conv2d

# ---- deterministic cases around the kernels' boundaries ----

# Phases of every length from 1 pixel to beyond two of the largest tiles, alone and between neighbours.
PHASES = [dense(1, 40, length, 40, 1) for length in range(1, 15)]
PHASES += [dense(2, 33, length * rate - rate // 2, 17, rate) for rate in (2, 3) for length in range(1, 8)]
# The map against the window: taps outside on one side, on both, all but the centre; different along each axis.
WINDOWS = [dense(1, 32, 33, 32, rate) for rate in (6, 12, 16, 17, 18, 24, 32, 33, 36)]
WINDOWS += [dense(1, 24, (9, 20), 24, dilation) for dilation in ((1, 7), (7, 1), (2, 19), (20, 3))]
# Padding: none, less and more than the rate, more than twice the rate (whole rows see nothing but padding).
PADDINGS = [
    dense(1, 32, (17, 22), 32, (3, 2), padding) for padding in ((0, 0), (1, 0), (0, 3), (2, 5), (6, 4), (9, 11))
]
PADDINGS += [dense(1, 8, 3, 8, 1, 0), dense(1, 8, 5, 8, 2, 0), dense(2, 8, 1, 8, 1, 5), dense(1, 5, (1, 9), 7, (4, 2))]
# Output channels around panels of 16, input channels around the chunks of the inner products.
CHANNELS = [dense(1, 19, 10, c_out, 2) for c_out in (1, 2, 15, 16, 17, 31, 32, 33, 48, 49)]
CHANNELS += [dense(1, c_in, 9, 20, 1) for c_in in (1, 2, 3, 15, 16, 17, 31, 33)]
# Rows of the products come in groups (of 6) and blocks, across the images of a batch.
ROWS = [dense(n, 16, size, 18, 1) for n in (1, 2, 3, 5) for size in ((1, 1), (1, 5), (2, 3), (7, 1), (4, 6), (5, 5))]
DENSE = PHASES + WINDOWS + PADDINGS + CHANNELS + ROWS

DEPTHWISE = [depthwise(2, 5, length, 1) for length in range(1, 12)]
DEPTHWISE += [depthwise(1, c, (9, 13), 2) for c in (2, 3, 7, 8, 9, 15, 16, 17, 31, 33)]
DEPTHWISE += [depthwise(1, 4, (5, width), rate) for rate in (1, 2, 3) for width in (6, 7, 8, 9, 15, 16, 17, 31, 33, 64)]
DEPTHWISE += [depthwise(1, 6, (17, 21), (d, e), p) for d, e, p in ((1, 4, 0), (5, 2, 3), (8, 9, 20), (20, 22, 21))]

# What only the CPU is fast enough for: chunks of 256 channels, deep sums, long phases.
LARGE = [dense(1, c_in, 13, 24, 2) for c_in in (255, 256, 257, 511, 513)]
LARGE += [dense(1, 128, 33, 128, rate) for rate in (1, 2, 6, 12, 18)] + [
    dense(3, 64, 65, 64, 6),
    dense(1, 64, 65, 48, 24),
]
LARGE += [dense(7, 130, (12, 11), 140, 1), dense(1, 16, (160, 150), 16, 2), depthwise(1, 96, 65, 4)]


@pytest.mark.parametrize("case", DENSE + DEPTHWISE, ids=str)
def test_boundaries(case):
    check(case)
    check(case, layout="contiguous", exact=True, packed=True)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case):
    check(case, packed=True)
    check(case, exact=True)


ON_CUDA = [*PHASES[:14:3], *WINDOWS[-3:], *PADDINGS[::3], *CHANNELS[::5], *ROWS[::6], *DEPTHWISE[::7]]


@pytest.mark.parametrize("case", ON_CUDA, ids=str)
def test_devices(device, case):
    check(case, device=device, epilogue=("bias", "scale", "shift"), relu=True, packed=True)


@pytest.mark.parametrize("exact", [False, True])
def test_error_of_2048_channels(exact):
    """The deepest sum of the models that this is for; Winograd's error grows with it."""
    check(dense(1, 2048, 33, 64, 6), exact=exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [dense(2, 40, (11, 14), 35, (2, 3)), depthwise(2, 21, (11, 14), (2, 3))], ids=str)
def test_dtypes(device, case, dtype):
    check(case, dtype=dtype, device=device, epilogue=("bias", "scale", "shift"))
    check(case, dtype=dtype, device=device, layout="contiguous", exact=True, packed=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [dense(2, 6, (7, 8), 5, (1, 2)), depthwise(2, 6, (7, 8), (2, 1))], ids=str)
def test_layouts(device, case, layout):
    for weight_layout in ("contiguous", "channels_last", "transposed", "window"):
        check(case, device=device, layout=layout, weight_layout=weight_layout, packed=weight_layout == "window")


EPILOGUES = [names for k in range(4) for names in itertools.combinations(("bias", "scale", "shift"), k)]


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("relu", [False, True])
def test_epilogue(device, epilogue, relu):
    check(dense(1, 9, 8, 18, 2), device=device, epilogue=epilogue, relu=relu)
    check(dense(1, 9, (8, 30), 18, 1), device=device, layout="contiguous", epilogue=epilogue, relu=relu)
    check(depthwise(2, 9, 8, 2), device=device, epilogue=epilogue, relu=relu)


# ---- drawn cases ----


@st.composite
def drawn(draw):
    h, w = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    dilation = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    needed = [max(0, -(-(2 * d - size) // 2)) for d, size in zip(dilation, (h, w), strict=True)]
    padding = tuple(draw(st.integers(least, least + 8)) for least in needed)
    n, c_in, c_out = draw(st.integers(0, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    case = dense(n, c_in, (h, w), c_out, dilation, padding)
    if draw(st.integers(0, 2)) == 0:
        case = depthwise(n, c_in, (h, w), dilation, padding)
    options = {
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "weight_layout": draw(st.sampled_from(["contiguous", "channels_last", "transposed", "every_other"])),
        "epilogue": draw(st.sampled_from(EPILOGUES)),
        "relu": draw(st.booleans()),
        "exact": draw(st.booleans()),
        "packed": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
    }
    return case, options


def test_drawn_cases(device):
    @drawn_settings(200, 15, device)
    @given(drawn())
    def run(drawn_case):
        case, options = drawn_case
        input = make(case.input_shape, options["dtype"], layout=options["layout"], seed=options["seed"])
        weight = make(case.weight_shape, options["dtype"], layout=options["weight_layout"], seed=options["seed"] + 1)
        # In a map of a few pixels all outputs may happen to be small: bound by what was summed up.
        conv = oracle(input, weight, case)
        room = magnitude(input, weight, case) / max(conv.abs().max().item(), 1e-30) if conv.numel() else 1.0
        check(case, **options, device=device, bound=EXACT_BOUNDS[options["dtype"]] * max(1.0, room) + 1e-15)

    run()


# ---- out ----


@pytest.mark.parametrize("case", [dense(2, 9, (8, 7), 6, 2), depthwise(2, 6, (8, 7), 2)], ids=str)
@pytest.mark.parametrize("big_layout", ["channels_last", "contiguous", "window", "transposed", "every_other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_out_into_channel_slice(device, case, big_layout, dtype):
    """The rest of the larger tensor stays untouched, bit for bit."""
    input, weight = (
        make(case.input_shape, dtype, device, "channels_last"),
        make(case.weight_shape, dtype, device, seed=1),
    )
    more = vectors(case.c_out, dtype, device)
    big = make((2, 17, 8, 7), dtype, device, big_layout, seed=5)
    before = big.clone()
    out = big[:, 5:11]
    result = atrous_conv2d(input, weight, **more, **case.geometry, relu=True, out=out)
    assert result is out
    plain = atrous_conv2d(input, weight, **more, **case.geometry, relu=True)
    torch.testing.assert_close(out, plain, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-5)
    assert torch.equal(big[:, :5], before[:, :5])
    assert torch.equal(big[:, 11:], before[:, 11:])


def test_out_surroundings():
    """Also what lies between the rows and images of a slice in memory is left alone."""
    storage = torch.full((3, 12, 11, 19), 7.0)
    out = storage.permute(0, 3, 1, 2)[1:, 3:16, 2:10, 1:9]
    case = dense(2, 5, 8, 13, 3)
    atrous_conv2d(make(case.input_shape), make(case.weight_shape), **case.geometry, out=out)
    out.fill_(7.0)
    assert (storage == 7).all()


def test_out_unbatched(device):
    x, w = make((1, 3, 5, 6), device=device)[0], make((4, 3, 3, 3), device=device)
    out = torch.empty(4, 5, 6, device=device)
    assert atrous_conv2d(x, w, padding=1, out=out) is out
    torch.testing.assert_close(out, atrous_conv2d(x, w, padding=1))


# ---- sizes of zero, values out of the ordinary ----


@pytest.mark.parametrize(
    "case",
    [
        dense(0, 4, 6, 5, 1),
        depthwise(0, 4, 6, 1),
        dense(2, 4, 4, 5, 2, 0),
        depthwise(2, 4, (4, 9), 2, 0),
        dense(2, 4, 6, 0, 1),
    ],
    ids=str,
)
def test_nothing_to_compute(device, case):
    check(case, device=device, epilogue=("bias", "shift"), packed=True)


def test_no_input_channels(device):
    """An empty sum is zero, as in torch; the epilogue still applies."""
    case = dense(2, 0, 5, 3, 1)
    more = vectors(3, torch.float32, device)
    output = atrous_conv2d(
        make((2, 0, 5, 5), device=device), make((3, 0, 3, 3), device=device), **more, **case.geometry
    )
    expected = (more["scale"] * more["bias"] + more["shift"]).view(1, 3, 1, 1).expand(2, 3, 5, 5)
    torch.testing.assert_close(output, expected)


def test_only_padding_in_sight(device):
    """Outputs without a single tap inside the map are the epilogue of zero."""
    case = dense(1, 5, 3, 4, 2, 20)
    more = vectors(4, torch.float32, device)
    x, w = make(case.input_shape, device=device), make(case.weight_shape, device=device)
    output = atrous_conv2d(x, w, **more, **case.geometry).cpu()
    expected = oracle(x, w, case, **more)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    corner = (more["scale"] * more["bias"] + more["shift"]).cpu()
    torch.testing.assert_close(output[0, :, 0, 0], corner)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("case", [dense(2, 20, 21, 18, 2), depthwise(2, 18, 21, 2)], ids=str)
def test_not_finite_exact(device, case, value):
    """exact=True: where torch has NaN and infinities, and nowhere else."""
    x, w = make(case.input_shape, device=device, layout="channels_last"), make(case.weight_shape, device=device)
    x[1, 3, 10, 7] = value
    output = atrous_conv2d(x, w, **case.geometry, exact=True).cpu()
    expected = torch.nn.functional.conv2d(x.cpu(), w.cpu(), **case.geometry)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isposinf(), expected.isposinf())
    assert torch.equal(output.isneginf(), expected.isneginf())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_not_finite(value):
    """Winograd: at least where torch has it, at most within a tile of the same phase and image."""
    case = dense(2, 64, 40, 64, 2)
    x, w = make(case.input_shape, layout="channels_last"), make(case.weight_shape)
    x[1, 3, 20, 17] = value
    output = atrous_conv2d(x, w, **case.geometry)
    bad = ~output.isfinite()
    assert bad[~torch.nn.functional.conv2d(x, w, **case.geometry).isfinite()].all()
    near = torch.zeros(40, 40, dtype=torch.bool)
    near[20 % 2 :: 2, 17 % 2 :: 2] = True
    near[: 20 - 10], near[20 + 11 :], near[:, : 17 - 10], near[:, 17 + 11 :] = False, False, False, False
    assert not bad[0].any()
    assert not bad[1][:, ~near].any()


def test_relu_keeps_nan(device):
    for case in (dense(1, 4, 5, 4, 1), depthwise(1, 4, 5, 1)):
        x = torch.full(case.input_shape, float("nan"), device=device)
        assert atrous_conv2d(x, make(case.weight_shape, device=device), **case.geometry, relu=True).isnan().all()


@pytest.mark.parametrize("scale", [1e16, 1e-16])
def test_large_and_small_magnitudes(scale):
    """Winograd's intermediate values are up to a few hundred times the output: the range ends that much earlier."""
    case = dense(1, 64, 24, 48, 1)
    x, w = make(case.input_shape), make(case.weight_shape)
    output = atrous_conv2d(x * scale, w * scale, **case.geometry)
    expected = oracle(x * scale, w * scale, case)
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-5


@pytest.mark.parametrize("case", [dense(1, 8, 6, 8, 1), depthwise(1, 8, 6, 1)], ids=str)
def test_half_does_not_overflow_before_the_epilogue(device, case):
    """The sum is above float16's 65504; scaled down, it is not: rounding happens once, at the end."""
    x = torch.full(case.input_shape, 300.0, dtype=torch.float16, device=device)
    w = torch.full(case.weight_shape, 300.0, dtype=torch.float16, device=device)
    scale = torch.full((8,), 2**-8, dtype=torch.float16, device=device)
    output = atrous_conv2d(x, w, scale=scale, **case.geometry).cpu()
    expected = oracle(x, w, case, scale=scale)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=0)


# ---- determinism ----


@pytest.mark.parametrize(
    "case",
    [dense(3, 80, 33, 70, 6), dense(1, 48, 65, 40, 1), dense(2, 300, 9, 33, 4), depthwise(2, 37, 33, 3)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_every_number_of_threads(case, dtype):
    x, w = make(case.input_shape, dtype, layout="channels_last"), make(case.weight_shape, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            y = atrous_conv2d(x, w, **case.geometry)
            gradients = torch.ops.pyseg._atrous_conv2d_backward(
                y, x, w, case.padding, case.dilation, case.groups, False, False, True, True
            )
            results.append((y, *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", [dense(2, 24, 9, 20, 2), depthwise(2, 20, 9, 2)], ids=str)
def test_same_bits_in_every_run(device, case):
    x, w = make(case.input_shape, device=device), make(case.weight_shape, device=device)
    arguments = (case.padding, case.dilation, case.groups, False, False, True, True)

    def run():
        y = atrous_conv2d(x, w, **case.geometry)
        return y, *torch.ops.pyseg._atrous_conv2d_backward(y, x, w, *arguments)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_packed_changes_nothing(device):
    case = dense(1, 40, 20, 36, 2)
    x, w = make(case.input_shape, device=device), make(case.weight_shape, device=device)
    packed = torch.ops.pyseg._atrous_conv2d_pack(w)
    assert torch.equal(atrous_conv2d(x, w, **case.geometry), atrous_conv2d(x, w, **case.geometry, packed=packed))


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (16, 7, 3, 3), (33, 2, 3, 3), (0, 4, 3, 3), (4, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_pack(device, shape, layout):
    weight = make(shape, device=device, layout=layout)
    packed = torch.ops.pyseg._atrous_conv2d_pack(weight)
    if device == "cuda":
        expected = weight.permute(2, 3, 0, 1)
    else:
        c_out, c_in = shape[:2]
        panels = -(-c_out // 16)
        padded = torch.cat([weight.reshape(c_out, c_in, 9), torch.zeros(panels * 16 - c_out, c_in, 9)])
        expected = padded.view(panels, 16, c_in, 9).permute(0, 3, 2, 1)
    assert packed.is_contiguous()
    assert torch.equal(packed, expected)


# ---- CPU capabilities ----


@pytest.mark.parametrize("capability", OTHER_TARGETS)
def test_cpu_capability(capability):
    """Every other instruction set that this machine has, in a process of its own."""
    script = """
import torch
from conv2d_cases import check, check_backward
from test_atrous_conv2d import DENSE, DEPTHWISE, LARGE
for case in DENSE[::2] + DEPTHWISE[::2] + LARGE[::4]:
    check(case, packed=True)
    check(case, exact=True, epilogue=("scale", "shift"), relu=True)
    check(case, dtype=torch.bfloat16)
    check(case, dtype=torch.float64, layout="contiguous")
    check_backward(case)
"""
    run_on_cpu_target(capability, script, Path(__file__).parent)
