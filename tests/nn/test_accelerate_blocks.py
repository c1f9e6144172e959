"""pyseg.accelerate on segmentation models of torchvision and segmentation-models-pytorch, and on stand-ins."""

import copy
import io
import itertools

import pytest
import torch
from blocks import assert_close, assert_ran, settle
from stand_ins import ASPPHead, DepthwiseSeparableASPPHead, OldASPPHead
from torch import nn

import pyseg
from pyseg.reference.jpu import JPU


class FastFCN(nn.Module):
    """A backbone of strided convolutions, JPU, and a classifier."""

    def __init__(self):
        super().__init__()
        channels = (3, 6, 8, 12, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(channels)
        )
        self.jpu = JPU(channels[1:], 8)
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return self.head(self.jpu(*maps)[-1])


class MMSeg(nn.Module):
    """Two maps and a head of mmsegmentation."""

    def __init__(self, head):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2)
        self.decode_head = head

    def forward(self, x):
        fine = self.fine(x)
        return self.decode_head([fine, self.coarse(fine)])


def torchvision_model(name):
    segmentation = pytest.importorskip("torchvision").models.segmentation
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


def smp_model(name, encoder="resnet34", **arguments):
    smp = pytest.importorskip("segmentation_models_pytorch")
    return getattr(smp, name)(encoder, encoder_weights=None, classes=5, **arguments)


# Model, and the blocks that become ours with their names.
MODELS = {
    "deeplabv3_resnet50": (lambda: torchvision_model("deeplabv3_resnet50"), {"classifier.0": "ASPP"}),
    "deeplabv3_resnet101": (lambda: torchvision_model("deeplabv3_resnet101"), {"classifier.0": "ASPP"}),
    "deeplabv3_mobilenet": (lambda: torchvision_model("deeplabv3_mobilenet_v3_large"), {"classifier.0": "ASPP"}),
    "smp DeepLabV3": (lambda: smp_model("DeepLabV3"), {"decoder.aspp": "ASPP"}),
    "smp DeepLabV3Plus": (lambda: smp_model("DeepLabV3Plus"), {"decoder.aspp.0": "ASPP"}),
    "smp PAN": (lambda: smp_model("PAN"), {}),
    "smp Unet": (lambda: smp_model("Unet"), {}),
    "fastfcn": (FastFCN, {"jpu": "JPU"}),
    "mmseg": (lambda: MMSeg(ASPPHead(8, 8, 5, dilations=(1, 2, 3))), {"decode_head": "ASPP"}),
    "mmseg separable": (
        lambda: MMSeg(DepthwiseSeparableASPPHead(8, 8, 5, (1, 2, 3), 4, 4)),
        {"decode_head": "ASPP"},
    ),
    "mmseg separable, one map": (
        lambda: MMSeg(DepthwiseSeparableASPPHead(8, 8, 5, (1, 2, 3))),
        {"decode_head": "ASPP"},
    ),
}
SMALL = [name for name in MODELS if name.startswith(("fastfcn", "mmseg", "smp DeepLabV3Plus"))]
TRAINED = [name for name in MODELS if name != "deeplabv3_resnet101"]  # resnet50's blocks, more of them, and slow


def make(name):
    torch.manual_seed(0)
    return settle(MODELS[name][0]())


def images(name, batch=2):
    torch.manual_seed(1)
    size = (128, 160) if name == "smp PAN" else (64, 80)  # PAN's pyramid needs 8 pixels at stride 16
    return torch.randn(batch, 3, *size)


def outputs(result):
    return list(result.values()) if isinstance(result, dict) else [result]


@pytest.mark.parametrize(
    ("name", "channels_last"), [*((name, False) for name in MODELS), *((name, True) for name in SMALL)]
)
def test_eval(name, channels_last):
    model = make(name)
    original = copy.deepcopy(model)
    pyseg.accelerate(model, channels_last=channels_last)
    found = {row.name: row.became for row in pyseg.report(model).rows if row.became in ("ASPP", "JPU")}
    assert found == MODELS[name][1]
    with torch.inference_mode():
        for expected, got in zip(outputs(original(images(name))), outputs(model(images(name))), strict=True):
            assert_close(got, expected)
    pyseg.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in original.modules()]
    with torch.inference_mode():
        for expected, got in zip(outputs(original(images(name))), outputs(model(images(name))), strict=True):
            assert torch.equal(got, expected)


