"""torch.compile(fullgraph=True, dynamic=True) of the operators: same results as eager mode, no graph breaks."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import pyseg
from pyseg.functional import (
    atrous_conv2d,
    bilinear_upsample,
    confusion_matrix,
    dense_crf,
    distance_to_two_nearest_objects,
    distance_transform,
    expectation_labels,
    fuse_query,
    gaussian_filter,
    iou,
    joint_warp,
    permutohedral_filter,
    permutohedral_lattice,
    pixel_links,
    sparse_pairwise,
    upsample_concat,
    upsample_concat_depthwise,
    valve_conv2d,
    warp_to_view,
)

BACKENDS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend, dynamic=True):
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def available(device, backend):
    if device == "cuda" and backend == "inductor":
        pytest.skip("needs a GPU: inductor writes kernels of its own")


def images(device, *sizes, channels=5, requires_grad=False):
    torch.manual_seed(0)
    for n, h, w in sizes:
        yield torch.randn(n, channels, h, w).to(device).requires_grad_(requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 5])
def test_atrous_conv2d(device, backend, groups):
    """Forward and backward, every differentiable argument, sizes and channels that change without recompiling."""
    available(device, backend)
    torch.manual_seed(1)
    weight = torch.randn(5, 5 // groups, 3, 3).to(device).requires_grad_()
    bias, scale, shift = (torch.randn(5).to(device).requires_grad_() for _ in range(3))

    def function(x, weight, bias, scale, shift):
        y = atrous_conv2d(x.sin(), weight, bias, 1, 2, (1, 2), groups, scale=scale, shift=shift, relu=True)
        return y.cos()

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = compiled(function, counter)
    for x in images(device, (2, 7, 9), (3, 8, 6), (4, 11, 7), requires_grad=True):
        results = []
        for f in (function, fast):
            y = f(x, weight, bias, scale, shift)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias, scale, shift))])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-3)
            assert eager.stride() == other.stride()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_atrous_conv2d_channels_last(backend):
    weight = torch.randn(6, 5, 3, 3)
    fast = compiled(lambda x: atrous_conv2d(x, weight, padding=1) * 2, backend)
    for x in images("cpu", (2, 7, 9), (3, 6, 8)):
        x = x.contiguous(memory_format=torch.channels_last)
        y = fast(x)
        torch.testing.assert_close(y, atrous_conv2d(x, weight, padding=1) * 2)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_atrous_conv2d_out(backend):
    """A concatenation written in place stays one under functionalisation."""
    weights = [torch.randn(4, 5, 3, 3) for _ in range(2)]

    def concatenate(x):
        n, _, h, w = x.shape
        both = x.new_zeros(n, 8, h, w)
        for index, weight in enumerate(weights):
            atrous_conv2d(x, weight, padding=1, relu=True, out=both[:, 4 * index : 4 * index + 4])
        return both + 1

    fast = compiled(concatenate, backend)
    for x in images("cpu", (2, 7, 9), (1, 6, 8)):
        torch.testing.assert_close(fast(x), concatenate(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_atrous_conv2d_autocast(backend):
    weight = torch.randn(4, 5, 3, 3)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return atrous_conv2d(x, weight, padding=1)

    fast = compiled(function, backend)
    (x,) = images("cpu", (1, 7, 9))
    assert fast(x).dtype == torch.bfloat16
    assert torch.equal(fast(x), function(x))
    plain = compiled(lambda x: atrous_conv2d(x, weight, padding=1), backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), function(x))


@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_atrous_conv2d_pointwise(stride):
    """1x1 on the CPU, thinned out by the stride; sizes that change without recompiling."""
    weight = torch.randn(4, 5, 1, 1).requires_grad_()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x):
        return atrous_conv2d(x.sin(), weight, stride=stride, relu=True) * 2

    fast = compiled(function, counter)
    for x in images("cpu", (2, 7, 9), (3, 8, 6), (4, 11, 7), requires_grad=True):
        results = []
        for f in (function, fast):
            y = f(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-4)
            assert eager.stride() == other.stride()
    assert counter.frame_count == 1


def test_atrous_conv2d_torch_path():
    """What goes to torch compiles as well."""
    weight = torch.randn(4, 5, 3, 3)
    fast = compiled(lambda x: atrous_conv2d(x, weight, stride=2, scale=torch.ones(4), relu=True), "aot_eager")
    (x,) = images("cpu", (1, 7, 9))
    torch.testing.assert_close(fast(x), atrous_conv2d(x, weight, stride=2, scale=torch.ones(4), relu=True))


def test_atrous_conv2d_error():
    """A wrong shape is named while tracing."""
    fast = compiled(lambda x, w: atrous_conv2d(x, w), "aot_eager")
    with pytest.raises(Exception, match="weight must be .* got"):
        fast(torch.ones(1, 4, 8, 8), torch.ones(4, 5, 3, 3))


def test_tf32_switch_does_not_break_the_graph(device):
    """Read when traced; torch's own switches, both kinds, may have been set before."""
    if device == "cpu":
        fast = compiled(lambda x: x * pyseg._ops.atrous_conv2d.cudnn_allows_tf32(), "aot_eager")
        (x,) = images(device, (1, 4, 4))
    else:
        weight = torch.randn(4, 5, 3, 3).to(device)
        fast = compiled(lambda x: atrous_conv2d(x, weight, padding=1), "aot_eager")
        (x,) = images(device, (1, 6, 6))
    before = torch._C._get_fp32_precision_getter("cuda", "conv")
    try:
        torch.backends.cudnn.allow_tf32 = False
        fast(x)
        torch._dynamo.reset()
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        fast(x)
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.conv.fp32_precision = before


