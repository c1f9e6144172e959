"""Dense 1x1 convolutions, which run on pyseg's kernels on the CPU in float32 and float64."""

import pytest
import torch
import torch.nn.functional as F
from conv2d_cases import LAYOUTS, check, check_backward, make, oracle, pointwise, vectors
from hypothesis import given
from hypothesis import strategies as st

from drawn import drawn_settings
from pyseg.functional import atrous_conv2d
from pyseg.functional.atrous_conv2d import why_torch
from pyseg.nn import AtrousConv2d

CASES = [pointwise(1, 19, 10, c_out) for c_out in (1, 2, 15, 16, 17, 31, 32, 33, 49)]
CASES += [pointwise(2, c_in, (3, 5), 20) for c_in in (1, 2, 15, 16, 17, 383, 384, 385, 769)]
CASES += [pointwise(n, 8, size, 18) for n in (1, 3) for size in ((1, 1), (1, 5), (7, 1), (4, 6), (11, 9), (14, 14))]
CASES += [pointwise(2, 7, (4, 6), 5, padding) for padding in (1, (0, 2), (3, 0))]
EPILOGUE = ("bias", "scale", "shift")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case):
    check(case, exact=True)
    check(case, layout="contiguous", packed=True, epilogue=EPILOGUE, relu=True, exact=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case):
    check_backward(case, exact=True)
    check_backward(case, layout="contiguous", dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    for weight_layout in ("contiguous", "channels_last", "transposed", "window", "every_other", "expanded"):
        check(pointwise(2, 6, (7, 8), 5), layout=layout, weight_layout=weight_layout, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_operator_in_16_bits(dtype):
    """The function leaves these to torch; the operator itself serves them as it does 3x3."""
    case = pointwise(2, 20, (5, 6), 9)
    x, weight = make(case.input_shape, dtype), make(case.weight_shape, dtype, seed=1)
    y = torch.ops.pyseg.atrous_conv2d(x, weight, None, None, None, [0, 0], [1, 1], 1, False, False, False, None)
    torch.testing.assert_close(y.double(), oracle(x, weight, case), rtol=2**-7, atol=1e-2)


@st.composite
def drawn(draw):
    size = (draw(st.integers(1, 13)), draw(st.integers(1, 13)))
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    case = pointwise(draw(st.integers(0, 3)), draw(st.integers(1, 20)), size, draw(st.integers(1, 40)))
    return case, stride, draw(st.sampled_from(LAYOUTS)), draw(st.booleans()), draw(st.sampled_from(["", "same"]))


@drawn_settings(150, 150, "cpu")
@given(drawn())
def test_strides_like_torch(arguments):
    """Values, gradients and memory format of every stride, with the epilogue."""
    case, stride, layout, relu, padding = arguments
    padding = 0 if stride != (1, 1) or not padding else padding
    x, weight = make(case.input_shape, torch.float64, layout=layout), make(case.weight_shape, torch.float64, seed=1)
    more = vectors(case.c_out, torch.float64, "cpu")
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, *more.values())]
    y = atrous_conv2d(*inputs[:3], stride, padding, scale=inputs[3], shift=inputs[4], relu=relu)
    again = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    expected = F.conv2d(*again[:3], stride, padding) * again[3][:, None, None] + again[4][:, None, None]
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, want = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, again, grad)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    case = pointwise(2, 3, (3, 4), 2, (1, 0))
    x, weight = (make(shape, torch.float64).requires_grad_() for shape in (case.input_shape, case.weight_shape))
    assert torch.autograd.gradcheck(lambda x, w: atrous_conv2d(x, w, padding=(1, 0), relu=True), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: atrous_conv2d(x, w, stride=2), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: atrous_conv2d(x, w, padding=(1, 0)), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: atrous_conv2d(x, w, stride=(2, 1)), (x, weight))


def test_opcheck():
    for layout in ("contiguous", "channels_last"):
        x = make((2, 5, 4, 6), layout=layout).requires_grad_()
        weight = make((7, 5, 1, 1), seed=1).requires_grad_()
        geometry = ([0, 1], [1, 1], 1)
        packed = torch.ops.pyseg._atrous_conv2d_pack(weight)
        torch.library.opcheck(
            torch.ops.pyseg.atrous_conv2d.default, (x, weight, None, None, None, *geometry, True, False, False, packed)
        )
        grad = make((2, 7, 4, 8), seed=2)
        torch.library.opcheck(
            torch.ops.pyseg._atrous_conv2d_backward.default, (grad, x, weight, *geometry, False, False, True, True)
        )
        torch.library.opcheck(torch.ops.pyseg._atrous_conv2d_pack.default, (weight,))


