"""accelerate, report and restore on many kinds of models."""

import collections
import copy
import dataclasses
import io

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import pyseg
from pyseg._accelerate.modules import FoldedBatchNorm2d, FoldedConv2d, FoldedReLU, FusedAtrousConv2d

TOLERANCE = 1e-4


def far(a: Tensor, b: Tensor) -> float:
    """Difference relative to the largest magnitude."""
    return ((a - b).abs().max() / a.abs().max()).item()


def settle(model: nn.Module) -> nn.Module:
    """Batch norms as after training, so that folding them does something; eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
    return model.eval()


class ConvNormReLU(nn.Module):
    def __init__(self, c_in: int, c_out: int, dilation: int = 1, inplace: bool = True):
        super().__init__()
        self.conv_s1 = nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(c_out)
        self.relu_s1 = nn.ReLU(inplace=inplace)

    def forward(self, x):
        return self.relu_s1(self.bn_s1(self.conv_s1(x)))


class Bottleneck(nn.Module):
    """One ReLU for three places, one of them behind an addition in place."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x
        return self.relu(out)


class FunctionalReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x, mask=None):
        x = F.relu(self.bn(self.conv(x)))
        return x if mask is None else x * mask


class SharedConv(nn.Module):
    """One convolution, two batch norms (RetinaNet's heads)."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.a(self.conv(x)) + self.b(self.conv(x))


class TwoUsers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class ReachesIn(nn.Module):
    """Calls the children of its Sequential itself and keeps what lies between them."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        kept = []
        for layer in self.features:
            x = layer(x)
            kept.append(x)
        return torch.cat(kept, 1)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.block = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), ConvNormReLU(8, 8)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.block(x) if x.sum() > -1e9 else x


class Remembers(nn.Module):
    """Leaves its activations in itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.seen = []

    def forward(self, x):
        self.last = self.bn(self.conv(x))
        self.seen.append(self.last)
        return self.last


class Views(nn.Module):
    """Insists on contiguous activations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x).view(x.shape[0], -1)


@dataclasses.dataclass
class Prediction:
    masks: Tensor
    parts: dict


Pair = collections.namedtuple("Pair", "a b")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return Prediction(y, {"labels": y.argmax(1), "pair": Pair(y + 1, [y * 2]), "name": "text", "none": None})


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12), nn.Identity(), nn.BatchNorm2d(12, affine=False),
        nn.ReLU6(),
        nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=4, dilation=4),
    )  # fmt: skip


def tied() -> nn.Module:
    block = ConvNormReLU(8, 8)
    return nn.Sequential(block, block, nn.Conv2d(8, 8, 3, padding=1))


