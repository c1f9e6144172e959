"""fuse_query against its definition, the convolution of the tiled concatenation, and finite differences."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import pyseg
from cpu_targets import OTHER_TARGETS, run_on_cpu_target
from cuda_budget import cuda_budget
from devices import ORDERS, fake_gpu
from drawn import drawn_settings
from pyseg import reference
from pyseg._ops.fuse_query import pixel_coordinates
from pyseg.functional import fuse_query

FLOAT, DOUBLE = torch.float32, torch.float64
DTYPES = [FLOAT, DOUBLE, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "strided"]
ROUNDING = {FLOAT: 2e-6, DOUBLE: 1e-14, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}


def draw(shape, dtype=FLOAT, seed=0):
    """Random values that every dtype has."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 16).round().div(16).to(dtype)


def make_map(shape, dtype=FLOAT, layout="contiguous", seed=0):
    x = draw(shape, dtype, seed)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # neither rows nor channels side by side
        return x.repeat_interleave(2, -1)[..., ::2].transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def make_arguments(images=2, channels=5, query=3, outputs=6, size=(4, 7), dtype=FLOAT, layout="contiguous", seed=0):
    """input, query, weight, bias; weights so small that sums are about one."""
    stacked = channels + query + 8
    x = make_map((images, channels, *size), dtype, layout, seed)
    q = draw((images, query), dtype, seed + 1)
    weight = draw((outputs, stacked, 1, 1), dtype, seed + 2) / 4
    return [x, q, weight, draw((outputs,), dtype, seed + 3)]


def leaves(tensors, device="cpu", dtype=None):
    return [t.detach().to(device=device, dtype=dtype or t.dtype).requires_grad_() for t in tensors]


def assert_near(actual, expected, terms=None):
    """To the rounding of numbers as large as the largest, or as the largest `terms` whose difference they are."""
    largest = max((t.detach().abs().max().item() for t in (expected, terms) if t is not None and t.numel()), default=0)
    tolerance = ROUNDING[actual.dtype] * largest
    torch.testing.assert_close(actual.detach().cpu().double(), expected.detach(), rtol=0, atol=tolerance)


def compare(arguments, device, normalize=False, relu=False):
    """Result and gradients against the reference in float64; where ReLU is nearly zero, neither is asked."""
    ours, theirs = leaves(arguments, device), leaves(arguments, dtype=DOUBLE)
    y = fuse_query(*ours, normalize=normalize, relu=relu)
    expected = reference.fuse_query(*theirs, normalize=normalize)
    grad = draw(expected.shape, y.dtype, 9)
    if relu:
        unsure = expected.abs() < 0.1
        grad = grad.masked_fill(unsure, 0)
        expected = expected.relu()
    assert y.dtype == arguments[0].dtype
    assert_near(y, expected)
    got = torch.autograd.grad(y, ours, grad.to(device))
    wanted = torch.autograd.grad(expected, theirs, grad.double())
    assert [each.dtype for each in got] == [each.dtype for each in ours]
    x, q, weight, _ = (each.detach() for each in theirs)
    of_map, of_query, _ = weight.flatten(1).split([x.shape[1], q.shape[1], 8], 1)
    terms = [torch.einsum("nkhw,kc->nchw", grad.double(), of_map), grad.double().sum((2, 3)) @ of_query, None, None]
    for i, (mine, want) in enumerate(zip(got, wanted, strict=True)):
        if normalize and i < 2:  # gradients of zeros, which no 16-bit type holds, are for a test of their own
            norm = theirs[i].detach().norm(dim=1, keepdim=True)
            zero = (norm == 0).expand_as(want)
            mine, want = mine.masked_fill(zero.to(device), 0), want.masked_fill(zero, 0)
            terms[i] = terms[i].div(norm).masked_fill(zero, 0)
        assert_near(mine, want, terms[i])


# ---- against the definition ----


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference(device, layout, normalize, relu):
    compare(make_arguments(layout=layout), device, normalize, relu)


