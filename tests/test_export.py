"""torch.export of the operators, strict and not, with dynamic shapes, saved and loaded."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim

import pyseg
from pyseg.functional import (
    LinkKernel,
    PixelLinks,
    atrous_conv2d,
    bilinear_upsample,
    confusion_matrix,
    correspondence_links,
    dense_crf,
    dice,
    distance_to_two_nearest_objects,
    distance_transform,
    expectation_labels,
    joint_warp,
    upsample_concat,
    upsample_concat_depthwise,
    warp_and_fuse,
)


class Function(nn.Module):
    def __init__(self, groups):
        super().__init__()
        torch.manual_seed(0)
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(6, 6 // groups, 3, 3))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return atrous_conv2d(x, self.weight, self.bias, padding=(2, 1), dilation=(2, 1), groups=self.groups, relu=True)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("groups", [1, 6])
def test_atrous_conv2d(device, strict, groups):
    model = Function(groups).to(device)
    x = torch.randn(2, 6, 9, 8).to(device)
    shapes = {"x": {0: Dim("n"), 2: Dim("h", min=4, max=4096), 3: Dim("w", min=4, max=4096)}}
    program = saved_and_loaded(torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict))
    assert [node.target for node in program.graph.nodes].count(torch.ops.pyseg.atrous_conv2d.default) == 1
    for size in ((2, 6, 9, 8), (1, 6, 5, 12), (4, 6, 17, 4)):
        x = torch.randn(size).to(device)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_atrous_conv2d_pointwise(strict, stride):
    model = pyseg.nn.AtrousConv2d(6, 5, 1, stride=stride).eval()
    shapes = {"input": {0: Dim("n"), 2: Dim("h", min=4, max=4096), 3: Dim("w", min=4, max=4096)}}
    x = torch.randn(2, 6, 9, 8)
    program = saved_and_loaded(torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict))
    assert [node.target for node in program.graph.nodes].count(torch.ops.pyseg.atrous_conv2d.default) == 1
    for size in ((2, 6, 9, 8), (1, 6, 5, 12), (4, 6, 17, 4)):
        x = torch.randn(size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """What pyseg.accelerate makes of convolution, batch norm, ReLU; the batch norm stays a child of the model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = pyseg.nn.AtrousConv2d(6, 5, 3, padding=2, dilation=2)
        self.bn = nn.BatchNorm2d(5)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.conv.fold_batch_norm(self.bn, relu=True)
        self.eval()

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_module(device, strict, mode):
    """The program carries the state_dict of the model, no packed weight, and follows its own parameters."""
    model = Block().to(device)
    x = torch.randn(2, 6, 9, 8).to(device)
    with mode():
        model(x)  # eager mode has cached by now
        program = torch.export.export(model, (x,), strict=strict)
        assert set(model.state_dict()) - set(program.state_dict) <= {"bn.num_batches_tracked"}  # not read in eval mode
        assert set(program.state_dict) <= set(model.state_dict())
        assert not program.constants
        module = saved_and_loaded(program).module()
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-4)
    changed = {name: value * 2 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(changed)
    assert not module.load_state_dict(changed, strict=False).missing_keys
    with mode():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-4)


def test_module_decomposed():
    """Lowering to the core operators leaves ours as they are."""
    model = Block()
    program = torch.export.export(model, (torch.randn(2, 6, 9, 8),)).run_decompositions()
    assert torch.ops.pyseg.atrous_conv2d.default in [node.target for node in program.graph.nodes]


def test_exported_for_training():
    """Gradients flow through an exported module."""
    model = Block().train()
    x = torch.randn(2, 6, 9, 8)
    module = torch.export.export(model, (x,)).module()
    module(x).square().sum().backward()
    assert module.conv.weight.grad.any()


def test_module_of_inference_tensors():
    with torch.inference_mode():
        model = Block()
        x = torch.randn(2, 6, 9, 8)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


# ---- distance_transform ----


class Distances(nn.Module):
    def forward(self, x):
        distances, indices = distance_transform(x, labels=True, return_indices=True)
        return distances, indices, *distance_to_two_nearest_objects(x)


@pytest.mark.parametrize("strict", [False, True])
def test_distance_transform(device, strict):
    def labels(*shape):
        return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).to(device)

    shapes = {"x": {0: Dim("n"), 1: Dim("h"), 2: Dim("w")}}
    program = torch.export.export(Distances(), (labels(2, 9, 8),), dynamic_shapes=shapes, strict=strict)
    module = saved_and_loaded(program).module()
    for shape in ((2, 9, 8), (1, 5, 12), (4, 17, 4)):
        for got, expected in zip(module(labels(*shape)), Distances()(labels(*shape)), strict=True):
            torch.testing.assert_close(got, expected)


class Scores(nn.Module):
    def forward(self, x, target):
        return dice(confusion_matrix(x, target, ignore_index=255))