MODELS = {
    "sequential": sequential,
    "blocks": lambda: nn.Sequential(ConvNormReLU(8, 8), ConvNormReLU(8, 8, dilation=2, inplace=False)),
    "bottleneck": lambda: nn.Sequential(Bottleneck(), Bottleneck()),
    "functional relu": FunctionalReLU,
    "shared convolution": SharedConv,
    "two users": TwoUsers,
    "reaches in": ReachesIn,
    "untraceable": Untraceable,
    "tied": tied,
    "one convolution": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "ours already": lambda: nn.Sequential(
        pyseg.nn.AtrousConv2d(8, 8, 3, padding=1, exact=True), nn.BatchNorm2d(8), nn.ReLU()
    ),
    "no convolution": lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    torch.manual_seed(1)
    return settle(request.param())


@pytest.fixture
def x():
    torch.manual_seed(2)
    return torch.randn(2, 8, 14, 17)


def test_outputs_agree(model, x):
    original = copy.deepcopy(model)
    assert pyseg.accelerate(model) is model
    with torch.inference_mode():
        assert far(original(x), model(x)) <= TOLERANCE
        assert far(original(x[:1]), model(x[:1])) <= TOLERANCE
    assert far(original(x), model(x)) <= TOLERANCE  # with gradients on


def test_outputs_agree_with_channels_last(model, x):
    expected = model(x)
    pyseg.accelerate(model, channels_last=True)
    with torch.no_grad():
        assert far(expected, model(x)) <= TOLERANCE


def test_eval_gradients_agree(model, x):
    original = copy.deepcopy(model)
    pyseg.accelerate(model)
    assert_same_gradients(original, model, x)


def test_training_is_the_same(model, x):
    original = copy.deepcopy(model).train()
    pyseg.accelerate(model)
    model.train()
    assert_same_gradients(original, model, x)
    for (name, a), b in zip(original.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=name)
    original.eval()
    model.eval()
    with torch.no_grad():  # the statistics have changed since they were folded
        assert far(original(x), model(x)) <= TOLERANCE


def assert_same_gradients(original, model, x):
    gradients = []
    for each in (original, model):
        leaf = x.clone().requires_grad_()
        loss = each(leaf).square().mean()
        parameters = list(each.parameters())
        gradients.append((loss, *torch.autograd.grad(loss, [leaf, *parameters])))
    # A parameter whose gradient is zero in exact arithmetic (a bias before a batch norm) gets noise from both.
    scale = max(g.abs().max() for g in gradients[0])
    for expected, got in zip(*gradients, strict=True):
        assert (expected - got).abs().max() <= TOLERANCE * max(expected.abs().max(), 1e-3 * scale)


def test_state_dict_goes_both_ways(model, x):
    original = copy.deepcopy(model)
    other = settle(copy.deepcopy(model))
    for parameter in other.parameters():
        parameter.data.mul_(1.25)
    pyseg.accelerate(model)
    assert list(model.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        model(x)  # whatever is cached, is cached
        model.load_state_dict(other.state_dict())
        assert far(other(x), model(x)) <= TOLERANCE
        original.load_state_dict(model.state_dict())
        assert torch.equal(original(x), other(x))


def test_restore_is_exact(model, x):
    expected = model(x)
    modules = list(model.modules())
    before = [(type(m), set(m.__dict__), [(id(p), p.stride()) for p in m.parameters()]) for m in modules]
    pyseg.accelerate(model, channels_last=True)
    model(x)
    assert pyseg.restore(model) is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert before == [(type(m), set(m.__dict__), [(id(p), p.stride()) for p in m.parameters()]) for m in modules]
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="must have been accelerated"):
        pyseg.report(model)
    pyseg.restore(model)


def test_copies_and_pickles(model, x):
    pyseg.accelerate(model, channels_last=True)
    with torch.no_grad():
        expected = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(copied(x), expected)
            for module in copied.modules():  # folded into the copy's modules, not into the original's
                if isinstance(module, FoldedBatchNorm2d):
                    module.running_mean.add_(1)
            restored = pyseg.restore(copied)
            assert not any(type(m).__module__.startswith("pyseg._accelerate") for m in restored.modules())
        assert torch.equal(model(x), expected)


def test_measured(model, x):
    expected = model(x)
    lines = []
    pyseg.accelerate(model, x, rounds=1, progress=lines.append)
    assert lines
    report = pyseg.report(model)
    assert far(expected, model(x)) <= TOLERANCE
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(report.rows) == len(convolutions)
    for row, module in zip(report.rows, convolutions, strict=True):
        assert bool(row.became) == isinstance(module, FusedAtrousConv2d)
        assert row.reason
        if row.became and row.after_ms is not None:
            assert row.after_ms <= row.before_ms
            assert row.difference <= TOLERANCE
    if report.before_ms is not None and any(row.became for row in report.rows):
        assert report.after_ms < report.before_ms


def test_twice_is_once(x):
    model = settle(sequential())
    pyseg.accelerate(model)
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    assert pyseg.accelerate(model, x) is model
    after = [(type(m), dict(m.__dict__)) for m in model.modules()]
    assert all(a[0] is b[0] and a[1].keys() == b[1].keys() for a, b in zip(before, after, strict=True))


def test_part_then_whole(x):
    model = settle(nn.Sequential(ConvNormReLU(8, 8), ConvNormReLU(8, 8)))
    expected = model(x)
    pyseg.accelerate(model[0])
    pyseg.accelerate(model)
    assert pyseg.report(model).rows[0].reason == "accelerated before"
    assert far(expected, model(x)) <= TOLERANCE
    pyseg.restore(model)
    assert torch.equal(model(x), expected)
    assert type(model[0].conv_s1) is nn.Conv2d


@pytest.mark.parametrize("name", ["conv_s1", "bn_s1", "relu_s1"])
def test_restored_part(x, name):
    model = settle(ConvNormReLU(8, 8))
    expected = model(x)
    pyseg.accelerate(model)
    pyseg.restore(getattr(model, name))
    assert far(expected, model(x)) <= TOLERANCE


# ---- what is folded ----


def kinds(model):
    return [type(m) for m in model.modules() if type(m).__module__.startswith("pyseg._accelerate")]


def test_block_is_fused_whole():
    model = pyseg.accelerate(settle(ConvNormReLU(8, 8)))
    assert kinds(model) == [FusedAtrousConv2d, FoldedBatchNorm2d, FoldedReLU]
    assert pyseg.report(model).rows[0].became == "AtrousConv2d + batch norm + ReLU in one"
    assert isinstance(model.conv_s1, nn.Conv2d)
    assert isinstance(model.bn_s1, nn.BatchNorm2d)


def test_fused_block_runs_one_operator(x):
    model = pyseg.accelerate(settle(ConvNormReLU(8, 8)))
    with torch.no_grad():
        model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x)
    names = {event.key for event in profile.key_averages()}
    assert "pyseg::atrous_conv2d" in names
    assert not names & {"aten::relu", "aten::relu_", "aten::batch_norm", "aten::conv2d"}


