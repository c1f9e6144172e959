"""First and higher derivatives of atrous_conv2d."""

import pytest
import torch
from conv2d_cases import DTYPES, check_backward, dense, depthwise, make, oracle, vectors
from test_atrous_conv2d import CHANNELS, DEPTHWISE, LARGE, PADDINGS, PHASES, ROWS, WINDOWS

from pyseg.functional import atrous_conv2d

# Every tap has its turn. The third and the last: padding above 2 * dilation, which crops the gradient.
SMALL = [
    dense(2, 2, (3, 4), 3, 1),
    dense(1, 2, (4, 3), 2, (2, 1), (1, 0)),
    dense(1, 2, (2, 3), 2, 1, (3, 4)),
    depthwise(2, 2, (3, 4), 1),
    depthwise(1, 2, (3, 2), (1, 2), (4, 5)),
]


def differentiable(case, device="cpu", layout="contiguous", dtype=torch.float64):
    tensors = [make(case.input_shape, dtype, device, layout), make(case.weight_shape, dtype, device, layout, seed=1)]
    tensors += vectors(case.c_out, dtype, device).values()
    return [tensor.detach().requires_grad_() for tensor in tensors]


def function(case, relu=True):
    def call(input, weight, bias=None, scale=None, shift=None):
        return atrous_conv2d(input, weight, bias, scale=scale, shift=shift, relu=relu, **case.geometry)

    return call


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device, case, layout):
    inputs = differentiable(case, device, layout)
    assert torch.autograd.gradcheck(function(case), inputs, fast_mode=device == "cuda")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case):
    assert torch.autograd.gradgradcheck(function(case, relu=False), differentiable(case)[:2])
    assert torch.autograd.gradgradcheck(function(case), differentiable(case), fast_mode=True)


def test_gradgradcheck_cuda(device):
    for case in (SMALL[0], SMALL[3]):
        assert torch.autograd.gradgradcheck(function(case), differentiable(case, device), fast_mode=True)


def test_third_derivative():
    """The derivative of the derivative of the backward is again made of the operators."""
    case = dense(1, 1, 3, 1, 1)
    x, w = differentiable(case)[:2]
    (g,) = torch.autograd.grad(function(case, relu=False)(x, w).square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), w, create_graph=True)
    (ggg,) = torch.autograd.grad(gg.square().sum(), w)

    x2, w2 = (t.detach().clone().requires_grad_() for t in (x, w))
    (g2,) = torch.autograd.grad(torch.nn.functional.conv2d(x2, w2, padding=1).square().sum(), x2, create_graph=True)
    (gg2,) = torch.autograd.grad(g2.square().sum(), w2, create_graph=True)
    torch.testing.assert_close(ggg, torch.autograd.grad(gg2.square().sum(), w2)[0])


@pytest.mark.parametrize(
    "case", [*PHASES[::2], *WINDOWS, *PADDINGS, *CHANNELS[::2], *ROWS[::3], *DEPTHWISE[::2]], ids=str
)
def test_backward(case):
    check_backward(case)
    check_backward(case, layout="contiguous", exact=True)