@pytest.mark.parametrize("stride", [1, 2])
def test_out_into_channel_slice(stride):
    x, weight = make((2, 9, 8, 7), layout="channels_last"), make((6, 9, 1, 1), seed=1)
    expected = F.conv2d(x, weight, stride=stride)
    big = torch.full((2, 11, *expected.shape[2:]), 7.0).to(memory_format=torch.channels_last)
    atrous_conv2d(x, weight, stride=stride, out=big[:, 3:9])
    torch.testing.assert_close(big[:, 3:9], expected, rtol=1e-5, atol=1e-5)
    assert (big[:, :3] == 7).all()
    assert (big[:, 9:] == 7).all()


@pytest.mark.parametrize("shape", [(5, 3, 1, 1), (16, 7, 1, 1), (33, 2, 1, 1), (0, 4, 1, 1), (4, 0, 1, 1)], ids=str)
def test_pack(shape):
    weight = make(shape)
    packed = torch.ops.pyseg._atrous_conv2d_pack(weight)
    assert packed.shape == ((shape[0] + 15) // 16, 1, shape[1], 16)
    rows = packed[:, 0].transpose(1, 2).flatten(0, 1)
    assert torch.equal(rows[: shape[0]], weight[:, :, 0, 0])
    assert (rows[shape[0] :] == 0).all()


@pytest.mark.parametrize("mode", ["eager", "fake"])
def test_errors(mode):
    x, weight = torch.ones(2, 4, 9, 8), torch.ones(6, 5, 1, 1)
    square, depthwise = torch.ones(6, 4, 1, 3), torch.ones(4, 1, 1, 1)
    packed = torch.ones(1, 9, 4, 16)
    if mode == "fake":
        fake = torch._subclasses.FakeTensorMode()
        x, weight, square, depthwise, packed = map(fake.from_tensor, (x, weight, square, depthwise, packed))
    rest = (None, None, None, [0, 0], [1, 1])
    with pytest.raises(RuntimeError, match=r"^atrous_conv2d: weight must be .*1, 1\].*got \[6, 5, 1, 1\]"):
        atrous_conv2d(x, weight)
    with pytest.raises(RuntimeError, match=r"weight must be .*3, 3\] or \[C_out, C_in, 1, 1\], got \[6, 4, 1, 3\]"):
        torch.ops.pyseg.atrous_conv2d(x, square, *rest, 1, False, False, False, None)
    with pytest.raises(RuntimeError, match=r"weight must be \[.*, 1, 3, 3\] for .*groups.*got \[4, 1, 1, 1\]"):
        torch.ops.pyseg.atrous_conv2d(x, depthwise, *rest, 4, False, False, False, None)
    with pytest.raises(RuntimeError, match=r"packed must be .*1, 1, 4, 16.*got \[1, 9, 4, 16\]"):
        atrous_conv2d(x, torch.ones(6, 4, 1, 1) if mode == "eager" else x.new_ones(6, 4, 1, 1), packed=packed)


def test_autocast_is_torchs():
    x, weight = make((1, 4, 5, 5)), make((6, 4, 1, 1), seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert why_torch(weight, (1, 1), (0, 0), 1, 4, x.dtype, "cpu") == "1x1 in 16 bits is a plain matrix product"
        y = atrous_conv2d(x, weight)
        module = AtrousConv2d(4, 6, 1).eval()
        with torch.no_grad():
            assert module(x).dtype == torch.bfloat16
            assert module._packed_weight(module.weight) is None
    assert y.dtype == torch.bfloat16
    assert not why_torch(weight, (1, 1), (0, 0), 1, 4, x.dtype, "cpu")


def test_same_bits_for_every_number_of_threads():
    x, weight = make((2, 700, 17, 19), layout="channels_last"), make((80, 700, 1, 1), seed=1)
    grad = make((2, 80, 17, 19), layout="channels_last", seed=2)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gradients = torch.ops.pyseg._atrous_conv2d_backward(
                grad, x, weight, [0, 0], [1, 1], 1, False, False, True, True
            )
            results.append((atrous_conv2d(x, weight), *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)