def test_conv2d_on_the_concatenation(device):
    """Nothing but what torch computes from the tensor that is not made here."""
    x, q, weight, bias = make_arguments(dtype=DOUBLE)
    coordinates = pixel_coordinates(4, 7, DOUBLE).expand(2, -1, -1, -1)
    stacked = torch.cat([x, q[:, :, None, None].expand(-1, -1, 4, 7), coordinates], 1)
    got = fuse_query(x.to(device), q.to(device), weight.to(device), bias.to(device), relu=True)
    torch.testing.assert_close(got.cpu(), F.conv2d(stacked, weight, bias).relu())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(device, dtype, layout):
    """Channels and pixels on both sides of the vectors' lengths."""
    for channels, outputs, size in ((16, 24, (4, 8)), (19, 37, (3, 5)), (1, 1, (2, 3)), (40, 8, (1, 1))):
        arguments = make_arguments(2, channels, 3, outputs, size, dtype, layout)
        compare(arguments, device, normalize=True, relu=True)
        compare(arguments, device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_large_maps(dtype, layout):
    """Several blocks of pixels, parts of images and runs of channels."""
    compare(make_arguments(1, 530, 2, 3, (37, 61), dtype, layout), "cpu", normalize=True)
    compare(make_arguments(2, 3, 2, 530, (37, 11), dtype, layout), "cpu", relu=True)


@st.composite
def drawn(draw_from):
    integer = lambda low, high: draw_from(st.integers(low, high))  # noqa: E731
    size = (integer(1, 9), integer(1, 9))
    sizes = (integer(1, 3), integer(1, 20), integer(1, 4), integer(1, 40), size)
    dtype, layout = draw_from(st.sampled_from(DTYPES)), draw_from(st.sampled_from(LAYOUTS))
    return make_arguments(*sizes, dtype, layout, integer(0, 9)), draw_from(st.booleans()), draw_from(st.booleans())


def test_drawn_cases(device):
    @drawn_settings(60, 12, device)
    @given(drawn())
    def run(case):
        arguments, normalize, relu = case
        compare(arguments, device, normalize, relu)

    run()


def test_some_arguments_need_no_gradient(device):
    arguments = make_arguments()
    for i in range(4):
        ours = [t.to(device) for t in arguments]
        ours[i].requires_grad_()
        (got,) = torch.autograd.grad(fuse_query(*ours, normalize=True).square().sum(), ours[i])
        theirs = [t.double() for t in arguments]
        theirs[i].requires_grad_()
        expected = torch.autograd.grad(reference.fuse_query(*theirs, normalize=True).square().sum(), theirs[i])[0]
        assert_near(got, expected)


def test_no_bias(device):
    x, q, weight, _ = make_arguments()
    got = fuse_query(x.to(device), q.to(device), weight.to(device))
    assert_near(got, reference.fuse_query(x.double(), q.double(), weight.double()))


def test_memory_formats(device):
    for layout, memory_format in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        x, q, weight, bias = leaves(make_arguments(layout=layout), device)
        y = fuse_query(x, q, weight, bias, relu=True)
        assert y.is_contiguous(memory_format=memory_format)
        (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
        assert dx.is_contiguous(memory_format=memory_format)


def test_nothing_to_compute(device):
    for images, channels, outputs in ((0, 5, 6), (2, 0, 6), (2, 5, 0)):
        arguments = leaves(make_arguments(images, channels, 3, outputs), device)
        y = fuse_query(*arguments, normalize=True, relu=True)
        assert y.shape == (images, outputs, 4, 7)
        grads = torch.autograd.grad(y.sum(), arguments)
        for grad, argument in zip(grads, arguments, strict=True):
            assert grad.shape == argument.shape
            assert grad.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_that_are_not_finite(device, layout):
    """A NaN stays one behind ReLU, in its pixel; pixels of zeros, and nearly so, are normalised as by torch."""
    x, q, weight, bias = make_arguments(layout=layout, dtype=DOUBLE)
    x[0, 1, 2, 3] = float("nan")
    x[1, :, 0, 0] = 0
    x[1, :, 0, 1] = 1e-13 * torch.arange(5)
    ours, theirs = leaves([x, q, weight, bias], device), leaves([x, q, weight, bias])
    y = fuse_query(*ours, normalize=True, relu=True)
    expected = reference.fuse_query(*theirs, normalize=True, relu=True)
    torch.testing.assert_close(y.detach().cpu(), expected.detach(), equal_nan=True)
    assert y[0, :, 2, 3].isnan().all()
    assert y.isnan().sum() == y.shape[1]
    got, wanted = (
        torch.autograd.grad(z[1].square().sum(), each[0])[0][1] for z, each in ((y, ours), (expected, theirs))
    )
    torch.testing.assert_close(got.cpu(), wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_beyond_16_bits(device, dtype, layout):
    """Neither one over a norm, nor a product that is yet to be scaled, nor a tiny gradient over a norm is rounded."""
    x, q, weight, bias = make_arguments(channels=16, dtype=dtype, layout=layout)
    x *= 2500  # norms of about 1e4
    x[0, :, 1, 2], x[1, :, 0, 0], q[1] = 0, 4000, 0
    weight[:, :16] = weight[:, :16].abs() + 1
    ours, theirs = leaves([x, q, weight, bias], device), leaves([x, q, weight, bias], dtype=DOUBLE)
    y, expected = fuse_query(*ours, normalize=True), reference.fuse_query(*theirs, normalize=True)
    assert_near(y, expected)
    for size in (1.0, 1e-4):
        grad = (draw(y.shape, seed=9) * size).to(dtype)
        got = torch.autograd.grad(y, ours, grad.to(device), retain_graph=True)
        wanted = torch.autograd.grad(expected, theirs, grad.double(), retain_graph=True)
        for mine, want in zip(got[2:], wanted[2:], strict=True):
            assert_near(mine, want)
        assert_near(got[1][0], wanted[1][0])
        if size == 1:  # otherwise below float16's least number
            assert_near(got[0][1], wanted[0][1])


# ---- derivatives ----


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device, layout, normalize):
    arguments = leaves(make_arguments(2, 3, 2, 3, (2, 3), DOUBLE, layout), device)
    for relu in (False, True):
        function = lambda *a, relu=relu: fuse_query(*a, normalize=normalize, relu=relu)  # noqa: E731
        assert torch.autograd.gradcheck(function, arguments, fast_mode=device == "cuda")
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_gradient_of_a_weight_made_from_the_input():
    """Derivatives of second order where one argument depends on another."""
    x, q, weight, bias = leaves(make_arguments(1, 3, 2, 3, (2, 3), DOUBLE))
    function = lambda x: fuse_query(x, q, weight * x.mean(), bias)  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float16], ids=str)
