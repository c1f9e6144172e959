"""pyseg.nn.ASPP and ASPPSum against torchvision, segmentation-models-pytorch and stand-ins of mmsegmentation."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from blocks import assert_close, assert_ran, settle
from stand_ins import ASPPHead, DepthwiseSeparableASPPHead
from torch import nn

import pyseg
from pyseg.nn import ASPP, ASPPSum, checkpoints


def torchvision_aspp(rates=(2, 3, 5)):
    deeplab = pytest.importorskip("torchvision").models.segmentation.deeplabv3
    return deeplab.ASPP(6, rates, 8), ASPP(6, rates, 8), checkpoints.aspp_from_torchvision


def smp_aspp(separable):
    decoder = pytest.importorskip("segmentation_models_pytorch.decoders.deeplabv3.decoder")
    theirs = decoder.ASPP(6, 8, (2, 3, 5), separable=separable, dropout=0.5)
    return theirs, ASPP(6, (2, 3, 5), 8, separable=separable), checkpoints.aspp_from_smp


class Features(nn.Module):
    """An mmsegmentation head's features, as a module of its own that takes one map."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head._forward_feature([x])


def mmseg_aspp(separable):
    head = DepthwiseSeparableASPPHead if separable else ASPPHead
    theirs = Features(head(6, 8, 3, dilations=(1, 2, 3)))
    ours = ASPP(6, (2, 3), 8, separable=separable, separable_norm=separable, project_kernel_size=3, dropout=0.0)
    return theirs, ours, lambda state: checkpoints.aspp_from_mmseg(state, "head.")


PEERS = {
    "torchvision": torchvision_aspp,
    "torchvision, five rates": lambda: torchvision_aspp((1, 2, 3, 4, 6)),
    "smp": lambda: smp_aspp(False),
    "smp separable": lambda: smp_aspp(True),
    "mmseg": lambda: mmseg_aspp(False),
    "mmseg separable": lambda: mmseg_aspp(True),
}


def pair(peer):
    """Their module and ours with the same parameters, in eval mode."""
    torch.manual_seed(0)
    theirs, ours, convert = PEERS[peer]()
    settle(theirs)
    ours.load_state_dict(convert(theirs.state_dict()))
    return theirs, ours.eval()


UNFUSED = ("aten::cat", "aten::batch_norm", "aten::upsample_bilinear2d", "aten::dropout")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_eval(peer, channels_last):
    theirs, ours = pair(peer)
    for shape in ((1, 6, 9, 11), (3, 6, 7, 5), (2, 6, 3, 3)):
        x = torch.randn(shape)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        expected = theirs(x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = ours(x)
                assert_close(got, expected)
                assert got.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert_close(ours(x), expected)  # with gradients: module by module
    assert_ran(ours, (torch.randn(2, 6, 9, 11),), absent=UNFUSED)


@pytest.mark.parametrize("peer", ["torchvision", "mmseg", "mmseg separable"])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2), (2, 7)])
def test_small_maps(peer, size):
    theirs, ours = pair(peer)
    x = torch.randn(2, 6, *size)
    with torch.no_grad():
        assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("separable", [False, True])
def test_cuda(device, separable):
    torch.manual_seed(0)
    ours = settle(ASPP(8, (1, 2), 8, separable=separable))
    x = torch.randn(2, 8, 6, 7)
    expected = ours.double()(x.double()).float()
    ours = ours.float().to(device)
    with torch.no_grad():
        assert_close(ours(x.to(device)), expected, 2e-3)
    assert_close(ours(x.to(device)), expected, 2e-3)


def test_empty_batch():
    with torch.no_grad():
        assert ASPP(6, (2, 3), 8).eval()(torch.empty(0, 6, 5, 5)).shape == (0, 8, 5, 5)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_gradients(peer, training):
    theirs, ours = pair(peer)
    for module in (theirs, ours):
        module.train(training)
        for dropout in module.modules():
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.0
    x = torch.randn(3, 6, 9, 8)
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append((loss, leaf.grad, gradients))
    (loss, of_input, of_theirs), (our_loss, our_input, of_ours) = results
    assert_close(our_loss, loss, 1e-3)
    assert_close(our_input, of_input, 1e-3)
    _, _, convert = PEERS[peer]()
    # A state_dict of gradients goes through the key map like one of parameters.
    expected = convert(of_theirs)
    assert expected.keys() == of_ours.keys()
    scale = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (of_ours[name] - gradient).abs().max() <= 1e-3 * max(gradient.abs().max(), 1e-2 * scale), name
    if training:
        state = convert(theirs.state_dict())
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)