def block(device, fold):
    torch.manual_seed(0)
    conv = pyseg.nn.AtrousConv2d(5, 6, 3, padding=2, dilation=2)
    bn = nn.BatchNorm2d(6)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    model = nn.ModuleDict({"conv": conv, "bn": bn}).to(device).eval()
    if fold:
        conv.fold_batch_norm(bn, relu=True)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
def test_module_follows_its_weights(device, backend, fold, mode):
    """A compiled module must never use a packed weight, scale or shift of parameters that it no longer has."""
    available(device, backend)
    model = block(device, fold)
    conv, bn = model["conv"], model["bn"]
    (x,) = images(device, (2, 9, 8))
    with mode():
        conv(x)  # eager mode has cached by now
        fast = compiled(conv, backend)
        torch.testing.assert_close(fast(x), conv(x), rtol=1e-4, atol=1e-4)

    def in_place():
        conv.weight.mul_(-1.5)
        bn.running_mean.add_(1)

    def through_data():
        conv.weight.data.add_(0.3)
        bn.weight.data.mul_(2)

    def swapped():
        conv.weight.data = conv.weight.data * 0.5 + 0.1
        bn.bias.data = bn.bias.data + 3

    def loaded():
        conv.load_state_dict({name: torch.ones_like(value) for name, value in conv.state_dict().items()})

    def replaced():
        conv.weight = nn.Parameter(torch.full_like(conv.weight, 0.1))

    for change in (in_place, through_data, swapped, loaded, replaced):
        with torch.no_grad():
            change()
        with mode():
            fresh = copy.deepcopy(model)["conv"]
            torch.testing.assert_close(fast(x), fresh(x), rtol=1e-4, atol=1e-4, msg=lambda m, c=change: f"{c}: {m}")


def test_module_of_inference_tensors():
    with torch.inference_mode():
        model = block("cpu", fold=True)
        conv = model["conv"]
        (x,) = images("cpu", (2, 9, 8))
        fast = compiled(conv, "aot_eager")
        torch.testing.assert_close(fast(x), conv(x))
        conv.weight.mul_(2)
        torch.testing.assert_close(fast(x), copy.deepcopy(model)["conv"](x))


