"""pyseg.functional.atrous_conv2d as a drop-in for torch's conv2d: arguments, errors, torch's switches, registration."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conv2d_cases import check, dense, depthwise, make, vectors

from pyseg._ops import atrous_conv2d as op
from pyseg.functional import atrous_conv2d

# ---- arguments as torch takes them ----


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"padding": 1},
        {"padding": (1,), "dilation": [2]},
        {"padding": [0, 3], "dilation": (1, 2)},
        {"padding": "same", "dilation": (3, 2)},
        {"padding": "valid", "dilation": 2},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": 2, "dilation": 2},
        {"groups": 2},
        {"groups": 6, "padding": "same"},
        {"groups": 3, "padding": 1, "dilation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [3, 1, (5, 2)], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_like_torch(device, arguments, kernel, batched):
    """Ours or torch's, whichever runs: same values, also where the epilogue follows torch's convolution."""
    if device == "cuda" and (kernel != 3 or not {"stride", "groups"}.isdisjoint(arguments)) and not batched:
        return  # torch's own kernels, which were seen on cuda with a batch
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = make((2, 6, 11, 12), device=device)
    x = x if batched else x[0]
    weight = make((12, 6 // arguments.get("groups", 1), *kernel), device=device, seed=1)
    more = vectors(12, torch.float32, device)
    y = atrous_conv2d(x, weight, more["bias"], **arguments)
    expected = F.conv2d(x.cpu(), weight.cpu(), more["bias"].cpu(), **arguments)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
    y = atrous_conv2d(x, weight, **arguments, scale=more["scale"], shift=more["shift"], relu=True)
    expected = F.conv2d(x.cpu(), weight.cpu(), **arguments) * more["scale"].cpu().view(-1, 1, 1)
    expected = (expected + more["shift"].cpu().view(-1, 1, 1)).relu()
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
    out = torch.empty_like(y)
    assert atrous_conv2d(x, weight, **arguments, scale=more["scale"], shift=more["shift"], relu=True, out=out) is out
    torch.testing.assert_close(out, y)


def test_depthwise_with_multiplier_is_torchs():
    x, w = make((1, 4, 6, 6)), make((8, 1, 3, 3))
    assert torch.equal(atrous_conv2d(x, w, groups=4, padding=1), F.conv2d(x, w, groups=4, padding=1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_other_dtypes_are_torchs(dtype):
    x, w = (make(shape).mul(3).to(dtype) for shape in ((1, 2, 5, 5), (2, 2, 3, 3)))
    assert torch.equal(atrous_conv2d(x, w, padding=1), F.conv2d(x, w, padding=1))


def test_other_devices_are_torchs():
    assert atrous_conv2d(torch.empty(1, 2, 9, 9, device="meta"), torch.empty(4, 2, 3, 3, device="meta")).is_meta


# ---- errors ----

INPUT, WEIGHT = (2, 4, 9, 8), (6, 4, 3, 3)
ERRORS = [
    ({"input": (9, 8)}, r"input must be \[N, C_in, H, W\] or \[C_in, H, W\], got \[9, 8\]"),
    ({"weight": (6, 4, 3)}, r"weight must be \[C_out, C_in / groups, kH, kW\], got \[6, 4, 3\]"),
    ({"weight": (6, 5, 3, 3)}, r"weight must be .*got \[6, 5, 3, 3\]"),
    ({"weight": (4, 2, 3, 3), "groups": 4}, r"weight must be .*got \[4, 2, 3, 3\]"),
    ({"bias": (5,)}, r"bias must be .*6.*got \[5\]"),
    ({"scale": (6, 1)}, r"scale must be .*6.*got \[6, 1\]"),
    ({"shift": (1,)}, r"shift must be .*6.*got \[1\]"),
    ({"padding": (1, 2, 3)}, r"padding must be one or two integers, got \[1, 2, 3\]"),
    ({"padding": "full"}, r"padding must be integers, 'same' or 'valid', got 'full'"),
    ({"padding": (-1, 0)}, r"padding must be .*got \[-1, 0\]"),
    ({"dilation": ()}, r"dilation must be one or two integers, got \[\]"),
    ({"dilation": (1, 0)}, r"dilation must be .*got \[1, 0\]"),
    ({"dilation": (2, 5)}, r"(input must be|output size would be).*\[9, 8\]"),
    ({"out": (2, 6, 7, 7)}, r"out must be \[2, 6, 7, 6\], got \[2, 6, 7, 7\]"),
    ({"out": (6, 7, 6)}, r"out must have 4 dimensions like input, got \[6, 7, 6\]"),
    ({"packed": (1, 9, 4, 15)}, r"packed must be .*got \[1, 9, 4, 15\]"),
    ({"packed": (9, 4, 16)}, r"packed must be .*got \[9, 4, 16\]"),
]
TENSORS = ("input", "weight", "bias", "scale", "shift", "packed", "out")


@pytest.mark.parametrize(
    ("change", "message"), ERRORS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
@pytest.mark.parametrize("mode", ["eager", "fake"])
def test_errors(device, change, message, mode):
    """Operator, argument, expected, got: from C++ in eager mode, from the fake kernels under compile and export."""
    shapes = {"input": INPUT, "weight": WEIGHT, **change}
    tensors = {key: torch.ones(value, device=device) for key, value in shapes.items() if key in TENSORS}
    arguments = {**shapes, **tensors}
    if mode == "fake":
        fake_mode = torch._subclasses.FakeTensorMode()
        arguments = {
            key: fake_mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
    with pytest.raises(RuntimeError, match=rf"^atrous_conv2d: {message}") as error:
        atrous_conv2d(**arguments)
    assert ".cpp" not in str(error.value)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("mode", ["eager", "fake"])
@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "out", "packed"])
def test_dtype_errors(device, name, mode):
    tensors = {"input": make(INPUT, device=device), "weight": make(WEIGHT, device=device)}
    tensors |= {key: torch.zeros(6, device=device) for key in ("bias", "scale", "shift")}
    tensors |= {"out": torch.zeros(2, 6, 7, 6, device=device)}
    tensors |= {"packed": torch.ops.pyseg._atrous_conv2d_pack(tensors["weight"])}
    tensors[name] = tensors[name].double()
    if mode == "fake":
        fake_mode = torch._subclasses.FakeTensorMode()
        tensors = {key: fake_mode.from_tensor(value) for key, value in tensors.items()}
    with pytest.raises(RuntimeError, match=rf"^atrous_conv2d: {name} must (be|have) .*(dtype|float)"):
        atrous_conv2d(**tensors)


def test_packed_needs_dense(device):
    case = depthwise(1, 16, 5, 1)
    x, w = make(case.input_shape, device=device), make(case.weight_shape, device=device)
    packed = torch.zeros(1, 9, 16, 16) if device == "cpu" else torch.zeros(3, 3, 16, 16, device=device)
    with pytest.raises(RuntimeError, match="^atrous_conv2d: packed must be None"):
        atrous_conv2d(x, w, **case.geometry, packed=packed)


# ---- tf32 ----

SWITCHES = [
    "torch.backends.cudnn.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'none'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'none'",
    "torch.set_float32_matmul_precision('high')",
]


@pytest.fixture
def restored_switches():
    scopes = [("generic", "all"), ("cuda", "all"), ("cuda", "conv"), ("cuda", "rnn"), ("cuda", "matmul")]
    before = {scope: torch._C._get_fp32_precision_getter(*scope) for scope in scopes}
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for scope, value in before.items():
        torch._C._set_fp32_precision_setter(*scope, value)


def test_tf32_switches(restored_switches):
    """Whichever of them were set in whatever order, reading does not raise, and says what torch's own convolution does.

    torch raises where its old switch is read after new ones have been set; where it does not, it must agree.
    """
    agreed = 0
    for first, second in itertools.product(SWITCHES, repeat=2):
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = True
        exec(first)
        exec(second)
        allowed = op.cudnn_allows_tf32()
        assert isinstance(allowed, bool)
        if "cudnn.conv" in second and "none" not in second:
            assert allowed == ("tf32'" in second), (first, second)
        try:
            old = torch.backends.cudnn.allow_tf32
        except RuntimeError:
            continue
        assert allowed == old, (first, second)
        agreed += 1
    assert 0 < agreed < len(SWITCHES) ** 2


def test_tf32_inherits(restored_switches):
    torch.backends.cudnn.conv.fp32_precision = "none"
    torch.backends.cudnn.fp32_precision = "none"
    for value in ("tf32", "ieee"):
        torch.backends.fp32_precision = value
        assert op.cudnn_allows_tf32() == (value == "tf32")


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_reaches_the_kernel(device, allowed):
    """With tf32 the products lose 13 bits of mantissa on CUDA; without, and on the CPU, they don't."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    case = dense(1, 16, 6, 16, 1)
    x, w = make(case.input_shape, device=device, layout="channels_last"), make(case.weight_shape, device=device)
    y = atrous_conv2d(x, w, padding=1).cpu().double()
    expected = F.conv2d(x.cpu().double(), w.cpu().double(), padding=1)
    error = ((y - expected).abs().max() / expected.abs().max()).item()
    if device == "cuda" and allowed:
        assert 2e-5 < error < 2e-3
    else:
        assert error < 2e-5