@pytest.mark.parametrize("strict", [False, True])
def test_confusion_matrix(device, strict):
    model = Scores()

    def example(n, h, w):
        x = torch.randn(n, 6, h, w).to(device)
        return x, torch.randint(0, 6, (n, h, w)).to(device)

    sizes = {0: Dim("n"), 2: Dim("h", min=2, max=4096), 3: Dim("w", min=2, max=4096)}
    shapes = {"x": sizes, "target": {0: sizes[0], 1: sizes[2], 2: sizes[3]}}
    arguments = example(2, 9, 8)
    program = saved_and_loaded(torch.export.export(model, arguments, dynamic_shapes=shapes, strict=strict))
    assert torch.ops.pyseg.confusion_matrix.default in [node.target for node in program.graph.nodes]
    for size in ((2, 9, 8), (1, 5, 12), (4, 17, 4)):
        arguments = example(*size)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments), equal_nan=True)


class Estimated(nn.Module):
    def forward(self, x, present):
        return expectation_labels(x, present, background_share=0.4, foreground_share=0.2, sweeps=3)


@pytest.mark.parametrize("strict", [False, True])
def test_expectation_labels(device, strict):
    model = Estimated()

    def example(n, h, w):
        x = torch.randn(n, 4, h, w).to(device)
        return x, x[:, :, 0, 0] > -0.5

    n = Dim("n")
    shapes = {"x": {0: n, 2: Dim("h", min=2, max=4096), 3: Dim("w", min=2, max=4096)}, "present": {0: n}}
    program = torch.export.export(model, example(2, 9, 8), dynamic_shapes=shapes, strict=strict)
    module = saved_and_loaded(program).module()
    for size in ((2, 9, 8), (1, 5, 12), (4, 7, 4)):
        arguments = example(*size)
        assert torch.equal(module(*arguments), model(*arguments))


class Pooled(nn.Module):
    def forward(self, x, boxes):
        half = nn.functional.avg_pool2d(x, 2)
        levels = pyseg.functional.multiscale_roi_align([x, half], boxes, 3, [1.0, 0.5], canonical_size=6)
        return pyseg.functional.roi_align(x, boxes, (2, 3), aligned=True, mode="max"), levels


@pytest.mark.parametrize("strict", [False, True])
def test_roi_align(strict):
    def example(n, h, w, count):
        index = torch.arange(count)[:, None] % n
        return torch.randn(n, 6, h, w), torch.cat([index, torch.rand(count, 4) * 4 + torch.tensor([0, 0, 4, 4])], 1)

    shapes = {"x": {0: Dim("n"), 2: Dim("h", min=4, max=99), 3: Dim("w", min=4, max=99)}, "boxes": {0: Dim("k")}}
    exported = torch.export.export(Pooled(), example(2, 9, 8, 4), dynamic_shapes=shapes, strict=strict)
    program = saved_and_loaded(exported)
    assert torch.ops.pyseg.multiscale_roi_align.default in [node.target for node in program.graph.nodes]
    for size in ((2, 9, 8, 4), (1, 5, 12, 1), (4, 17, 5, 9)):
        arguments = example(*size)
        for got, expected in zip(program.module()(*arguments), Pooled()(*arguments), strict=True):
            torch.testing.assert_close(got, expected)


class Refined(nn.Module):
    def __init__(self, accuracy):
        super().__init__()
        self.crf = pyseg.nn.DenseCRF(iterations=2, accuracy=accuracy)

    def forward(self, x, image):
        return self.crf(x, image)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("accuracy", ["fast", "high"])
def test_dense_crf(device, strict, accuracy):
    if device == "cuda" and accuracy == "high":
        accuracy = "fast"
    model = Refined(accuracy)

    def example(n, h, w):
        return torch.randn(n, 4, h, w).to(device), torch.randn(n, 3, h, w).to(device) * 20

    sizes = {0: Dim("n"), 2: Dim("h", min=2, max=4096), 3: Dim("w", min=2, max=4096)}
    arguments = example(2, 9, 8)
    with torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes={"x": sizes, "image": sizes}, strict=strict)
    program = saved_and_loaded(program)
    assert torch.ops.pyseg._mean_field.default in [node.target for node in program.graph.nodes]
    for size in ((2, 9, 8), (1, 5, 12), (4, 17, 4)):
        arguments = example(*size)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_fuse_query(device, strict):
    model = pyseg.nn.FuseQuery(5, 3, 6, normalize=True, relu=True).to(device)

    def example(n, h, w):
        return torch.randn(n, 5, h, w).to(device), torch.randn(n, 3).to(device)

    n, h, w = Dim("n"), Dim("h", min=2, max=4096), Dim("w", min=2, max=4096)
    shapes = {"input": {0: n, 2: h, 3: w}, "query": {0: n}}
    program = saved_and_loaded(torch.export.export(model, example(2, 9, 8), dynamic_shapes=shapes, strict=strict))
    assert torch.ops.pyseg.fuse_query.default in [node.target for node in program.graph.nodes]
    for size in ((2, 9, 8), (1, 5, 12)):
        arguments = example(*size)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments), rtol=1e-4, atol=1e-5)