def without_dropout(model):
    """Dropout draws its numbers in the order of memory, which may differ."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def loss_and_gradients(model, name):
    """Of a training step, which is made; the model is in eval mode again afterwards."""
    x = images(name, 4).to(next(model.parameters()).dtype)
    target = torch.randint(0, 5, (4, *x.shape[2:]), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    results = outputs(model.train()(x))
    maps = [nn.functional.interpolate(y, target.shape[1:], mode="bilinear") for y in results]
    loss = sum(nn.functional.cross_entropy(y, target) for y in maps)
    loss.backward()
    optimizer.step()
    model.eval()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", TRAINED)
def test_training(name):
    """A step from an accelerated model, evaluation, and the checkpoint in the original.

    In float64: of these networks with random weights the gradients in float32 are percents away from those in
    float64, torch's too, since rounding decides on which side of a ReLU a value falls.
    """
    model = without_dropout(make(name)).double()
    original = copy.deepcopy(model)
    pyseg.accelerate(model)
    with torch.no_grad():
        model(images(name).double())  # whatever is kept for eval mode, is kept
    expected, of_original = loss_and_gradients(original, name)
    got, of_model = loss_and_gradients(model, name)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    scale = max(g.abs().max() for g in of_original.values())
    for key, gradient in of_original.items():
        # Where a gradient is zero in exact arithmetic both are noise.
        assert (of_model[key] - gradient).abs().max() <= 1e-6 * max(gradient.abs().max(), 1e-4 * scale), key
    with torch.no_grad():
        results = [outputs(each(images(name).double())) for each in (original, model)]
        for a, b in zip(*results, strict=True):
            assert_close(b, a, 1e-9)
        original.load_state_dict(model.state_dict())
        for a, b in zip(outputs(original(images(name).double())), results[1], strict=True):
            assert_close(b, a, 1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_training_in_float32(name):
    """The loss agrees to 1e-3, and the gradients are as near to those in float64 as rounding lets the original's be."""
    original = without_dropout(make(name))
    model = pyseg.accelerate(copy.deepcopy(original))
    _, exact = loss_and_gradients(copy.deepcopy(original).double(), name)
    norm = torch.stack([g.norm() for g in exact.values()]).norm()

    def error(gradients):
        return torch.stack([(gradients[key] - g).norm() for key, g in exact.items()]).norm() / norm

    expected, of_original = loss_and_gradients(original, name)
    got, of_model = loss_and_gradients(model, name)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)
    assert error(of_model) <= max(1e-3, 10 * error(of_original))


@pytest.mark.parametrize("name", SMALL)
def test_no_detours(name):
    """The block's branches are neither concatenated nor upsampled in eval mode."""
    model = make(name)
    block = model.get_submodule(next(iter(MODELS[name][1])))
    seen = []
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    pyseg.accelerate(model)
    with torch.no_grad():
        model(images(name))
    handle.remove()
    absent = ["aten::batch_norm"] + (["aten::cat"] if MODELS[name][1] == {"decoder.aspp.0": "ASPP"} else [])
    assert_ran(block, seen[0], absent=absent)


@pytest.mark.parametrize("name", SMALL)
def test_measured(name):
    model = make(name)
    with torch.no_grad():
        expected = outputs(model(images(name)))
    pyseg.accelerate(model, images(name), rounds=1)
    report = pyseg.report(model)
    rows = {row.name: row for row in report.rows}
    for block in MODELS[name][1]:
        assert rows[block].before_ms > 0
        assert rows[block].after_ms > 0
        assert rows[block].difference <= 1e-4
        assert rows[block].shape is not None
    with torch.no_grad():
        for a, b in zip(expected, outputs(model(images(name))), strict=True):
            assert_close(b, a)


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_pickles(name):
    model = pyseg.accelerate(make(name))
    with torch.no_grad():
        expected = outputs(model(images(name)))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            for a, b in zip(expected, outputs(copied(images(name))), strict=True):
                assert torch.equal(a, b)
            restored = pyseg.restore(copied)
            assert not any(type(m).__module__.startswith("pyseg._accelerate") for m in restored.modules())


def test_trained_in_training_mode():
    """Measured in training mode: blocks are not timed, but run as a whole in eval mode."""
    model = make("fastfcn")
    expected = model(images(""))
    model.train()
    pyseg.accelerate(model, images(""), rounds=1)
    rows = {row.name: row for row in pyseg.report(model).rows}
    assert rows["jpu"].before_ms is None
    model.eval()
    with torch.no_grad():
        assert_close(model(images("")), expected)


def test_old_mmseg_head():
    model = settle(MMSeg(OldASPPHead(8, 8, 5, dilations=(1, 2, 3))))
    expected = model(images(""))
    pyseg.accelerate(model)
    assert pyseg.report(model).rows[-1].became == "ASPP"
    with torch.no_grad():
        assert_close(model(images("")), expected)
    assert_ran(model, (images(""),), absent=["aten::cat", "aten::batch_norm"])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.jpu, "up_kwargs", {"mode": "nearest"}),
        lambda model: setattr(model.jpu, "conv3", nn.Conv2d(8, 8, 1)),
        lambda model: setattr(model.jpu.dilation2[0], "bn", nn.GroupNorm(2, 24)),
    ],
)
def test_other_structures_stay(change):
    model = make("fastfcn")
    change(model)
    expected = model(images(""))
    pyseg.accelerate(model)
    assert "jpu" not in {row.name for row in pyseg.report(model).rows}
    with torch.no_grad():
        assert_close(model(images("")), expected)


def test_hooks_inside_a_block():
    model = make("fastfcn")
    expected = model(images(""))
    seen = []
    pyseg.accelerate(model)
    model.jpu.dilation1.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        assert_close(model(images("")), expected)
    assert seen == [1]


@pytest.mark.parametrize("name", ["fastfcn", "mmseg separable"])
def test_compile(name):
    torch._dynamo.reset()
    model = pyseg.accelerate(make(name))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(outputs(model(images(name))), outputs(compiled(images(name))), strict=True):
            assert_close(b, a)