def test_forward_mode(device, dtype):
    """Of every argument, the transpose of the gradient; not in the operator, which would drop it."""
    arguments = [t.to(device) for t in make_arguments(dtype=dtype)]
    tangents = tuple(draw(t.shape, dtype, 7).to(device) for t in arguments)
    function = lambda *a: fuse_query(*a, normalize=True)  # noqa: E731
    y, tangent = torch.func.jvp(function, tuple(arguments), tangents)
    vector = draw(y.shape, dtype, 8).to(device)
    ours = leaves(arguments, device)
    grads = torch.autograd.grad(function(*ours), ours, vector)
    expected = sum((g.double() * t.double()).sum() for g, t in zip(grads, tangents, strict=True))
    error = (vector.double() * tangent.double()).sum() - expected
    assert error.abs() < ROUNDING[dtype] * y.numel() ** 0.5 * tangent.abs().max()


# ---- the contract ----


def test_same_bits_for_every_number_of_threads():
    """Products of small integers, which torch sums up exactly in any order."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = []
            for layout in ("contiguous", "channels_last"):
                x = make_map((2, 40, 60, 50), layout=layout).mul(16).round().requires_grad_()
                weight = draw((70, 40)).round().requires_grad_()
                offset, coordinates = draw((2, 70)).requires_grad_(), draw((70, 8)).requires_grad_()
                y, scale = torch.ops.pyseg.fuse_query(x, weight, offset, coordinates, True, True)
                grad = draw(y.shape, seed=3)
                backward = torch.ops.pyseg._fuse_query_backward(grad, x, weight, y, scale, False, False)
                result += [y.detach(), scale.detach(), *backward[2:]]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device, layout):
    x, _, weight, _ = make_arguments(layout=layout)
    tensors = leaves([x, weight[:, :5, 0, 0], draw((2, 6)), draw((6, 8))], device)
    for normalize, relu in ((True, True), (False, False)):
        torch.library.opcheck(torch.ops.pyseg.fuse_query.default, (*tensors, normalize, relu))
    y, scale = torch.ops.pyseg.fuse_query(*tensors, True, True)
    arguments = (
        draw(y.shape).to(device),
        tensors[0].detach(),
        tensors[1].detach(),
        y.detach(),
        scale.detach(),
        True,
        True,
    )
    torch.library.opcheck(torch.ops.pyseg._fuse_query_backward.default, arguments)


def test_vmap(device):
    x, q, weight, bias = (t.to(device) for t in make_arguments(images=6))
    each, queries = x.unflatten(0, (3, 2)), q.unflatten(0, (3, 2))
    got = torch.vmap(lambda x, q: fuse_query(x, q, weight, bias, relu=True))(each, queries)
    expected = fuse_query(x, q, weight, bias, relu=True).unflatten(0, (3, 2))
    torch.testing.assert_close(got, expected)
    weight.requires_grad_()
    y = fuse_query(x, q, weight, bias)
    vectors = draw((2, *y.shape)).to(device)
    (batched,) = torch.autograd.grad(y, weight, vectors, retain_graph=True, is_grads_batched=True)
    for vector, got in zip(vectors, batched, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, weight, vector, retain_graph=True)[0])


def test_autocast(device):
    """The product in autocast's dtype, forward and backward, whatever the parameters' dtype."""
    arguments = leaves(make_arguments(channels=16, outputs=16), device)
    with torch.autocast(device, torch.bfloat16):
        y = fuse_query(*arguments, normalize=True, relu=True)
        grads = torch.autograd.grad(y.float().sum(), arguments)
    assert y.dtype == torch.bfloat16
    expected = reference.fuse_query(*(a.detach().cpu().double() for a in arguments), normalize=True, relu=True)
    assert_near(y, expected)
    assert all(grad.dtype == FLOAT for grad in grads)


def test_module():
    """The state_dict of torch's convolution on the concatenation."""
    conv = torch.nn.Conv2d(5 + 3 + 8, 6, 1)
    module = pyseg.nn.FuseQuery(5, 3, 6, relu=True)
    module.load_state_dict(conv.state_dict())
    x, q, *_ = make_arguments()
    expected = reference.fuse_query(x, q, conv.weight, conv.bias, relu=True)
    torch.testing.assert_close(module(x, q), expected)
    assert repr(module) == "FuseQuery(5, 3, 6, relu=True)"
    assert pyseg.nn.FuseQuery(5, 3, 6, bias=False).state_dict().keys() == {"weight"}