def test_state_dict_is_torchvisions():
    theirs, ours = pair("torchvision")
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    theirs.load_state_dict(ours.state_dict())


def test_checkpoints_of_whole_models():
    smp = pytest.importorskip("segmentation_models_pytorch")
    arguments = {"encoder_weights": None, "decoder_channels": 16}
    v3 = smp.DeepLabV3("resnet18", **arguments)
    ASPP(512, (12, 24, 36), 16).load_state_dict(checkpoints.aspp_from_smp(v3.state_dict(), "decoder.aspp."))
    plus = smp.DeepLabV3Plus("resnet18", **arguments)
    separable = ASPP(512, (12, 24, 36), 16, separable=True)
    separable.load_state_dict(checkpoints.aspp_from_smp(plus.state_dict(), "decoder.aspp.0."))


def test_checkpoint_errors():
    with pytest.raises(ValueError, match="aspp_from_smp: prefix must begin some keys of state_dict, got 'x'"):
        checkpoints.aspp_from_smp({}, "x")
    with pytest.raises(ValueError, match="aspp_from_mmseg: state_dict must have aspp_modules and image_pool"):
        checkpoints.aspp_from_mmseg({"conv.weight": torch.zeros(1)})
    head = ASPPHead(4, 4, 2, dilations=(2, 3))
    with pytest.raises(ValueError, match="first dilation must be 1"):
        checkpoints.aspp_from_mmseg(head.state_dict())
    head = ASPPHead(4, 4, 2, dilations=(1, 3))
    state = {key.replace(".bn.", ".gn."): value for key, value in head.state_dict().items()}
    with pytest.raises(ValueError, match="aspp_from_mmseg: state_dict must have .* batch norms alone, got a 'gn'"):
        checkpoints.aspp_from_mmseg(state)


def test_argument_errors():
    with pytest.raises(ValueError, match="ASPP: project_kernel_size must be 1 or 3, got 5"):
        ASPP(4, (2,), project_kernel_size=5)
    with pytest.raises(ValueError, match="ASPP: separable_norm must be False"):
        ASPP(4, (2,), separable_norm=True)


def test_without_image_pooling():
    ours = settle(ASPP(6, (2, 3), 8, image_pooling=False))
    x = torch.randn(2, 6, 9, 8)
    expected = ours(x)
    with torch.no_grad():
        assert_close(ours(x), expected)
    assert_ran(ours, (x,), ["pyseg::atrous_conv2d_out"], UNFUSED)


def test_other_norms_run_by_modules():
    ours = ASPP(6, (2, 3), 8, norm_layer=lambda channels: nn.GroupNorm(2, channels)).eval()
    x = torch.randn(2, 6, 9, 8)
    expected = ours(x)
    with torch.no_grad():
        assert_close(ours(x), expected)
    assert_ran(ours, (x,), ["aten::group_norm", "aten::cat"])


# ---- what is kept between calls ----


def edit_statistics(module):
    module.convs[1][1].running_mean.add_(0.5)


def edit_weight_in_place(module):
    module.convs[1][0].weight.mul_(1.5)


def edit_projection(module):
    module.project[0].weight.data = module.project[0].weight.data * 0.5


def edit_pooled(module):
    module.convs[-1][1].weight.add_(0.1)


def replace_branch(module):
    module.convs[1] = settle(nn.Sequential(nn.Conv2d(6, 8, 1, bias=True), nn.BatchNorm2d(8), nn.ReLU()))


def remove_relu(module):
    module.convs[1][2] = nn.Identity()


def change_rate(module):
    module.convs[1][0].dilation = module.convs[1][0].padding = (4, 4)


@pytest.mark.parametrize(
    "edit",
    [
        edit_statistics,
        edit_weight_in_place,
        edit_projection,
        edit_pooled,
        replace_branch,
        remove_relu,
        change_rate,
    ],
)
@torch.no_grad()
def test_edits_are_noticed(edit):
    ours = settle(ASPP(6, (2, 3), 8))
    x = torch.randn(2, 6, 9, 8)
    before = ours(x)
    edit(ours)
    got = ours(x)
    expected = F.relu(ours.project(torch.cat([branch(x) for branch in ours.convs], 1)))
    assert (before - expected).abs().max() > 1e-3
    assert_close(got, expected)