def test_shared_relu_is_skipped_where_it_is_fused(x):
    model = pyseg.accelerate(settle(Bottleneck()))
    assert kinds(model).count(FoldedReLU) == 1
    with torch.no_grad():
        model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::relu_"] == 1  # behind the addition, not behind a convolution


@pytest.mark.parametrize("kind", [SharedConv, TwoUsers, ReachesIn])
def test_not_folded_where_it_would_be_wrong(kind):
    model = pyseg.accelerate(settle(kind()))
    assert kinds(model) == [FusedAtrousConv2d]
    assert pyseg.report(model).rows[0].reason


def test_untraceable_forward_is_named():
    model = pyseg.accelerate(settle(Untraceable()))
    rows = {row.name: row for row in pyseg.report(model).rows}
    assert "cannot follow Untraceable.forward" in rows["conv"].reason
    assert rows["block.conv_s1"].became == "AtrousConv2d + batch norm + ReLU in one"


def test_other_convolutions_get_their_batch_norm_folded():
    model = nn.Sequential(nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    pyseg.accelerate(settle(model))
    assert kinds(model) == [FoldedConv2d, FoldedBatchNorm2d]


def test_tracing_leaves_no_trace(x):
    model = pyseg.accelerate(settle(Remembers()))
    assert model.seen == []
    assert not hasattr(model, "last")
    model(x)
    copy.deepcopy(model.state_dict())


def test_branch_on_an_option_is_not_followed(x):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x, raw=False):
            y = self.conv(x)
            return y if raw else self.bn(y)

    model = settle(Optional())
    expected = model(x), model(x, raw=True)
    pyseg.accelerate(model)
    assert far(expected[0], model(x)) <= TOLERANCE
    assert far(expected[1], model(x, raw=True)) <= TOLERANCE


# ---- what users do to modules ----


@pytest.mark.parametrize("name", ["conv_s1", "bn_s1", "relu_s1"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_saw(x, name, when):
    model = settle(ConvNormReLU(8, 8, inplace=False))
    seen = []

    def hook(module, inputs, output):
        seen.append((inputs[0].clone(), output.clone()))

    if when == "before":
        getattr(model, name).register_forward_hook(hook)
        model(x)
        pyseg.accelerate(model)
    else:
        handle = getattr(model, name).register_forward_hook(hook)
        model(x)
        handle.remove()
        pyseg.accelerate(model)
        getattr(model, name).register_forward_hook(hook)
    model(x)
    (a_in, a_out), (b_in, b_out) = seen
    assert far(a_in, b_in) <= TOLERANCE
    assert far(a_out, b_out) <= TOLERANCE


def test_frozen_parameters_stay_frozen(x):
    model = settle(ConvNormReLU(8, 8))
    model.conv_s1.requires_grad_(False)
    pyseg.accelerate(model, x, rounds=1)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_frozen_batch_norm_in_training(x):
    model = settle(ConvNormReLU(8, 8))
    original = copy.deepcopy(model)
    pyseg.accelerate(model)
    for each in (model, original):
        each.train()
        each.bn_s1.eval()
    assert_same_gradients(original, model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(x, dtype):
    model = settle(nn.Sequential(ConvNormReLU(8, 8), Bottleneck())).to(dtype)
    expected = model(x.to(dtype))
    pyseg.accelerate(model)
    with torch.no_grad():
        got = model(x.to(dtype))
    assert got.dtype == dtype
    allowed = {torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 5e-3}
    assert far(expected.double(), got.double()) <= allowed[dtype]


def test_moves_to_another_dtype(x):
    model = pyseg.accelerate(settle(ConvNormReLU(8, 8)))
    with torch.no_grad():
        expected = model(x)
        assert far(expected, model.double()(x.double()).float()) <= TOLERANCE


def test_autocast(x):
    model = settle(nn.Sequential(ConvNormReLU(8, 8), Bottleneck()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        got = pyseg.accelerate(model)(x)
    assert got.dtype == expected.dtype
    assert far(expected.float(), got.float()) <= 5e-2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)), "parametrization"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)), "parametrization"),
        (lambda: type("Standardized", (nn.Conv2d,), {})(8, 8, 3, padding=1), "of its own kind"),
        (lambda: nn.Conv2d(8, 8, 5, padding=2), "kernel 5x5 is neither 3x3 nor 1x1"),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), "groups 2"),
        (lambda: torch.ao.nn.quantized.Conv2d(8, 8, 3), "quantized"),
    ],
)
def test_left_alone_with_a_reason(module, reason):
    model = nn.Sequential(module()).eval()
    before = type(model[0])
    pyseg.accelerate(model)
    assert type(model[0]) is before
    assert reason in pyseg.report(model).rows[0].reason