def test_large_offsets():
    """Elements beyond 2^31 are found."""
    memory = torch.empty(2**31 + 2**16, dtype=torch.bfloat16)  # pages that are never touched cost nothing
    _, q, weight, bias = make_arguments(dtype=torch.bfloat16)
    for strides in ((2**31, 28, 7, 1), (2**31, 1, 35, 5)):
        x = memory.as_strided((2, 5, 4, 7), strides)
        x.copy_(make_map((2, 5, 4, 7)))
        assert torch.equal(fuse_query(x, q, weight, bias), fuse_query(x.clone(), q, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, q, w, b: (x[0], q, w, b), r"fuse_query: input must be \[N, C, H, W\], got \[5, 4, 7\]"),
        (lambda x, q, w, b: (x, q[:1], w, b), r"fuse_query: query must be \[N, C_q\] with N = 2, got \[1, 3\]"),
        (
            lambda x, q, w, b: (x, q, w[:, 1:], b),
            r"weight must be \[K, 16, 1, 1\] for 5 \+ 3 \+ 8 channels, got \[6, 15",
        ),
        (lambda x, q, w, b: (x, q, w, b[1:]), r"bias must be \[K\] = \[6\], got \[5\]"),
        (lambda x, q, w, b: (x, q.double(), w, b), "query must be torch.float32 like input, got torch.float64"),
        (
            lambda x, q, w, b: (x.long(), q.long(), w.long(), b.long()),
            "fuse_query: input must be float32, float64, float16 or bfloat16, got torch.int64",
        ),
        (
            lambda x, q, w, b: (x[:, :, :0], q, w, b),
            r"input must be \[N, C, H, W\] with positive H and W, got \[2, 5, 0",
        ),
    ],
)
def test_errors(device, change, message):
    arguments = [t.to(device) for t in make_arguments()]
    with pytest.raises(RuntimeError, match=message):
        fuse_query(*change(*arguments))