@pytest.mark.parametrize("case", [*LARGE[::3], dense(1, 600, 17, 300, 4)], ids=str)
def test_backward_large(case):
    check_backward(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [dense(2, 20, (9, 7), 17, (2, 3)), depthwise(2, 19, (9, 7), (2, 3))], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window"])
def test_backward_dtypes(device, case, dtype, layout):
    check_backward(case, dtype=dtype, device=device, layout=layout)


@pytest.mark.parametrize("case", [*PADDINGS[1::4], dense(3, 4, (1, 1), 5, 1), dense(1, 3, 20, 4, 7)], ids=str)
def test_backward_devices(device, case):
    check_backward(case, device=device)


@pytest.mark.parametrize(
    "case", [dense(0, 3, 5, 4, 1), depthwise(0, 3, 5, 1), dense(2, 3, 4, 5, 2, 0), dense(1, 0, 4, 2, 1)], ids=str
)
def test_backward_of_nothing(device, case):
    """Gradients of an empty output, and towards an empty input, are zeros of the right shape."""
    x, w, b, s, t = differentiable(case, device)
    function(case)(x, w, b, s, t).sum().backward()
    for tensor in (x, w):
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
def test_backward_computes_what_is_needed(device, need):
    case = dense(1, 3, 5, 4, 1)
    x, w = make(case.input_shape, device=device), make(case.weight_shape, device=device)
    grad = make((1, 4, 5, 5), device=device)
    results = torch.ops.pyseg._atrous_conv2d_backward(grad, x, w, (1, 1), (1, 1), 1, False, False, *need)
    for result, needed, like in zip(results, need, (x, w), strict=True):
        assert result.shape == (like.shape if needed else (0,))


@pytest.mark.parametrize("case", [dense(1, 3, 6, 4, 2), depthwise(1, 4, 6, 2)], ids=str)
@pytest.mark.parametrize("index", range(5), ids=["input", "weight", "bias", "scale", "shift"])
def test_gradient_of_one_argument(device, case, index):
    """Each gradient alone, as when all other arguments are frozen."""
    tensors = [tensor.detach().float() for tensor in differentiable(case, device)]
    tensors[index].requires_grad_()
    names = ("bias", "scale", "shift")
    function(case)(*tensors).square().sum().backward()
    wide = [tensor.detach().cpu().double() for tensor in tensors]
    wide[index].requires_grad_()
    x, w, *more = wide
    oracle_of = torch.nn.functional.conv2d(x, w, **case.geometry)
    bias, scale, shift = (dict(zip(names, more, strict=True))[name].view(-1, 1, 1) for name in names)
    ((oracle_of + bias) * scale + shift).relu().square().sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [i != index for i in range(5)]
    torch.testing.assert_close(tensors[index].grad.cpu().double(), wide[index].grad, rtol=1e-4, atol=1e-4)


def test_gradient_of_relu_at_zero_and_nan():
    """Like torch: no gradient at zero, a gradient through NaN."""
    case = dense(1, 1, 3, 1, 1)
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    w = torch.ones(1, 1, 3, 3)
    function(case)(x, w).sum().backward()
    assert not x.grad.any()
    y = torch.full((1, 1, 3, 3), float("nan"), requires_grad=True)
    function(case)(y, w).sum().backward()
    assert y.grad[0, 0, 1, 1] == 9


def test_gradient_from_expanded_and_strided_grad(device):
    """sum() hands an expanded scalar to the backward, a transposed loss a transposed gradient."""
    case = dense(2, 3, (5, 6), 4, 1)
    x, w = (tensor.float().detach().requires_grad_() for tensor in differentiable(case, device)[:2])
    factor = make((2, 4, 6, 5), device=device)
    output = function(case, relu=False)(x, w)
    (output.sum() + (output.transpose(2, 3) * factor).sum()).backward()
    expected_grad = (1 + factor.transpose(2, 3)).cpu().double()
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in (x, w)]
    gradients = torch.autograd.grad(oracle(*wide, case), wide, expected_grad)
    for got, want in zip((x.grad, w.grad), gradients, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-4)


def test_out_refuses_gradients(device):
    case = dense(1, 2, 4, 3, 1)
    x, w = (tensor.float().detach().requires_grad_() for tensor in differentiable(case, device)[:2])
    out = torch.empty(1, 3, 4, 4, device=device)
    for kernel in (w, w[..., :1, :1]):  # our operator, torch's
        with pytest.raises(RuntimeError, match="out does not support automatic differentiation"):
            atrous_conv2d(x, kernel, padding=kernel.shape[-1] // 2, out=out)
    with torch.no_grad():
        atrous_conv2d(x, w, padding=1, out=out)


def test_out_counts_as_a_write(device):
    """Autograd notices that a tensor which it has saved was overwritten."""
    y = make((1, 3, 4, 4), device=device).requires_grad_()
    z = y.exp()
    loss = z.square().sum()
    with torch.no_grad():
        atrous_conv2d(make((1, 2, 4, 4), device=device), make((3, 2, 3, 3), device=device), padding=1, out=z.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_packed_weight_gets_no_gradient(device):
    case = dense(1, 2, 4, 3, 1)
    x, w = (tensor.float().detach().requires_grad_() for tensor in differentiable(case, device)[:2])
    packed = torch.ops.pyseg._atrous_conv2d_pack(w)
    assert not packed.requires_grad
    atrous_conv2d(x, w, padding=1, packed=packed).sum().backward()
    plain = torch.autograd.grad(atrous_conv2d(x, w, padding=1).sum(), w)[0]
    torch.testing.assert_close(w.grad, plain)
