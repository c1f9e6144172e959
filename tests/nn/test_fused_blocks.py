"""What blocks that run as a whole must notice: edits, hooks, other forwards, tracing. Against their own submodules."""

import copy
import gc
import weakref

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from blocks import assert_close, assert_ran, settle
from stand_ins import ASPPHead
from torch import nn

import pyseg
from pyseg.nn import ASPP, JPU, AtrousConv2d
from pyseg.reference.jpu import JPU as FastFCNJPU

CHANNELS = 64  # 3x3 weights larger than what is compared whole


def torchvision_aspp(channels=8, kind=None):
    deeplab = pytest.importorskip("torchvision").models.segmentation.deeplabv3
    torch.manual_seed(0)
    return settle((kind or deeplab.ASPP)(channels, (1, 2), channels))


def our_aspp(channels=8, **arguments):
    torch.manual_seed(0)
    return settle(ASPP(channels, (1, 2), channels, **arguments))


BLOCKS = {"ours": our_aspp, "torchvision": lambda *a, **k: pyseg.accelerate(torchvision_aspp(*a, **k))}
every_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)


def by_modules(block, x):
    return block.project(torch.cat([branch(x) for branch in block.convs], 1))


def image(channels=8, batch=2):
    return torch.randn(batch, channels, 7, 6, generator=torch.Generator().manual_seed(1))


def maps(channels=(3, 4, 6, 8)):
    torch.manual_seed(1)
    return [torch.randn(1, c, 2 * s, s) for c, s in zip(channels, (16, 8, 4, 2), strict=True)]


# ---- what is kept ----


def clear_block(block):
    block.clear_cache()


def clear_convolutions(block):
    for module in block.modules():
        if isinstance(module, AtrousConv2d):
            module.clear_cache()


@pytest.mark.parametrize(
    "clear",
    [clear_block, clear_convolutions, lambda block: block.train().eval(), lambda block: block.double().float()],
    ids=["clear_cache", "clear_cache of convolutions", "train", "_apply"],
)
@every_block
@torch.no_grad()
def test_forgets(make, clear):
    block, x = make(CHANNELS), image(CHANNELS)
    block(x)
    block.convs[1][0].weight.data[3, 5, 1, 1] += 100  # between the samples
    clear(block)
    assert_close(block(x), by_modules(block, x))


@torch.no_grad()
def test_jpu_forgets():
    jpu = settle(JPU((3, 4, 6, 8), CHANNELS))
    jpu(*maps())
    for conv in (jpu.dilation2[0].conv1, jpu.dilation1[0].pointwise):
        conv.weight.data[60, 0, 0, 0] += 100
    clear_convolutions(jpu)
    assert_close(jpu(*maps())[3], jpu._by_modules(*maps()[1:]))


@pytest.mark.parametrize("change", [lambda block: block.double(), lambda block: block.train()], ids=["double", "train"])
@every_block
def test_frees_packed_weights(make, change):
    block = make(CHANNELS)
    with torch.no_grad():
        block(image(CHANNELS))
    kept = [layer._packed._entry for layer in block._pyseg_fusion._folded.values()]
    packed = [weakref.ref(entry[2]) for entry in kept if entry is not None]
    assert packed
    del kept
    change(block)
    gc.collect()
    assert all(reference() is None for reference in packed)


@every_block
def test_keeps_nothing_on_cuda_after_gradients(make, device):
    """A fused optimiser counts no version, so neither does this edit."""
    block, x = make().to(device), image().to(device)
    loss = block(x).sum()
    with torch.no_grad():
        block(x)
    loss.backward()
    for parameter in block.parameters():
        parameter.data.mul_(1.5)
    with torch.no_grad():
        assert_close(block(x), by_modules(block, x), 2e-3)
        assert block._pyseg_fusion.is_in_use == (device == "cpu")
        block.train().eval()
        block(x)
        assert block._pyseg_fusion.is_in_use


@torch.no_grad()
def test_other_branches():
    block, x = our_aspp(), image()
    block(x)
    block.convs.insert(1, nn.Sequential(nn.Conv2d(8, 8, 3, padding=4, dilation=4), nn.BatchNorm2d(8), nn.ReLU()))
    block.project[0] = nn.Conv2d(40, 8, 1)
    settle(block)
    assert_close(block(x), by_modules(block, x))
    del block.convs[1:3]
    block.project[0] = nn.Conv2d(24, 8, 1)
    assert_close(block(x), by_modules(block, x))
    block.convs[-1][1], block.convs[-1][2] = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
    block.project[0] = nn.Conv2d(28, 8, 1)
    block.eval()
    assert_close(block(x), by_modules(block, x))


# ---- what must run ----


