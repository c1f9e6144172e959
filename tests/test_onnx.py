"""Every operator through torch.export into ONNX's standard operators: onnxruntime agrees with pyseg.

Each case is a module and two sets of inputs: it is exported with the first, with dynamic sizes where the case has
them, and run on both. The same programs in terms of ATen alone (for other runtimes) are compared, too.
"""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim

import pyseg
from onnx_cases import Call, check, maps, onnx_session, rand, run_session
from pyseg import functional as F

# ---- feature maps ----


class Convolutions(nn.Module):
    """Dense with a folded batch norm and ReLU (packed weight), depthwise with everything, strided 1x1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense = pyseg.nn.AtrousConv2d(6, 5, 3, padding=2, dilation=2)
        self.bn = nn.BatchNorm2d(5)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.dense.fold_batch_norm(self.bn, relu=True)
        self.pointwise = pyseg.nn.AtrousConv2d(6, 5, 1, stride=2)
        self.weight, self.affine = nn.Parameter(torch.randn(6, 1, 3, 3)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        bias, scale, shift = self.affine
        depthwise = F.atrous_conv2d(
            x, self.weight, bias, padding=(2, 1), dilation=(3, 1), groups=6, scale=scale, shift=shift
        )
        return self.dense(x), depthwise, self.pointwise(x)


def test_atrous_conv2d():
    shapes = {"x": maps("n", "h", "w")}
    session = check(
        Convolutions().eval(), [(rand(2, 6, 9, 8),), (rand(1, 6, 13, 5),)], shapes, aten=True, optimize=True
    )
    assert [isinstance(size, str) for size in session.get_inputs()[0].shape] == [True, False, True, True]


def test_upsample():
    weight, shift = rand(2, 8, 3, 3), rand(2, 8)

    def function(x, y):
        return (
            F.bilinear_upsample(x, (17, 1)),
            F.bilinear_upsample(x, (7, 30), align_corners=True),
            F.bilinear_upsample(x, scale_factor=(1.5, 2.3)),
            F.upsample_concat([x, y]),
            F.upsample_concat_depthwise([x, y], weight, (1, 3), scale=shift + 1, shift=shift),
        )

    n = Dim("n", max=64)
    shapes = [({0: n, 2: Dim("h", max=99), 3: Dim("w", max=99)}, {0: n, 2: Dim("p", max=99), 3: Dim("q", max=99)})]
    check(
        Call(function),
        [(rand(2, 5, 9, 8), rand(2, 3, 5, 4)), (rand(3, 5, 6, 7), rand(3, 3, 2, 9))],
        {"args": tuple(shapes[0])},
        tolerance=1e-4,  # onnxruntime's coordinates are in single precision
    )


@pytest.mark.parametrize("axes", [1, 3])
def test_gaussian_filter(axes):
    shape = (2, 3, 9, 8, 7)[: 2 + axes]
    model = Call(lambda x: (F.gaussian_filter(x, [1.5, 0.0, 2.0][:axes]), F.gaussian_filter(x, 2.0, normalize=False)))
    check(model, [(rand(*shape),), (rand(*shape, seed=1),)])


# ---- blocks and models ----


def blocks():
    torch.manual_seed(0)
    yield "aspp", pyseg.nn.ASPP(6, (2, 3), 5)
    yield "aspp_separable", pyseg.nn.ASPP(6, (2,), 5, separable=True, project_kernel_size=3)


@pytest.mark.parametrize("name", ["aspp", "aspp_separable"])
def test_aspp(name):
    block = dict(blocks())[name].eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    check(block, [(rand(2, 6, 9, 8),), (rand(1, 6, 13, 5),)], {"x": maps("n", "h", "w")})


def test_jpu():
    torch.manual_seed(0)
    model = Call(pyseg.nn.JPU((3, 4, 5), 4).eval())
    examples = [(rand(n, 3, 12, 8), rand(n, 4, 6, 4), rand(n, 5, 3, 2)) for n in (2, 1)]
    check(model, examples, {"args": tuple({0: Dim("n")} for _ in range(3))})


class Small(nn.Module):
    """Convolution, norm, ReLU, a torchvision ASPP head: what accelerate changes."""

    def __init__(self):
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead

        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = DeepLabHead(8, 3, (2, 3))

    def forward(self, x):
        return nn.functional.interpolate(self.head(self.stem(x)), scale_factor=2.0, mode="bilinear")


def test_accelerated_model():
    """The exported model is the accelerated one: directly to torch.export, to a file of its own, and to ONNX."""
    pytest.importorskip("torchvision")
    model = pyseg.accelerate(Small().eval())
    assert any(row.became for row in pyseg.report(model).rows)
    check(model, [(rand(2, 3, 12, 10),), (rand(1, 3, 9, 15),)], {"x": maps("n", "h", "w")}, aten=True, optimize=True)
    file = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (rand(2, 3, 12, 10),)), file)
        file.seek(0)
        got = torch.export.load(file).module()(rand(2, 3, 12, 10))
        torch.testing.assert_close(got, model(rand(2, 3, 12, 10)))


# ---- boxes ----


def boxes_on(n, h, w, k, seed=0):
    """[K, 5], some beyond the map, some tiny, one at a power of two for the pyramid's levels."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(k, 2, 2, generator=generator) * torch.tensor([w, h]) * 1.3 - 2
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    boxes[0] = torch.tensor([0.0, 0.0, 8.0, 8.0])
    return torch.cat([torch.arange(k)[:, None] % n, boxes], 1)