def test_operator_errors(device):
    x, _, weight, _ = (t.to(device) for t in make_arguments())
    offset, coordinates = draw((2, 6)).to(device), draw((6, 8)).to(device)
    call, weight = torch.ops.pyseg.fuse_query, weight[:, :5, 0, 0]
    for arguments, message in (
        (
            (x.long(), weight, offset, coordinates),
            "input must be float32, float64, float16 or bfloat16, got torch.Long",
        ),
        ((x, weight[:, 1:], offset, coordinates), r"weight must be \[K, 5\] for 5 channels of input, got \[6, 4\]"),
        ((x, weight.double(), offset, coordinates), "weight must be torch.Float like input, got torch.Double"),
        ((x, weight, offset[:1], coordinates), r"offset must be \[2, 6\], got \[1, 6\]"),
        ((x, weight, offset, coordinates[:, 1:]), r"coordinates must be \[6, 8\], got \[6, 7\]"),
        ((x, weight, offset.long(), coordinates), "offset must be float32, float64, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=f"fuse_query: {message}"):
            call(*arguments, False, False)
    with pytest.raises(
        RuntimeError, match="fuse_query: normalize needs an input of float32 or float64, got torch.Half"
    ):
        call(x.half(), weight.half(), offset, coordinates, True, False)
    y = call(x, weight, offset, coordinates, False, False)[0]
    with pytest.raises(RuntimeError, match="_fuse_query_backward: scale needs an input of float32 or float64"):
        torch.ops.pyseg._fuse_query_backward(y.half(), x.half(), weight.half(), None, y[:, 0], True, True)
    with pytest.raises(RuntimeError, match=r"_fuse_query_backward: grad must be \[2, 6, 4, 7\], got \[2, 6, 4, 6\]"):
        torch.ops.pyseg._fuse_query_backward(y[..., 1:], x, weight, None, None, True, True)
    with pytest.raises(RuntimeError, match=r"_fuse_query_backward: scale must be \[2, 4, 7\], got \[2, 7\]"):
        torch.ops.pyseg._fuse_query_backward(y, x, weight, None, y[:, 0, 0], True, True)


CPU_TARGET_SCRIPT = """
import test_fuse_query as tests
for dtype in tests.DTYPES:
    for layout in tests.LAYOUTS[:2]:
        tests.test_dtypes_and_layouts("cpu", dtype, layout)
"""


@pytest.mark.parametrize("capability", OTHER_TARGETS)
def test_cpu_capability(capability):
    """The kernels of every other instruction set that this machine has, each in a process of its own."""
    run_on_cpu_target(capability, CPU_TARGET_SCRIPT, Path(__file__).parent)


# ---- what the CUDA kernels do ----


@pytest.mark.cuda_only
@pytest.mark.sm(75, 80, 90)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(device, dtype, layout):
    """On every capability: vectors and single elements, several parts."""
    compare(make_arguments(1, 8, 3, 16, (33, 32), dtype, layout), device, normalize=True, relu=True)
    compare(make_arguments(1, 3, 3, 5, (11, 13), dtype, layout), device, normalize=True)


@pytest.mark.cuda_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_budget(device, layout):
    """Each map is read and written once, scales again for every plane; projecting reads its two maps twice."""
    x, _, weight, _ = make_arguments(1, 64, 3, 64, (16, 32), layout=layout)
    tensors = [t.to(device) for t in (x, weight[:, :64, 0, 0], draw((1, 64)), draw((64, 8)))]
    name = "pixels" if layout == "channels_last" else "planes"
    with cuda_budget(f"::fuse_query_scale_{name}<", launches=1, min_bytes=x.nbytes, bytes_ratio=1.2):
        y, scale = torch.ops.pyseg.fuse_query(*tensors, True, True)
    with cuda_budget(f"::fuse_query_add_{name}<", launches=1, min_bytes=2 * y.nbytes, bytes_ratio=1.6):
        torch.ops.pyseg.fuse_query(*tensors, False, True)
    grad = draw(y.shape).contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    arguments = (grad.to(device), *tensors[:2], y, scale, True, True)
    with cuda_budget(
        f"::fuse_query_gate_{name}<", launches=1, min_bytes=3 * y.nbytes, bytes_ratio=1.4, bank_conflicts=1.0
    ):
        torch.ops.pyseg._fuse_query_backward(*arguments)
    with cuda_budget(f"::fuse_query_project_{name}<", launches=1, min_bytes=5 * x.nbytes, bytes_ratio=1.1):
        torch.ops.pyseg._fuse_query_backward(*arguments)


@pytest.mark.cuda_only
@pytest.mark.sm(75, 80, 90)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_every_order_of_blocks(device, layout):
    results = []
    for order in ORDERS:
        if fake_gpu() is not None:
            fake_gpu().set_order(order)
        arguments = leaves(make_arguments(3, 5, 3, 9, (13, 12), layout=layout), device)
        y = fuse_query(*arguments, normalize=True, relu=True)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), arguments)])
    if fake_gpu() is not None:
        fake_gpu().set_order(ORDERS[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cuda_only
def test_second_device(device):
    if torch.cuda.device_count() < 2:
        return
    arguments = make_arguments()
    there = [t.to("cuda:1") for t in arguments]
    y = fuse_query(*there)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_near(y, reference.fuse_query(*(t.double() for t in arguments)))
    with pytest.raises(RuntimeError, match="query must be on cuda:1 like input, got cuda:0"):
        fuse_query(there[0], arguments[1].to("cuda:0"), *there[2:])


@pytest.mark.cuda_only
@pytest.mark.needs_gpu("graph capture")
def test_graph_capture(device):
    arguments = leaves(make_arguments(), device)

    def run():
        y = fuse_query(*arguments, normalize=True, relu=True)
        return [y, *torch.autograd.grad(y, arguments, torch.ones_like(y))]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