class AlwaysDropout(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p, True)


class Twice(nn.Identity):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("module", [AlwaysDropout(0.5), Twice()], ids=lambda module: type(module).__name__)
@every_block
@torch.no_grad()
def test_subclasses_run(make, module):
    block, x = make(), image()
    block.project[3] = module.eval()
    torch.manual_seed(2)
    expected = by_modules(block, x)
    torch.manual_seed(2)
    assert_close(block(x), expected)


@pytest.mark.parametrize("path", ["convs.1.0", "convs.1.1", "convs.1.2", "convs.1", "convs.3", "convs.3.0", "project"])
@every_block
@torch.no_grad()
def test_replaced_forwards_run(make, path):
    block, x = make(), image()
    before = block(x)
    module = block.get_submodule(path)
    forward = module.forward
    module.forward = lambda x: forward(x) * 3
    assert_close(block(x), by_modules(block, x))
    assert (block(x) - before).abs().max() > 1e-3


@every_block
@torch.no_grad()
def test_replaced_conv_forward_runs(make):
    block, x = make(), image()
    conv = block.convs[1][0]
    original = conv._conv_forward
    conv._conv_forward = lambda input, weight, bias: original(input, 3 * weight, bias)
    assert_close(block(x), by_modules(block, x))


@every_block
@torch.no_grad()
def test_global_hooks_see_all(make):
    block, x = make(), image()
    expected, seen = block(x), {}
    handle = nn.modules.module.register_module_forward_hook(lambda module, _, output: seen.update({module: output}))
    try:
        assert_close(block(x), expected)
    finally:
        handle.remove()
    assert set(block.modules()) - set(seen) <= {block.convs}
    conv, norm, _ = block.convs[1]
    conv = conv if isinstance(conv, nn.Conv2d) else conv[0]
    assert_close(seen[norm], F.batch_norm(seen[conv], norm.running_mean, norm.running_var, norm.weight, norm.bias))


@torch.no_grad()
def test_pooled_branch_of_another_kind():
    block, x = our_aspp(), image()
    kind = type(block.convs[-1])
    block.convs[-1].__class__ = type("Thrice", (kind,), {"forward": lambda self, x: 3 * kind.forward(self, x)})
    assert_close(block(x), by_modules(block, x))