def test_module_trains():
    """Training mode to eval mode and back under one compiled module."""
    conv = block("cpu", fold=True)["conv"]
    fast = compiled(conv, "aot_eager")
    (x,) = images("cpu", (2, 9, 8))
    for training in (True, False, True):
        conv.train(training)
        got = torch.autograd.grad(fast(x).square().sum(), list(conv.parameters()))
        want = torch.autograd.grad(conv(x).square().sum(), list(conv.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_freezing_folds_the_packing():
    """With inductor's freezing the weights are constants of the graph, and so is what is packed of them."""
    import torch._inductor.config as config
    from torch._inductor.utils import run_and_get_code

    conv = block("cpu", fold=False)["conv"]
    (x,) = images("cpu", (2, 9, 8))
    with torch.no_grad(), config.patch(freezing=True):
        fast = compiled(conv, "inductor", dynamic=False)
        y, code = run_and_get_code(fast, x)
        torch.testing.assert_close(y, conv(x))
    assert "_atrous_conv2d_pack" not in "".join(code)


# ---- distance_transform ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_transform(device, backend):
    """Everything that it returns, in graphs with operators around it, sizes that change without recompiling."""
    from torch._dynamo.testing import CompileCounterWithBackend

    available(device, backend)

    def function(x):
        distances, indices = distance_transform(x > 0, (2.0, 1.0), signed=True, return_indices=True)
        first, second = distance_to_two_nearest_objects((x > 0.5).int() + (x > 1))
        return distances * 2, indices + 1, first - distances, second

    counter = CompileCounterWithBackend(backend)
    fast = compiled(function, counter)
    for x in images(device, (2, 7, 9), (3, 8, 6), (4, 11, 7)):
        for eager, other in zip(function(x), fast(x), strict=True):
            torch.testing.assert_close(eager, other)
            assert eager.stride() == other.stride()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_confusion_matrix(device, backend):
    """From logits and from labels, with what is computed of it, for sizes that change without recompiling."""
    available(device, backend)

    def scores(x, target):
        matrix = confusion_matrix(x * 2, target, None, 255)
        labels = confusion_matrix(x.argmax(1), target, 5, 255, per_image=True)
        return matrix, labels, iou(matrix, reduction="mean")

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = compiled(scores, counter)
    for x in images(device, (2, 7, 9), (3, 8, 6), (4, 11, 7)):
        target = torch.randint(0, 5, x[:, 0].shape).to(device)
        target[:, 0] = 255
        for eager, other in zip(scores(x, target), fast(x, target), strict=True):
            torch.testing.assert_close(eager, other)
    assert counter.frame_count == 1


def test_metric_module():
    """update() in the graph of a compiled evaluation step: the buffer changes in place."""
    metric = pyseg.nn.ConfusionMatrix(5, 255)
    step = compiled(lambda x, target: metric.update(x.sin(), target), "aot_eager")
    total = 0
    for x in images("cpu", (2, 7, 9), (3, 8, 6)):
        target = torch.randint(0, 5, x[:, 0].shape)
        step(x, target)
        total = total + confusion_matrix(x.sin(), target)
    assert torch.equal(metric.compute(), total)


def test_expectation_labels(device):
    """Labels and biases, for sizes that change without recompiling."""

    def function(x, present):
        labels, bias = expectation_labels(
            x * 2, present, background_share=0.4, foreground_share=0.2, sweeps=3, return_bias=True
        )
        return labels + 1, bias * 2

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = compiled(function, counter)
    frames = []
    for x in images(device, (2, 7, 9), (3, 8, 6), (4, 11, 7)):
        present = x[:, :, 0, 0] > -0.5
        for eager, other in zip(function(x, present), fast(x, present), strict=True):
            torch.testing.assert_close(eager, other)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1  # the first call hands two graphs to the backend, later ones none


# ---- roi_align ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_roi_align(backend):
    """One map and a pyramid, forward and backward, for sizes and numbers of boxes that change without recompiling."""

    def function(x, y, boxes):
        one = pyseg.functional.roi_align(x.sin(), boxes, 3, 0.5, 2)
        all_levels = pyseg.functional.multiscale_roi_align([x, y], boxes, 3, [1.0, 0.5], 2, canonical_size=6)
        return one.cos() + all_levels

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = compiled(function, counter)
    for count, x in zip(
        (13, 15, 17), images("cpu", (2, 8, 9), (3, 10, 6), (4, 11, 7), requires_grad=True), strict=True
    ):
        y = torch.randn(x.shape[0], 5, x.shape[2] + 20, x.shape[3] + 30, requires_grad=True)
        boxes = torch.rand(count, 5) * torch.tensor([1.9, 4, 4, 9, 9])  # sizes that differ are different symbols
        boxes = torch.cat([boxes[:, :1].floor(), boxes[:, 1:]], 1)
        results = []
        for f in (function, fast):
            z = f(x, y, boxes)
            results.append([z, *torch.autograd.grad(z.square().sum(), (x, y))])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other)
            assert eager.stride() == other.stride()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "operator",
    ["roi_align", "atrous_conv2d", "1x1", "bilinear_upsample", "upsample_concat", "upsample_concat_depthwise"],
)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_number_of_images_that_is_data(operator, backend):
    """channels_last stays channels_last: inductor refuses outputs whose strides are not those that were promised."""

    def applied(x, keep, other):
        rows = x[keep.nonzero()[:, 0]].contiguous(memory_format=torch.channels_last)
        if operator == "roi_align":
            return pyseg.functional.roi_align(rows, other, 3)
        if operator == "bilinear_upsample":
            return pyseg.functional.bilinear_upsample(rows, (13, 11))
        if operator == "upsample_concat":
            return pyseg.functional.upsample_concat([rows, rows[:, :3, ::2]], (13, 11))
        if operator == "upsample_concat_depthwise":
            return pyseg.functional.upsample_concat_depthwise([rows], other, (1, 2)).flatten(0, 1)
        if operator == "1x1":
            return atrous_conv2d(rows, other, stride=2)
        return atrous_conv2d(rows, other, padding=1)

    def function(*arguments):
        return applied(*arguments) + 1  # strides are checked where something reads them

    fast = compiled(function, backend)
    x = next(images("cpu", (4, 8, 9))).contiguous(memory_format=torch.channels_last)
    for keep in ([True, False, True, True], [False, True, False, False]):
        index = torch.arange(sum(keep))[:, None]
        other = torch.cat([index, torch.tensor([[1.0, 2, 5, 6]]).expand(len(index), 4)], 1)
        if operator != "roi_align":
            shapes = {"1x1": (6, 5, 1, 1), "upsample_concat_depthwise": (2, 5, 3, 3)}
            other = torch.ones(shapes.get(operator, (6, 5, 3, 3)))
        got, expected = (f(x, torch.tensor(keep), other) for f in (fast, function))
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()
        assert expected.is_contiguous(memory_format=torch.channels_last)


