"""pyseg.nn.JPU against a stand-in of FastFCN's."""

import copy
import pickle

import pytest
import torch
from blocks import assert_close, assert_ran, settle
from torch import nn

from pyseg.nn import JPU, checkpoints
from pyseg.reference.jpu import JPU as FastFCNJPU

CHANNELS = (3, 4, 6, 8)


def maps(batch=1, size=(8, 12), device="cpu"):
    """Strides 4, 8, 16, 32; the coarse ones not exactly halves."""
    torch.manual_seed(1)
    height, width = size
    sizes = [(2 * height, 2 * width), (height, width), (-(-height // 2), -(-width // 2)), (-(-height // 4), width // 4)]
    return [torch.randn(batch, c, *size).to(device) for c, size in zip(CHANNELS, sizes, strict=True)]


@pytest.fixture
def pair():
    """FastFCN's module and ours with the same parameters, in eval mode."""
    torch.manual_seed(0)
    theirs, ours = settle(FastFCNJPU(CHANNELS, 8)), JPU(CHANNELS, 8)
    ours.load_state_dict(checkpoints.jpu_from_fastfcn(nn.ModuleDict({"jpu": theirs}).state_dict()))
    return theirs, ours.eval()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("batch", "size"), [(1, (8, 12)), (3, (9, 7)), (1, (1, 4))])
def test_eval(pair, batch, size, channels_last):
    theirs, ours = pair
    inputs = maps(batch, size)
    if channels_last:
        inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    *_, expected = theirs(*inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = ours(*inputs)
            assert_close(outputs[3], expected)
    assert len(outputs) == 4
    assert all(a is b for a, b in zip(outputs[:3], inputs[:3], strict=True))
    assert_close(ours(*inputs)[3], expected)  # with gradients: module by module
    assert_ran(ours, inputs, ["pyseg::atrous_conv2d"], ["aten::batch_norm"])


def test_three_maps(pair):
    theirs, ours = pair
    inputs = maps()[1:]
    with torch.no_grad():
        assert_close(ours(*inputs)[3], theirs(*inputs)[3])
    with pytest.raises(ValueError, match="JPU: inputs must be at least three maps, got 2"):
        ours(*inputs[:2])
    with pytest.raises(ValueError, match=r"JPU: in_channels must be at least three, got \[8, 8\]"):
        JPU([8, 8])


def test_cuda(device):
    torch.manual_seed(0)
    ours = settle(JPU(CHANNELS, 8))
    inputs = maps(2, (4, 6))
    with torch.no_grad():
        *_, expected = ours.double()(*[x.double() for x in inputs])
    ours = ours.float().to(device)
    inputs = [x.to(device) for x in inputs]
    with torch.no_grad():
        assert_close(ours(*inputs)[3], expected.float(), 2e-3)
    assert_close(ours(*inputs)[3], expected.float(), 2e-3)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_gradients(pair, training):
    results = []
    for module in pair:
        module.train(training)
        leaves = [x.requires_grad_() for x in maps(2)]
        *_, y = module(*leaves)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        loss.backward()
        results.append((loss, [x.grad for x in leaves[1:]], [p.grad for p in module.parameters()]))
    (loss, of_inputs, of_theirs), (our_loss, our_inputs, of_ours) = results
    assert_close(our_loss, loss, 1e-3)
    for a, b in zip(our_inputs, of_inputs, strict=True):
        assert_close(a, b, 1e-3)
    scale = max(g.abs().max() for g in of_theirs)
    for a, b in zip(of_ours, of_theirs, strict=True):
        assert (a - b).abs().max() <= 1e-3 * max(b.abs().max(), 1e-2 * scale)
    if training:
        for a, b in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_edits_are_noticed():
    ours = settle(JPU(CHANNELS, 8))
    inputs = maps()
    for edit in (
        lambda: ours.conv4[1].running_var.mul_(2),
        lambda: ours.dilation2[0].conv1.weight.mul_(1.5),
        lambda: ours.dilation3[0].bn.bias.add_(0.5),
        lambda: setattr(ours.dilation1[0].pointwise, "weight", nn.Parameter(torch.ones(8, 24, 1, 1))),
        lambda: setattr(ours, "dilation4", copy.deepcopy(ours.dilation1)),
    ):
        before = ours(*inputs)[3]
        edit()
        got = ours(*inputs)[3]
        assert (before - got).abs().max() > 1e-3
        assert_close(got, ours._by_modules(*inputs[1:]))


@torch.no_grad()
def test_copies_and_pickles():
    ours = settle(JPU(CHANNELS, 8))
    inputs = maps()
    expected = ours(*inputs)[3]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(*inputs)[3], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes(pair, dtype):
    theirs, ours = pair
    expected = theirs.double()(*[x.double() for x in maps()])[3]
    got = ours.to(dtype)(*[x.to(dtype) for x in maps()])[3]
    assert got.dtype == dtype
    assert_close(got.double(), expected, {torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype])


@torch.no_grad()
def test_autocast(pair):
    theirs, ours = pair
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = theirs(*maps())[3], ours(*maps())[3]
    assert got.dtype == expected.dtype
    assert_close(got.float(), expected.float(), 5e-2)


def test_compile_and_export(pair):
    torch._dynamo.reset()
    theirs, ours = pair
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, size in ((1, (8, 12)), (2, (9, 7))):
            inputs = maps(batch, size)
            assert_close(compiled(*inputs)[3], theirs(*inputs)[3])
        program = torch.export.export(ours, tuple(inputs))
        assert_close(program.module()(*inputs)[3], theirs(*inputs)[3])