@torch.no_grad()
def test_separable_convolution_of_another_kind():
    class SeparableConv2d(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            self.bn = nn.BatchNorm2d(channels)
            self.pointwise = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            return self.pointwise(F.relu(self.bn(self.conv1(x))))

    block, theirs, x = our_aspp(), torchvision_aspp(), image()
    for each in (block, theirs):
        each.convs[1][0] = SeparableConv2d(8)
        settle(each)
    assert_close(block(x), by_modules(block, x))
    expected = theirs(x)
    pyseg.accelerate(theirs)
    assert_close(theirs(x), expected)
    assert "than its modules suggest" in pyseg.report(theirs).rows[-1].reason


@pytest.mark.parametrize("mode", ["nearest", "bicubic"])
@torch.no_grad()
def test_jpu_with_another_interpolation(mode):
    jpu = pyseg.accelerate(settle(FastFCNJPU((3, 4, 6, 8), 8)))
    jpu(*maps())
    jpu.up_kwargs = {"mode": mode}
    assert_close(jpu(*maps())[3], FastFCNJPU.forward(jpu, *maps())[3])


@pytest.mark.parametrize("exact", [False, True])
@torch.no_grad()
def test_exact_of_a_convolution(exact):
    """Winograd makes NaN of a whole tile, the direct method of a window."""
    block = settle(ASPP(64, (1,), 64, image_pooling=False))
    x = torch.randn(1, 64, 32, 32)
    conv = block.convs[1][0]
    assert conv.plan(x.shape).path == "winograd"
    conv.exact = exact
    x[0, 0, 5, 5] = float("nan")
    got, expected = block(x).isnan(), by_modules(block, x).isnan()
    assert torch.equal(got, expected)
    assert (got.any(1).sum() == 9) == exact


# ---- a batch norm that the user has folded ----


def fold_second_branch(block):
    conv, norm, _ = block.convs[1]
    conv.fold_batch_norm(norm, True)
    block.convs[1][1], block.convs[1][2] = nn.Identity(), nn.Identity()
    return block


@torch.no_grad()
def test_folded_by_the_user():
    block, x = our_aspp(), image()
    expected = block(x)
    fold_second_branch(block)
    assert_close(block(x), expected)
    pyseg.accelerate(block)
    assert_close(block(x), expected)
    pyseg.restore(block)
    assert_close(block(x), expected)
    assert block.convs[1][0].folded_by_user


@torch.no_grad()
def test_folded_by_the_user_and_measured():
    block, x = fold_second_branch(our_aspp()), image()
    expected = block(x)
    pyseg.accelerate(block, x, rounds=1)
    assert_close(block(x), expected)
    assert_close(pyseg.restore(block)(x), expected)


# ---- tracing and transforms ----


@pytest.mark.parametrize("gradients", [False, True])
@every_block
def test_symbolic_trace(make, gradients):
    block, x = make(), image()
    expected = by_modules(block, x)
    with torch.set_grad_enabled(gradients):
        assert_close(torch.fx.symbolic_trace(block)(x), expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_symbolic_trace_of_jpu(gradients):
    jpu = settle(JPU((3, 4, 6, 8), 8))
    expected = jpu(*maps())[3]
    with torch.set_grad_enabled(gradients):
        assert_close(torch.fx.symbolic_trace(jpu)(*maps())[3], expected)


@every_block
@torch.no_grad()
def test_meta(make):
    block = make().to("meta")
    assert block(image().to("meta")).shape == (2, 8, 7, 6)


@torch.no_grad()
def test_meta_jpu():
    assert JPU((3, 4, 6, 8), 8).eval().to("meta")(*[x.to("meta") for x in maps()])[3].shape == (1, 32, 16, 8)


@every_block
def test_forward_mode(make):
    block, x = make().double().requires_grad_(False), image().double()
    tangent = torch.randn_like(x)
    step = 1e-6
    expected = (by_modules(block, x + step * tangent) - by_modules(block, x - step * tangent)) / (2 * step)
    with fw.dual_level():
        got = fw.unpack_dual(block(fw.make_dual(x, tangent))).tangent
    assert_close(got, expected, 1e-6)


# ---- accelerate ----


def residual_aspp():
    deeplab = pytest.importorskip("torchvision").models.segmentation.deeplabv3
    return torchvision_aspp(
        kind=type("ASPP", (deeplab.ASPP,), {"forward": lambda self, x: deeplab.ASPP.forward(self, x) + x})
    )


@pytest.mark.parametrize("measured", [False, True])
@torch.no_grad()
def test_other_forward_is_found_out(measured):
    block, x = residual_aspp(), image()
    expected = block(x)
    pyseg.accelerate(block, x if measured else None, rounds=1)
    row = pyseg.report(block).rows[-1]
    assert (row.original, row.became) == ("ASPP", "")
    assert row.reason.startswith("computes something else than its modules suggest: output is off by")
    assert_close(block(x), expected)


def test_the_check_leaves_no_traces():
    block = torchvision_aspp().train()
    seen, handles = [], [m.register_forward_hook(lambda *_: seen.append(1)) for m in block.modules()]
    before, state = copy.deepcopy(block.state_dict()), torch.get_rng_state()
    pyseg.accelerate(block)
    assert pyseg.report(block).rows[-1].became == "ASPP"
    assert not seen
    assert len(handles) == sum(len(m._forward_hooks) for m in block.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert block.training


@pytest.mark.parametrize("model", ["fits", "does not"])
@torch.no_grad()
def test_a_block_that_is_off_is_left_out(model, monkeypatch):
    """A block of too large an error spoils the model's outputs, but not accelerate."""
    from pyseg.nn._aspp_fusion import ASPPFusion

    block, x = torchvision_aspp(16), image(16)
    expected = block(x)
    compute = ASPPFusion.compute
    error = 0.0 if model == "fits" else 1e-3
    monkeypatch.setattr(
        ASPPFusion,
        "compute",
        lambda self, layers, x: compute(self, layers, x) * (1 + error * (x.dtype != torch.float64)),
    )
    messages = []
    monkeypatch.setattr("pyseg._accelerate.detection.Part.faster", True)
    pyseg.accelerate(block, x, rounds=1, progress=messages.append)
    reason = pyseg.report(block).rows[-1].reason
    assert ("its outputs must agree to 1.0e-04" in reason) == (model != "fits")
    assert_close(block(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_mmseg_inputs_are_transformed_once(training):
    class Counting(ASPPHead):
        calls = 0

        def _transform_inputs(self, inputs):
            self.calls += 1
            return super()._transform_inputs(inputs)

    Counting.__name__ = "ASPPHead"
    head = pyseg.accelerate(settle(Counting(8, 8, 5, dilations=(1, 2))).train(training))
    assert pyseg.report(head).rows[-1].became == "ASPP"
    with torch.no_grad():
        head([image()])
    assert head.calls == 1


@every_block
def test_still_runs_as_a_whole(make):
    assert_ran(make(), (image(),), absent=["aten::cat", "aten::batch_norm"])