def test_multiscale_roi_align_module():
    pooler = pyseg.nn.MultiScaleRoIAlign(["0", "1"], 3, 2, canonical_scale=6)
    fast = compiled(pooler, "aot_eager")
    for (x,) in (images("cpu", (2, 8, 12)), images("cpu", (2, 16, 10))):
        features = {"0": x, "1": x[..., ::2, ::2].contiguous(), "pool": x}
        boxes = [torch.tensor([[1.0, 2, 5, 6]]), torch.tensor([[0.0, 0, 7, 7], [2, 1, 3, 4]])]
        shapes = [(x.shape[2], x.shape[3])] * 2
        torch.testing.assert_close(fast(features, boxes, shapes), pooler(features, boxes, shapes))


# ---- dense CRF ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_filters(device, backend):
    """Forward and backward; the number of vertices is a size of the graph, unless max_vertices fixes it."""
    available(device, backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def filtered(features, values):
        lattice = permutohedral_lattice(features.sin())
        padded = permutohedral_lattice(features.cos(), max_vertices=2000)
        result = permutohedral_filter(lattice, values) + permutohedral_filter(padded, values)
        return gaussian_filter(result, (1.5, 0.0)).square()

    fast = compiled(filtered, counter)
    frames = []
    for x in images(device, (2, 7, 9), (3, 8, 6), (4, 11, 7), channels=3):
        results = []
        for f in (filtered, fast):
            features, values = x.clone().requires_grad_(), x.cos().requires_grad_()
            y = f(features, values)
            results.append([y, *torch.autograd.grad(y.sum(), (features, values))])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-3, atol=1e-3)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_crf(device, backend, requires_grad):
    """The fused iterations, and the differentiable ones with their gradients."""
    available(device, backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def marginals(x, image):
        return dense_crf(x.sin() * 3, image * 9, iterations=1) * 2

    fast = compiled(marginals, counter)
    frames = []
    for x in images(device, (2, 7, 9), (3, 8, 6), (4, 9, 7), requires_grad=requires_grad):
        results = []
        for f in (marginals, fast):
            y = f(x, x.detach()[:, :3])
            results.append([y, *(torch.autograd.grad(y[:, 0].sum(), x) if requires_grad else [])])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-3, atol=1e-4)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def test_sparse_pairwise(device):
    """Values and weights with their gradients; sizes and numbers of links that change without recompiling."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def summed(x, links, weights):
        return sparse_pairwise(x.sin(), links._replace(weights=weights)) * 2

    fast = compiled(summed, counter)
    frames = []
    for x in images(device, (2, 7, 9), (3, 8, 6), (4, 9, 7), requires_grad=True):
        pixels = x[:, 0].numel()
        starts, columns = torch.arange(pixels + 1), torch.arange(pixels).flip(0)
        links = type(pixel_links(starts, columns))(*[t.to(device) for t in pixel_links(starts, columns)])
        weights = torch.randn(pixels).to(device).requires_grad_()
        results = []
        for f in (summed, fast):
            y = f(x, links, weights)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, weights))])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1]


def test_crf_module_trains():
    module = pyseg.nn.CRFasRNN(5, iterations=1)
    fast = compiled(module, "aot_eager")
    (x,) = images("cpu", (2, 7, 9))
    got = torch.autograd.grad(fast(x, x[:, :3]).square().sum(), list(module.parameters()))
    want = torch.autograd.grad(module(x, x[:, :3]).square().sum(), list(module.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# ---- fuse_query ----


@pytest.mark.parametrize(
    ("backend", "layout"), [("aot_eager", torch.contiguous_format), ("inductor", torch.channels_last)], ids=str
)
def test_fuse_query(device, backend, layout):
    """One graph for all sizes; its backward is the operator's own."""
    available(device, backend)
    torch.manual_seed(1)
    weight, bias = torch.randn(6, 5 + 3 + 8, 1, 1).to(device), torch.randn(6).to(device)

    def function(x, q, weight, bias):
        return fuse_query(x.sin(), q, weight, bias, normalize=True, relu=True).cos()

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = compiled(function, counter)
    for n, h, w in ((2, 7, 9), (3, 8, 6)):
        (x,) = images(device, (n, h, w))
        arguments = (x.contiguous(memory_format=layout), torch.randn(n, 3).to(device), weight, bias)
        leaves = [t.detach().requires_grad_() for t in arguments]
        results = []
        for f in (function, fast):
            y = f(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-4)
            assert eager.stride() == other.stride()
    assert counter.frame_count == 1