def test_in_place_edits_are_noticed(x):
    model = pyseg.accelerate(settle(nn.Sequential(ConvNormReLU(8, 8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))))
    with torch.inference_mode():
        model(x)
    for edit in (
        lambda: model[0].bn_s1.running_mean.add_(0.5),
        lambda: model[0].bn_s1.weight.data.mul_(2),
        lambda: model[2].bias.data.add_(1),
        lambda: model[1].weight.data.mul_(0.5),
        lambda: setattr(model[2], "eps", 0.1),
    ):
        with torch.no_grad():
            edit()
        with torch.inference_mode():
            assert far(pyseg.restore(copy.deepcopy(model))(x), model(x)) <= TOLERANCE


# ---- measuring ----


def test_nested_outputs(x):
    model = Nested().eval()
    expected = model(x)
    pyseg.accelerate(model, (x,), rounds=1)
    got = model(x)
    assert far(expected.masks, got.masks) <= TOLERANCE
    assert pyseg.report(model).difference is None or pyseg.report(model).difference <= TOLERANCE


def test_keyword_inputs(x):
    model = settle(FunctionalReLU())
    expected = model(x, mask=x > 0)
    pyseg.accelerate(model, {"x": x, "mask": x > 0}, rounds=1)
    assert far(expected, model(x, mask=x > 0)) <= TOLERANCE


def test_view_rules_out_channels_last(x):
    model = Views().eval()
    expected = model(x)
    pyseg.accelerate(model, x, rounds=1)
    assert any("channels_last does not work" in note for note in pyseg.report(model).notes)
    assert far(expected, model(x)) <= TOLERANCE


def test_clocks_wait_for_the_device(monkeypatch, x):
    """A trial starts when earlier work is done, and ends when its own is."""
    events = []

    def clock():
        events.append("clock")
        return float(len(events))

    monkeypatch.setattr("pyseg._accelerate.measure.Example.synchronize", lambda example: events.append("wait"))
    monkeypatch.setattr("pyseg._accelerate.measure.time.perf_counter", clock)
    pyseg.accelerate(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).eval(), x, rounds=1)
    clocks = [i for i, event in enumerate(events) if event == "clock"]
    assert len(clocks) >= 12
    assert all(events[i - 1] == "wait" for i in clocks)


@pytest.fixture
def ours_is_faster(monkeypatch):
    """Every convolution's accelerated forms win their trials."""

    def times(calls, synchronize):
        return [2.0] + [1.0] * (len(calls) - 1)

    monkeypatch.setattr("pyseg._accelerate.trial.interleaved_ms", times)


