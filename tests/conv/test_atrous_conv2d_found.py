"""Bugs that were found after the other tests passed: one test each."""

import pytest
import torch
import torch.nn.functional as F
from conv2d_cases import make

from pyseg.functional import atrous_conv2d
from pyseg.nn import AtrousConv2d


@pytest.mark.parametrize("exact", [False, True])
def test_epilogue_where_no_tap_is_inside_and_channels_are_many(device, exact):
    """The direct path sums many channels in steps; it ended before the last step, which applies the epilogue."""
    x, w = make((1, 385, 4, 4), device=device), make((3, 385, 3, 3), device=device)
    bias = torch.tensor([1.0, -2.0, 3.0], device=device)
    y = atrous_conv2d(x, w, bias, padding=3, relu=True, exact=exact)
    expected = F.conv2d(x.cpu(), w.cpu(), bias.cpu(), padding=3).relu()
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-3)
    assert y[0, :, 0, 0].tolist() == [1, 0, 3]


def test_autocast_does_not_write_into_a_copy_of_out(device):
    x, w = make((1, 2, 5, 5), device=device), make((3, 2, 3, 3), device=device)
    out = torch.empty(1, 3, 3, 3, device=device)
    with torch.autocast(device, torch.bfloat16), pytest.raises(RuntimeError, match="out must"):
        atrous_conv2d(x, w, out=out)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [2**62, 1844674407370955162, 2**31], ids=str)
def test_sizes_that_would_overflow(groups, size):
    x, w = make((1, 2, 5, 5)), make((2, 2 // groups, 3, 3))
    with pytest.raises(RuntimeError, match="2\\^29|too small"):
        torch.ops.pyseg.atrous_conv2d(x, w, None, None, None, [1, size], [1, size], groups, False, False, False, None)


def test_gradients_in_half_precision_with_a_small_scale(device):
    """The gradient of the bare convolution is out of float16's range; what the scale makes of it is not."""
    x = torch.full((1, 8, 60, 60), 40.0, dtype=torch.float16, device=device)
    w = torch.full((8, 1, 3, 3), 0.5, dtype=torch.float16, device=device, requires_grad=True)
    scale = torch.full((8,), 0.01, dtype=torch.float16, device=device)
    y = atrous_conv2d(x, w, scale=scale, padding=1, groups=8)
    (grad,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert grad[0, 0, 1, 1].item() == pytest.approx(40 * 3600 * float(scale[0]), rel=2e-3)


def test_expanded_weight_in_the_module():
    conv = AtrousConv2d(64, 64, 3, padding=1).eval()
    conv.weight = torch.nn.Parameter(torch.randn(64, 1, 1, 1).expand(64, 64, 3, 3), requires_grad=False)
    x = make((1, 64, 6, 6))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_depthwise_weight_gradient_ignores_what_lies_beyond_the_row(value):
    x, g = make((1, 1, 7, 13)), make((1, 1, 7, 13), seed=1)
    x[0, 0, 1, -1] = value
    args = ([2, 2], [2, 2], 1, True, False, False, True)
    w = make((1, 1, 3, 3))
    grad = torch.ops.pyseg._atrous_conv2d_backward(g, x, w, *args)[1]
    expected = torch.autograd.grad(F.conv2d(x, w.requires_grad_(), padding=2, dilation=2), w, g)[0]
    assert torch.equal(grad.isfinite(), expected.isfinite())


def test_meta_module_with_a_folded_batch_norm():
    conv = AtrousConv2d(4, 4, 3, padding=1, device="meta").eval()
    conv.fold_batch_norm(torch.nn.BatchNorm2d(4, device="meta").eval(), relu=True)
    with torch.no_grad():
        for _ in range(2):
            assert conv(torch.empty(1, 4, 5, 5, device="meta")).shape == (1, 4, 5, 5)


def test_out_that_overlaps():
    x, w = make((1, 8, 5, 5)), make((8, 8, 3, 3))
    for out in (torch.empty(100).as_strided((1, 8, 5, 5), (1, 1, 1, 1)), x):
        with pytest.raises(RuntimeError, match="out must not"):
            atrous_conv2d(x, w, padding=1, out=out)


def test_plan_without_taps():
    assert AtrousConv2d(8, 8, 3, dilation=8, padding=8).plan((1, 8, 1, 1)).details["speedup"] > 0