# ---- registration ----

OPERATORS = ("atrous_conv2d", "atrous_conv2d_out", "_atrous_conv2d_backward", "_atrous_conv2d_pack")


def samples(device, dtype=torch.float32, requires_grad=True):
    """Arguments of the operators, by name: dense and depthwise, with and without optional tensors, both layouts."""
    for case, layout in ((dense(2, 3, 7, 5, 2), "channels_last"), (depthwise(1, 4, 6, 1), "contiguous")):
        x = make(case.input_shape, dtype, device, layout).requires_grad_(requires_grad)
        w = make(case.weight_shape, dtype, device, seed=1).requires_grad_(requires_grad)
        bias, scale, shift = (v.requires_grad_(requires_grad) for v in vectors(case.c_out, dtype, device).values())
        geometry = (list(case.padding), list(case.dilation), case.groups)
        grad = make((case.n, case.c_out, case.h, case.w), dtype, device, layout)
        packed = torch.ops.pyseg._atrous_conv2d_pack(w) if case.groups == 1 else None
        yield "atrous_conv2d", (x, w, bias, scale, shift, *geometry, True, False, False, packed)
        if case.groups == 1:
            yield "atrous_conv2d", (x, w, None, None, None, *geometry, False, True, False, None)
        plain = [None if t is None else t.detach() for t in (x, w, bias, scale, shift)]
        yield "atrous_conv2d_out", (*plain, *geometry, True, False, False, packed, grad.clone())
        for need in ((True, True), (True, False)):
            yield "_atrous_conv2d_backward", (grad, x, w, *geometry, False, False, *need)
        if case.groups == 1:
            yield "_atrous_conv2d_pack", (w,)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(device, name):
    chosen = [arguments for sample_name, arguments in samples(device) if sample_name == name]
    for arguments in chosen if device == "cpu" else chosen[:1]:
        torch.library.opcheck(getattr(torch.ops.pyseg, name).default, arguments)