# ---- upsample ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bilinear_upsample(device, backend, layout):
    """Sizes given, by a factor and from another map, forward and backward, without recompiling."""
    available(device, backend)

    def function(x, y):
        z = bilinear_upsample(x.sin(), scale_factor=1.5)
        return upsample_concat([y, z, bilinear_upsample(x, y.shape[2:], align_corners=True)]).cos()

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = compiled(function, counter)
    for n, h, w in ((2, 7, 9), (3, 8, 6), (4, 11, 7)):
        (x,) = images(device, (n, h, w))
        y = torch.randn(n, 3, 2 * h, 2 * w).to(device)
        leaves = [t.contiguous(memory_format=layout).requires_grad_() for t in (x, y)]
        results = []
        for f in (function, fast):
            z = f(*leaves)
            results.append([z, *torch.autograd.grad(z.square().sum(), leaves)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-4)
            assert eager.stride() == other.stride()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_upsample_concat_depthwise(device, backend, layout):
    available(device, backend)
    torch.manual_seed(1)
    weight = torch.randn(3, 8, 3, 3).to(device).requires_grad_()
    scale, shift = (torch.randn(3, 8).to(device).requires_grad_() for _ in range(2))

    def function(x, y, weight, scale, shift):
        parts = upsample_concat_depthwise([x.sin(), y], weight, (1, 2, 4), scale=scale, shift=shift).unbind(0)
        return parts[0] * parts[1] + parts[2]

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = compiled(function, counter)
    for n, h, w in ((2, 9, 13), (3, 14, 22), (4, 17, 30)):  # sizes that are equal at first count as one
        (x,) = images(device, (n, h, w))
        y = torch.randn(n, 3, h // 2, w // 2).to(device)
        leaves = [*(t.contiguous(memory_format=layout).requires_grad_() for t in (x, y)), weight, scale, shift]
        results = []
        for f in (function, fast):
            z = f(*leaves)
            results.append([z, *torch.autograd.grad(z.square().sum(), leaves)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-3, atol=1e-2)
            assert eager.stride() == other.stride()
    assert counter.frame_count == 1


def test_warp_to_view(device):
    """Forward and backward, sizes that change."""

    def function(x, depth, k, pose):
        y, valid = warp_to_view(x.sin(), depth, k, k, pose)
        return y.cos() * valid.unsqueeze(1)

    fast = compiled(function, "aot_eager")
    for n, h, w in ((2, 7, 9), (3, 8, 6)):
        (x,) = images(device, (n, h, w), requires_grad=True)
        depth, k = torch.full((n, h, w), 2.0).to(device), torch.eye(3).repeat(n, 1, 1).to(device)
        pose = torch.eye(4).repeat(n, 1, 1)
        pose[:, 0, 3] = 0.7
        results = []
        for f in (function, fast):
            y = f(x, depth, k, pose.to(device))
            results.append([y, *torch.autograd.grad(y.square().sum(), x)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other)
            assert eager.stride() == other.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_valve_conv2d(device, backend):
    """The fused operator and the gate behind a convolution, forward and backward, on maps that change their size."""
    available(device, backend)
    torch.manual_seed(1)
    weights = [torch.randn(4, channels, 3, 3).to(device).requires_grad_() for channels in (3, 33, 1)]

    def function(image, features, region):
        few = valve_conv2d(image, region, weights[0], weights[2], padding=1, relu=True)
        return few + valve_conv2d(features, region, weights[1], weights[2], padding=1)

    fast = compiled(function, backend)
    for n, h, w in ((2, 7, 9), (3, 8, 6)):
        arguments = [torch.randn(n, channels, h, w).to(device) for channels in (3, 33, 1)]
        results = []
        for f in (function, fast):
            y = f(*arguments)
            results.append([y, *torch.autograd.grad(y.square().sum(), weights)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-3, atol=1e-3)


def test_joint_warp(device):
    """Image, soft and hard labels, forward and backward, sizes that change without recompiling."""

    def function(x, soft, labels, affine, displacement):
        y, warped = joint_warp(x.sin(), soft, affine, displacement, gain=1.5, border="constant")
        return y.cos(), warped, joint_warp(x, labels, affine, displacement, ignore_index=-1)[1]

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = compiled(function, counter)
    frames = []
    for n, h, w in ((6, 7, 9), (7, 8, 12), (8, 11, 10)):  # sizes that are equal at first count as one
        (x,) = images(device, (n, h, w), requires_grad=True)
        soft, labels = torch.rand(n, 4, h, w), torch.randint(5, (n, h, w))
        others = [t.to(device) for t in (soft, labels, torch.randn(n, 2, 3), torch.randn(n, 2, 3, 3))]
        results = []
        for f in (function, fast):
            outputs = f(x, *others)
            results.append([*outputs, *torch.autograd.grad(outputs[0].square().sum(), x)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-4)
            assert eager.stride() == other.stride()
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3