def pooled(ratio):
    def function(x, half, boxes):
        levels = F.multiscale_roi_align([x, half], boxes, 3, [1.0, 0.5], ratio, canonical_size=8, levels=(3, 4))
        return (
            F.roi_align(x, boxes, (3, 2), sampling_ratio=ratio),
            F.roi_align(half, boxes, 2, 0.5, ratio, aligned=True),
            F.roi_align(x, boxes, (3, 2), sampling_ratio=max(ratio, 2), mode="max"),
            levels,
        )

    return Call(function)


@pytest.mark.parametrize("ratio", [2, 0])
def test_roi_align(ratio):
    def example(n, h, w, k):
        return rand(n, 4, h, w), rand(n, 4, h // 2, w // 2), boxes_on(n, h, w, k)

    shapes = ({0: Dim("n"), 2: Dim("h", min=4), 3: Dim("w", min=4)}, {0: Dim("n"), 2: Dim("p"), 3: Dim("q")})
    shapes = {"args": (*shapes, {0: Dim("k")})}
    session = check(pooled(ratio), [example(2, 16, 20, 9), example(3, 12, 11, 5)], shapes, aten=ratio > 0)
    assert isinstance(session.get_inputs()[2].shape[0], str)


def test_roi_align_rotated_and_of_volumes():
    rotated = torch.tensor([[0, 5.0, 6.0, 8.0, 3.0, 30.0], [1, 2.0, 3.0, 9.0, 5.0, -70.0]])
    volumes = torch.tensor([[1, -2.0, 1.0, 0.5, 6.0, 5.0, 4.0], [0, 1.0, 1.0, 1.0, 1.5, 9.0, 2.0]])
    model = Call(
        lambda x, a, y, b: (
            F.roi_align(x, a, (3, 2), 0.8, 2),
            F.multiscale_roi_align([x, x[:, :, ::2, ::2]], a, 2, [1.0, 0.5], 2, canonical_size=5),
            F.roi_align(y, b, (2, 1, 3), sampling_ratio=1, aligned=True, mode="max"),
        )
    )
    check(model, [(rand(2, 3, 12, 10), rotated, rand(2, 3, 5, 6, 7), volumes)])


def test_paste_and_crop_masks():
    boxes = torch.tensor([[2.5, 3.0, 14.0, 9.0], [-4.0, -2.0, 6.0, 30.0], [7.0, 7.0, 7.5, 7.2], [9.0, 4.0, 3.0, 8.0]])
    masks = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(0))

    def function(masks, boxes):
        dense = F.paste_masks(masks, boxes, (13, 19))
        above = F.paste_masks(masks, boxes, (13, 19), 0.4)
        packed = F.paste_masks(masks, boxes, (13, 19), 0.4, "packed")
        return dense, above, packed, F.crop_masks(above, boxes, torch.arange(masks.shape[0]), 4, sampling_ratio=2)

    check(Call(function), [(masks, boxes), (masks[:3], boxes[1:] + 1)], {"args": ({0: Dim("k")}, {0: Dim("k")})})


def test_nms():
    def example(k, seed):
        boxes = boxes_on(1, 20, 20, k, seed)[:, 1:]
        scores = (rand(k, seed=seed) * 4).round() / 4  # with equal ones
        return boxes, scores, torch.arange(k) * 7 % 3 - 1

    def function(boxes, scores, classes):
        return (
            F.nms(boxes, scores, 0.3),
            F.batched_nms(boxes, scores, classes, 0.3),
            *F.nms_padded(boxes, scores, 0.3, classes),
        )

    k = {0: Dim("k")}
    check(Call(function), [example(40, 0), example(23, 1), example(1, 2)], {"args": (k, k, k)}, optimize=True)


def test_what_has_no_form():
    x, boxes = rand(1, 2, 8, 8), boxes_on(1, 8, 8, 3)
    rotated = torch.cat([boxes, boxes[:, :1]], 1)
    for function, arguments, message in (
        (lambda x, b: F.roi_align(x, b, 2, mode="max"), (x, boxes), 'positive for mode "max", got -1'),
        (lambda x, b: F.roi_align(x, b, 2), (x, rotated), "sampling_ratio must be positive"),
        (lambda x, i: F.dense_crf(x, i, accuracy="high"), (x, rand(1, 3, 8, 8)), "needs a sparse product"),
        (lambda f, _: F.permutohedral_lattice(f).weight, (rand(1, 6, 4), x), "at most 5 dimensions"),
    ):
        with pytest.raises(Exception) as raised:
            pyseg.export_onnx(Call(function), arguments)
        assert message in "".join(map(str, causes(raised.value)))


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__