@pytest.mark.parametrize("case", [dense(2, 3, 7, 5, 2), depthwise(2, 4, 6, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
def test_fake_kernels_tell_the_truth(device, case, layout, weight_layout):
    """Shape, dtype, strides: what a compiled graph relies on."""
    fake_mode = torch._subclasses.FakeTensorMode()
    x = make(case.input_shape, device=device, layout=layout)
    w = make(case.weight_shape, device=device, layout=weight_layout)
    grad = make((2, case.c_out, case.h, case.w), device=device, layout=layout)
    geometry = (case.padding, case.dilation, case.groups)

    def run(x, w, grad):
        yield torch.ops.pyseg.atrous_conv2d(x, w, None, None, None, *geometry, False, False, False, None)
        yield from torch.ops.pyseg._atrous_conv2d_backward(grad, x, w, *geometry, False, False, True, True)
        if case.groups == 1:
            yield torch.ops.pyseg._atrous_conv2d_pack(w)

    with fake_mode:
        fakes = list(run(*map(fake_mode.from_tensor, (x, w, grad))))
    for real, fake in zip(run(x, w, grad), fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert real.device.type == fake.device.type


# ---- autocast, inference mode, function transforms ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [dense(1, 5, 6, 7, 1), depthwise(1, 7, 6, 1)], ids=str)
def test_autocast(device, dtype, case):
    """All tensors in autocast's dtype, of whatever they were; parameters get gradients in their own."""
    x, w = make(case.input_shape, device=device), make(case.weight_shape, device=device).requires_grad_()
    more = vectors(case.c_out, torch.float32, device)
    packed = torch.ops.pyseg._atrous_conv2d_pack(w) if case.groups == 1 else None  # of float32: not used
    with torch.autocast(device, dtype):
        y = atrous_conv2d(x.to(dtype), w, **more, **case.geometry, relu=True, packed=packed)
        again = atrous_conv2d(x, w, **more, **case.geometry, relu=True)
    low = {name: value.to(dtype) for name, value in more.items()}
    expected = atrous_conv2d(x.to(dtype), w.detach().to(dtype), **low, **case.geometry, relu=True)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(again, expected)
    y.sum().backward()
    assert w.grad.dtype == torch.float32
    assert w.grad.any()


def test_autocast_leaves_float64_alone(device):
    """As for torch's conv2d."""
    x, w = make((1, 2, 5, 5), torch.float64, device), make((3, 2, 3, 3), torch.float64, device)
    with torch.autocast(device, torch.bfloat16):
        assert atrous_conv2d(x, w).dtype == torch.float64


def test_autocast_out(device):
    x, w = make((1, 2, 5, 5), device=device), make((3, 2, 3, 3), device=device)
    out = torch.empty(1, 3, 3, 3, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        atrous_conv2d(x, w, out=out)
        assert torch.equal(out, atrous_conv2d(x, w))


def test_autocast_disabled_inside(device):
    x, w = make((1, 2, 5, 5), device=device), make((3, 2, 3, 3), device=device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert atrous_conv2d(x, w).dtype == torch.float32


def test_inference_mode(device):
    for case in (dense(1, 3, 6, 5, 2), depthwise(1, 4, 6, 2)):
        x, w = make(case.input_shape, device=device), make(case.weight_shape, device=device)
        expected = atrous_conv2d(x, w, **case.geometry)
        with torch.inference_mode():
            y = atrous_conv2d(x, w, **case.geometry)
            out = torch.empty_like(expected)
            atrous_conv2d(x, w, **case.geometry, out=out)
            z = atrous_conv2d(make(case.input_shape, device=device), w, **case.geometry)
        assert y.is_inference()
        for result in (y, out, z):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("of", ["input", "weight", "bias", "scale", "shift"])
def test_forward_mode(device, of):
    torch.manual_seed(0)
    tensors = {"input": torch.randn(2, 3, 6, 5), "weight": torch.randn(4, 3, 3, 3)}
    tensors |= {name: torch.randn(4) for name in ("bias", "scale", "shift")}
    tensors = {name: t.double().to(device) for name, t in tensors.items()}
    tangent = torch.randn_like(tensors[of])

    def run(tensor):
        t = tensors | {of: tensor}
        return atrous_conv2d(t["input"], t["weight"], t["bias"], padding=1, scale=t["scale"], shift=t["shift"])

    # Multilinear in each: a central difference is exact but for rounding.
    expected = (run(tensors[of] + tangent) - run(tensors[of] - tangent)) / 2
    with torch.autograd.forward_ad.dual_level():
        dual = run(torch.autograd.forward_ad.make_dual(tensors[of], tangent))
        got = torch.autograd.forward_ad.unpack_dual(dual).tangent
        assert torch.autograd.forward_ad.unpack_dual(run(tensors[of])).tangent is None
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_vmap(device):
    x, w = make((6, 3, 7, 8), device=device), make((4, 3, 3, 3), device=device)
    images = x.view(3, 2, 3, 7, 8)
    y = torch.func.vmap(lambda x: atrous_conv2d(x, w, padding=1))(images)
    torch.testing.assert_close(y.flatten(0, 1), atrous_conv2d(x, w, padding=1))
    y = torch.func.vmap(lambda x: atrous_conv2d(x, w, padding=1), in_dims=1)(images)
    torch.testing.assert_close(y[1, 2], atrous_conv2d(images[2, 1], w, padding=1))
    weights = torch.stack([w, w * 2, w - 1])
    y = torch.func.vmap(lambda x, w: atrous_conv2d(x, w, padding=1))(images, weights)
    for index in range(3):
        torch.testing.assert_close(y[index], atrous_conv2d(images[index], weights[index], padding=1))


def test_function_transforms_that_need_torchs_help():
    """torch.func.grad takes no operator with Python autograd; it must say so, not go wrong."""
    w = make((4, 3, 3, 3))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: atrous_conv2d(x, w).sum())(make((1, 3, 5, 5)))


def test_no_tensor_of_its_own_keeps_the_graph_small():
    """Saved for backward: arguments and, only with ReLU, the output."""
    x, w = make((1, 3, 8, 8)).requires_grad_(), make((4, 3, 3, 3)).requires_grad_()
    for relu in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = atrous_conv2d(x, w, padding=1, relu=relu)
        pointers = {x.data_ptr(), w.data_ptr(), *([y.data_ptr()] if relu else [])}
        assert {t.data_ptr() for t in saved} == pointers


@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (2, 3, 5, 1), (1, 1, 5, 5), (3, 4, 1, 1)], ids=str)
def test_memory_format_is_torchs(shape):
    """Also for shapes whose strides could mean either format."""
    for layout, weight_layout in itertools.product(("contiguous", "channels_last"), repeat=2):
        x, w = make(shape, layout=layout), make((4, shape[1], 3, 3), layout=weight_layout)
        y, expected = (conv(x, w, padding=1) for conv in (atrous_conv2d, F.conv2d))
        assert y.stride() == expected.stride(), (layout, weight_layout)


def test_checks_are_not_vacuous():
    """The comparison that all value tests go through refuses a wrong result."""
    with pytest.raises(AssertionError, match="largest magnitude"):
        check(dense(1, 4, 6, 4, 1), bound=1e-12)


# ---- the shared copy in channels_last ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 7, 6), (3, 20, 4, 9), (2, 1, 3, 3), (2, 4, 1, 1), (0, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window", "transposed"])
def test_as_channels_last(device, dtype, shape, layout):
    x = make(shape, dtype, device, layout)
    copied = op.as_channels_last(x)
    assert torch.equal(copied, x)
    assert copied.is_contiguous(memory_format=torch.channels_last)
    assert (copied is x) == x.is_contiguous(memory_format=torch.channels_last)


def test_to_channels_last_is_registered():
    torch.library.opcheck(torch.ops.pyseg._to_channels_last.default, (make((2, 3, 4, 5)),))
    for input, message in (
        (torch.zeros(3, 4, 5), r"_to_channels_last: input must be \[N, C, H, W\], got \[3, 4, 5\]"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.float16), "_to_channels_last: input must be float32 or float64, got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pyseg._to_channels_last(input)