def test_hooks_see_what_torch_shows_them():
    theirs, ours = pair("torchvision")
    x = torch.randn(1, 6, 9, 8)
    seen = {}
    for name, module in (("theirs", theirs), ("ours", ours)):
        module.convs[1].register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        assert_close(ours(x), theirs(x))
    assert_close(seen["ours"], seen["theirs"])


def test_trains_and_evaluates_in_turn():
    theirs, ours = pair("torchvision")
    x = torch.randn(3, 6, 9, 8)
    for module in (theirs, ours):
        module.project[3].p = 0.0
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for _ in range(3):
            module.train()
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
            module.eval()
            with torch.no_grad():
                module(x)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), 1e-3)


@torch.no_grad()
def test_copies_and_pickles():
    ours = settle(ASPP(6, (2, 3), 8))
    x = torch.randn(1, 6, 9, 8)
    expected = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), expected)
        other.convs[1][1].running_mean.add_(0.5)
        assert (other(x) - expected).abs().max() > 1e-3
    assert torch.equal(ours(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    theirs, ours = pair("torchvision")
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        expected = theirs.double()(x.double())
        got = ours.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert_close(got.double(), expected, {torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype])


@pytest.mark.parametrize("peer", PEERS)
def test_autocast(peer):
    theirs, ours = pair(peer)
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = theirs(x), ours(x)
    assert got.dtype == expected.dtype
    assert_close(got.float(), expected.float(), 4e-2)


@pytest.mark.parametrize("peer", ["torchvision", "mmseg separable"])
def test_compile(peer):
    torch._dynamo.reset()
    theirs, ours = pair(peer)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 6, 9, 8), (3, 6, 7, 5)):
            x = torch.randn(shape)
            assert_close(compiled(x), theirs(x))
        ours.convs[1][1].running_mean.add_(0.5)
        assert_close(compiled(x), ours(x))
    x = x.requires_grad_()
    assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(ours(x).sum(), x)[0], 1e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    theirs, ours = pair("torchvision")
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        program = torch.export.export(ours, (x,), strict=strict)
        assert_close(program.module()(x), theirs(x))
    assert set(program.state_dict) == set(ours.state_dict())


@torch.no_grad()
def test_other_ways_to_run():
    """What traces or transforms a call gets the submodules one by one."""
    theirs, ours = pair("torchvision")
    x = torch.randn(3, 6, 9, 8)
    expected = theirs(x)
    assert_close(torch.func.vmap(lambda each: ours(each[None])[0])(x), expected)
    assert_close(torch.jit.trace(ours, x)(x), expected)
    assert_close(torch.fx.symbolic_trace(ours)(x), expected)
    parameters = {name: 2 * p for name, p in ours.named_parameters()}
    for module in (theirs, ours):
        twice = torch.func.functional_call(module, parameters, (x,))
        assert_close(twice, torch.func.functional_call(copy.deepcopy(theirs), parameters, (x,)))
    assert_close(ours(x), expected)


def test_accelerate_keeps_it():
    ours = settle(nn.Sequential(ASPP(6, (2, 3), 8)))
    x = torch.randn(2, 6, 9, 8)
    expected = ours(x)
    pyseg.accelerate(ours)
    with torch.no_grad():
        assert_close(ours(x), expected)
    pyseg.restore(ours)
    assert torch.equal(ours(x), expected)


# ---- DeepLab v2 ----


@pytest.mark.parametrize("channels_last", [False, True])
def test_sum(device, channels_last):
    torch.manual_seed(0)
    module = ASPPSum(6, 5, (1, 2, 3)).to(device)
    assert all(conv.bias.abs().max() == 0 for conv in module.convs)
    for conv in module.convs:
        nn.init.normal_(conv.bias)
    x = torch.randn(2, 6, 7, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected = sum(
        F.conv2d(x, c.weight.cpu(), c.bias.cpu(), padding=c.padding, dilation=c.dilation) for c in module.convs
    )
    leaf = x.detach().to(device, copy=True).requires_grad_()
    got = module(leaf)
    assert_close(got, expected, 2e-3)
    with torch.no_grad():
        assert_close(module(leaf), expected, 2e-3)
    assert got.is_contiguous(memory_format=torch.channels_last) == channels_last
    got.sum().backward()
    theirs = x.detach().clone().requires_grad_()
    sum(F.conv2d(theirs, c.weight.cpu(), padding=c.padding, dilation=c.dilation) for c in module.convs).sum().backward()
    assert_close(leaf.grad, theirs.grad, 2e-3)