@pytest.mark.usefixtures("ours_is_faster")
def test_disagreement_is_refused(x):
    class Reads(nn.Module):
        """Looks at its convolution's class: an accelerated one makes it compute something else."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(x) * (1.0 if type(self.conv) is nn.Conv2d else 1.1)

    model = Reads().eval()
    with pytest.raises(RuntimeError, match=r"accelerate: outputs must agree to 1\.0e-04 .* the model is restored"):
        pyseg.accelerate(model, x, rounds=1)
    assert type(model.conv) is nn.Conv2d
    assert not [name for name in model.conv.__dict__ if name.startswith("_pyseg")]


@pytest.mark.usefixtures("ours_is_faster")
def test_disagreement_of_a_model_with_other_outputs_in_float64(x):
    """No rounding error can be measured then."""

    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            y = self.conv(x) * (1.0 if type(self.conv) is nn.Conv2d else 1.1)
            return [y] * (2 if x.dtype == torch.float64 else 1)

    with pytest.raises(
        RuntimeError, match=r"outputs must agree to 1\.0e-04 .* in output\[0\]; .*the model is restored"
    ):
        pyseg.accelerate(Lists().eval(), x, rounds=1)


@pytest.mark.usefixtures("ours_is_faster")
def test_slower_model_is_left_as_it_was(x, monkeypatch):
    monkeypatch.setattr("pyseg._accelerate.session.interleaved_ms", lambda calls, rounds: [1.0, 2.0])
    model = settle(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    pyseg.accelerate(model, x)
    assert kinds(model) == []
    assert any("left as it was" in note for note in pyseg.report(model).notes)
    assert model[0].weight.stride() == nn.Conv2d(8, 8, 1).weight.stride()


def test_training_mode_is_measured_with_backward_and_without_side_effects(x):
    model = settle(nn.Sequential(ConvNormReLU(8, 8), nn.Dropout(0.5), nn.Conv2d(8, 8, 3, padding=1))).train()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    pyseg.accelerate(model, x, rounds=1)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    assert far(pyseg.restore(copy.deepcopy(model))(x), model(x)) <= TOLERANCE


def test_dropout_in_training_keeps_the_memory_format(x):
    """In another format the same seed would drop other elements: outputs differed, where channels_last was faster."""
    model = settle(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.5))).train()
    pyseg.accelerate(model, x, rounds=1)
    report = pyseg.report(model)
    assert report.memory_format == "unchanged"
    assert any("dropout" in note for note in report.notes)


# ---- reports ----


def test_report_reads_well():
    report = pyseg.report(pyseg.accelerate(settle(sequential())))
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "was", "became", "how", "and", "why"]
    assert "7 of 7 modules accelerated, memory format unchanged" in lines
    assert report.to_markdown().startswith("| module | was | became | how and why |\n| --- |")
    assert report.to_dict()["rows"][0]["name"] == "0"


# ---- graphs ----


def test_graph_module(x):
    model = settle(nn.Sequential(ConvNormReLU(8, 8), Bottleneck()))
    expected = model(x)
    graph = fx.symbolic_trace(model)
    pyseg.accelerate(graph)
    assert kinds(graph).count(FusedAtrousConv2d) == 4
    with torch.no_grad():
        assert far(expected, graph(x)) <= TOLERANCE
    copied = copy.deepcopy(graph)
    assert pyseg.report(copied).rows
    assert torch.equal(pyseg.restore(copied)(x), expected)


def test_compile(x):
    model = settle(nn.Sequential(ConvNormReLU(8, 8), Bottleneck(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    expected = model(x)
    pyseg.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    with torch.no_grad():
        assert far(expected, compiled(x)) <= TOLERANCE
        model[0].bn_s1.bias.add_(1)
        assert far(model(x), compiled(x)) <= TOLERANCE


@pytest.mark.parametrize("strict", [False, True])
def test_export(x, strict):
    model = settle(nn.Sequential(ConvNormReLU(8, 8), Bottleneck()))
    expected = model(x)
    pyseg.accelerate(model)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
    assert far(expected, program.module()(x)) <= TOLERANCE
    assert set(program.state_dict) == set(model.state_dict())


# ---- torchvision's segmentation models ----


@pytest.mark.parametrize(
    ("name", "side"), [("deeplabv3_resnet50", 129), ("fcn_resnet50", 129), ("lraspp_mobilenet_v3_large", 520)]
)
def test_torchvision(name, side):
    segmentation = pytest.importorskip("torchvision").models.segmentation
    torch.manual_seed(3)
    model = settle(getattr(segmentation, name)(weights=None, weights_backbone=None))
    x = torch.randn(1, 3, side, side)
    original = copy.deepcopy(model)
    pyseg.accelerate(model, x, rounds=1)
    with torch.inference_mode():
        expected, got = original(x), model(x)
    assert expected.keys() == got.keys()
    for key in expected:
        assert far(expected[key], got[key]) <= TOLERANCE
    assert pyseg.report(model).difference is None or pyseg.report(model).difference <= TOLERANCE
    assert list(original.state_dict()) == list(model.state_dict())
    pyseg.restore(model)
    with torch.inference_mode():
        assert torch.equal(original(x)["out"], model(x)["out"])


def test_torchvision_folds_everything():
    segmentation = pytest.importorskip("torchvision").models.segmentation
    model = settle(segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None))
    pyseg.accelerate(model)
    unfolded = [m for m in model.modules() if type(m) is nn.BatchNorm2d]
    assert unfolded == []