class Linked(nn.Module):
    """Mean field over views whose links are buffers."""

    def __init__(self, device):
        super().__init__()
        first, second = torch.tensor([[0, 1, 1], [0, 2, 3]]), torch.tensor([[1, 0, 1], [1, 2, 2]])
        links = correspondence_links(first, second, (2, 3, 4))
        for name, tensor in links._asdict().items():
            self.register_buffer(name, tensor.to(device))

    def forward(self, unary):
        links = PixelLinks(*[getattr(self, name) for name in PixelLinks._fields])
        return dense_crf(unary, kernels=[LinkKernel(links)], iterations=2)


def test_linked_views(device):
    model = Linked(device)
    unary = torch.randn(2, 3, 3, 4).to(device)
    with torch.no_grad():
        program = saved_and_loaded(torch.export.export(model, (unary,)))
    torch.testing.assert_close(program.module()(unary), model(unary))


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 8, 3, 3))
        self.shift = nn.Parameter(torch.randn(2, 8))

    def forward(self, x, y):
        parts = upsample_concat_depthwise([x, y], self.weight, (1, 2), shift=self.shift)
        return upsample_concat([x, bilinear_upsample(y, scale_factor=2.0)]), parts.sum(0)


@pytest.mark.parametrize("strict", [False, True])
def test_upsample(device, strict):
    model = Pyramid().to(device)

    def example(n, h, w):
        return torch.randn(n, 5, h, w).to(device), torch.randn(n, 3, h // 2 + 1, w).to(device)

    n, h, w = Dim("n"), Dim("h", min=2, max=4096), Dim("w", min=2, max=4096)
    shapes = {"x": {0: n, 2: h, 3: w}, "y": {0: n, 2: Dim("h2", min=2, max=4096), 3: w}}
    program = saved_and_loaded(torch.export.export(model, example(2, 9, 8), dynamic_shapes=shapes, strict=strict))
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.pyseg.upsample_concat_depthwise.default in targets
    for size in ((2, 9, 8), (1, 5, 12), (4, 17, 4)):
        arguments = example(*size)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments), rtol=1e-4, atol=1e-4)


class Fusion(nn.Module):
    def forward(self, scores, depth, k, pose):
        return warp_and_fuse(scores, depth, k[:1], k, pose)


def test_warp_and_fuse(device):
    model = Fusion()

    def example(n, h, w):
        pose = torch.eye(4).repeat(n, 1, 1)
        pose[:, 0, 3] = 0.7
        tensors = (torch.randn(n, 5, h, w), torch.full((1, h, w), 2.0), torch.eye(3).repeat(n, 1, 1), pose)
        return tuple(t.to(device) for t in tensors)

    n, h, w = Dim("n", min=2, max=255), Dim("h", min=2, max=4096), Dim("w", min=2, max=4096)
    shapes = {"scores": {0: n, 2: h, 3: w}, "depth": {1: h, 2: w}, "k": {0: n}, "pose": {0: n}}
    program = saved_and_loaded(torch.export.export(model, example(3, 9, 8), dynamic_shapes=shapes, strict=True))
    assert torch.ops.pyseg.warp_to_view.default in [node.target for node in program.graph.nodes]
    for size in ((3, 9, 8), (2, 5, 12)):
        arguments = example(*size)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments))


def test_valve_conv2d(device):
    model = pyseg.nn.ValveConv2d(3, 4, 3, padding=1, relu=True, valve_std=0.5).to(device)
    image, region = torch.randn(2, 3, 9, 8).to(device), torch.ones(2, 1, 9, 8).to(device)
    sides = {0: Dim("n"), 2: Dim("h", min=4, max=4096), 3: Dim("w", min=4, max=4096)}
    exported = torch.export.export(model, (image, region), dynamic_shapes={"input": sides, "region": sides})
    program = saved_and_loaded(exported)
    assert [node.target for node in program.graph.nodes].count(torch.ops.pyseg.valve_conv2d.default) == 1
    image, region = torch.randn(1, 3, 5, 12).to(device), torch.randn(1, 1, 5, 12).to(device)
    torch.testing.assert_close(program.module()(image, region), model(image, region))


class Warp(nn.Module):
    def forward(self, x, labels, affine, displacement):
        return joint_warp(x, labels, affine, displacement, size=(6, 7), gain=2.0)


def test_joint_warp(device):
    def example(n, h, w):
        torch.manual_seed(0)
        tensors = (torch.rand(n, 3, h, w), torch.randint(5, (n, h, w)), torch.randn(n, 2, 3), torch.randn(n, 2, 3, 3))
        return tuple(t.to(device) for t in tensors)

    n, h, w = Dim("n"), Dim("h", min=2, max=4096), Dim("w", min=2, max=4096)
    shapes = {"x": {0: n, 2: h, 3: w}, "labels": {0: n, 1: h, 2: w}, "affine": {0: n}, "displacement": {0: n}}
    program = saved_and_loaded(torch.export.export(Warp(), example(2, 9, 8), dynamic_shapes=shapes))
    assert torch.ops.pyseg.joint_warp.default in [node.target for node in program.graph.nodes]
    for size in ((2, 9, 8), (1, 5, 12)):
        for got, expected in zip(program.module()(*example(*size)), Warp()(*example(*size)), strict=True):
            assert torch.equal(got, expected)