# ---- label maps ----


def test_confusion_matrix():
    def function(x, target):
        labels = x.argmax(1)
        return (
            F.confusion_matrix(x, target, ignore_index=255),
            F.confusion_matrix(labels, target, 5, 255, per_image=True),
            F.iou(F.confusion_matrix(x, target, ignore_index=255)),
        )

    def example(n, h, w):
        target = torch.randint(0, 6, (n, h, w), generator=torch.Generator().manual_seed(0))
        return rand(n, 5, h, w), torch.where(target == 5, 255, target)

    n, h, w = Dim("n"), Dim("h", min=2), Dim("w", min=2)
    shapes = {"args": ({0: n, 2: h, 3: w}, {0: n, 1: h, 2: w})}
    check(Call(function), [example(2, 9, 8), example(3, 5, 6)], shapes, optimize=True)
    wrong = example(2, 9, 8)
    wrong[1][1, 0, 0] = 7
    session = onnx_session(pyseg.export_onnx(Call(function), example(2, 9, 8), optimize=False))
    whole, each, _ = run_session(session, wrong)
    assert (whole < 0).all()
    assert (each[0] >= 0).all()
    assert (each[1] < 0).all()


def test_distance_transform():
    def function(mask, labels):
        return (
            F.distance_transform(mask, (1.0, 0.7)),
            F.distance_transform(mask, signed=True, dtype=torch.float64),
            F.distance_transform(labels, labels=True, squared=True),
            F.distance_transform(labels, labels=True, zero_background=True, dims=3),
            *F.distance_to_two_nearest_objects(labels, (1.0, 0.7)),
        )

    def example(n, h, w, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 4, (n, h, w), generator=generator) * (rand(n, h, w, seed=seed) > 0.8)
        mask = labels == 0
        mask[0] = True  # no background
        return mask, labels

    sizes = {0: Dim("n", min=2, max=64), 2: Dim("w", min=2, max=64)}
    check(Call(function), [example(2, 9, 8, 0), example(3, 9, 5, 1)], {"args": (sizes, sizes)})


def test_distance_indices():
    """Any of several nearest elements will do: they are as far away."""
    mask = rand(2, 9, 7) > -1.2
    model = Call(lambda x: F.distance_transform(x, (1.0, 0.7), return_indices=True))
    distances = F.distance_transform(mask, (1.0, 0.7))

    def compare(got, expected):
        if got.dtype != torch.int64:
            torch.testing.assert_close(got, expected)
            return
        own = torch.stack(torch.meshgrid(torch.arange(9), torch.arange(7), indexing="ij"))
        steps = (got - own) * torch.tensor([1.0, 0.7]).view(2, 1, 1)
        torch.testing.assert_close(steps.square().sum(1).sqrt(), distances)
        assert not mask.flatten(1).gather(1, (got[:, 0] * 7 + got[:, 1]).flatten(1)).any()

    check(model, [(mask,)], compare=compare)


def test_losses():
    def function(x, target):
        return (
            F.dice_loss(x, target, mode="multiclass"),
            pyseg.nn.DiceCELoss()(x, target),
            F.focal_loss(x, target, mode="multiclass", ignore_index=1),
            pyseg.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)(x, target),
        )

    def example(n, h, w):
        return rand(n, 4, h, w), torch.randint(0, 4, (n, h, w), generator=torch.Generator().manual_seed(0))

    check(Call(function), [example(2, 9, 8)])


# ---- dense CRFs ----


def refined(iterations=2, smoothness=3.0, **options):
    def function(x, image):
        unary = -x.log_softmax(1)
        return F.dense_crf(unary, image, iterations=iterations, smoothness=smoothness, spatial_sigma=8.0, **options)

    return Call(function)


def scene(n, h, w):
    return rand(n, 3, h, w) * 2, rand(n, 3, h, w, seed=1).cumsum(3) * 20


def test_dense_crf():
    """The lattice too: its vertices by Unique, neighbours too."""
    sizes = maps("n", "h", "w")
    examples = [scene(2, 12, 9), scene(1, 7, 10)]
    check(refined(iterations=1), examples, {"args": (sizes, sizes)}, tolerance=1e-4)
    check(refined(output="labels", appearance=None), [scene(2, 12, 9)], optimize=True)


def test_dense_crf_exact():
    check(refined(accuracy="exact", normalization="after"), [scene(2, 7, 6)])


def test_permutohedral_lattice():
    """All results of a lattice that a user takes apart."""

    def function(features, values):
        lattice = F.permutohedral_lattice(features)
        return F.permutohedral_filter(lattice, values), lattice.offset, lattice.weight.sum(2), lattice.neighbour >= 0

    def features(n, d, p):
        return rand(n, d, p, seed=d) * 3, rand(n, 2, p)

    def sorted_counts(got, expected):
        if got.dtype == torch.bool:  # the order of the vertices is each one's own
            got, expected = got.sum((1, 2)), expected.sum((1, 2))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    for d in (1, 3):
        check(Call(function), [features(2, d, 30)], compare=sorted_counts, optimize=d == 1)
