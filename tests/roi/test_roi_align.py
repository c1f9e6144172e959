"""roi_align and multiscale_roi_align against the reference, torchvision and finite differences."""

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from roi_cases import LAYOUTS, make_boxes, make_map, on_grid

import pyseg
from pyseg import reference
from pyseg.functional import multiscale_roi_align, roi_align

FLOAT, DOUBLE = torch.float32, torch.float64
DTYPES = [FLOAT, DOUBLE, torch.float16, torch.bfloat16]
KINDS = {"aligned": (9, 13), "rotated": (9, 13), "volume": (5, 7, 9)}
ROUNDING = {FLOAT: 2e-5, DOUBLE: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_near(actual, expected, dtype=None):
    tolerance = ROUNDING[dtype or actual.dtype]
    torch.testing.assert_close(actual.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_near_sum(actual, expected):
    """Of gradients: sums over boxes of any magnitude."""
    tolerance = ROUNDING[actual.dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


def pool(input, boxes, *arguments, **options):
    """Forward and the map's gradient, of pyseg and of the reference."""
    x = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = roi_align(x, boxes, *arguments, **options)
    grad = make_map(y.shape, y.dtype, seed=5).to(y.device)
    (dx,) = torch.autograd.grad(y, x, grad)
    x_ref = input.detach().cpu().double().requires_grad_()
    y_ref = reference.roi_align(x_ref, boxes.cpu(), *arguments, **options)
    (dx_ref,) = torch.autograd.grad(y_ref, x_ref, grad.cpu().double()) if y_ref.requires_grad else (x_ref.detach() * 0,)
    return (y, dx), (y_ref.detach(), dx_ref)


# ---- against the reference ----


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 1, 3])
def test_reference(device, kind, mode, aligned, ratio):
    size = KINDS[kind]
    output_size = (2, 3, 2) if kind == "volume" else (3, 2)
    boxes = on_grid(make_boxes(4, 2, size, kind=kind)).to(device)
    for channels in (3, 18) if ratio == 1 else (2,):
        input = make_map((2, channels, *size)).to(device)
        got, expected = pool(input, boxes, output_size, 0.5 if ratio == 1 else 1.0, ratio, aligned, mode=mode)
        assert_near(got[0], expected[0])
        if mode == "avg" or ratio:  # adaptive points may coincide, and then the maximum is not one point's
            assert_near_sum(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_dtypes_and_layouts(device, dtype, layout, mode):
    """Channel counts on both sides of the vectors' and the blocks' lengths."""
    for channels in (1, 5, 70):
        input = make_map((2, channels, 6, 19), dtype, layout).to(device)
        boxes = on_grid(make_boxes(3, 2, (6, 19), seed=channels)).to(device)
        got, expected = pool(input, boxes, (2, 3), 1.0, 2, mode=mode)
        assert got[0].dtype == dtype
        assert_near(got[0], expected[0])
        if layout != "expanded" and (mode == "avg" or dtype in (FLOAT, DOUBLE)):
            assert_near_sum(got[1], expected[1])


def test_memory_formats(device):
    x = make_map((2, 5, 6, 7), layout="channels_last").to(device).requires_grad_()
    boxes = make_boxes(3, 2, (6, 7)).to(device)
    y = roi_align(x, boxes, 3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    assert dx.is_contiguous(memory_format=torch.channels_last)
    y = roi_align(x.contiguous(), boxes, 3)
    assert y.is_contiguous()
    volume = make_map((2, 5, 4, 6, 7), layout="channels_last").to(device)
    y = roi_align(volume, make_boxes(3, 2, (4, 6, 7)).to(device), 3)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@st.composite
def drawn(draw):
    kind = draw(st.sampled_from([*KINDS]))
    dims = len(KINDS[kind])
    size = [draw(st.integers(1, 40 if dims == 2 else 9)) for _ in range(dims)]
    images, channels = draw(st.integers(1, 2)), draw(st.integers(1, 20))
    input = make_map(
        (images, channels, *size),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUTS[:4])),
        draw(st.integers(0, 9)),
    )
    boxes = make_boxes(
        draw(st.integers(0, 3)),
        images,
        size,
        kind=kind,
        seed=draw(st.integers(0, 99)),
        least=draw(st.sampled_from([0.0, 0.3, 3.0])),
        beyond=draw(st.sampled_from([0.0, 0.5, 2.0])),
    )
    output_size = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    return (
        input,
        on_grid(boxes),
        output_size,
        draw(st.sampled_from([1.0, 0.5, 0.25])),
        draw(st.integers(-1, 3)),
        draw(st.booleans()),
    )


def test_drawn_cases(device):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn())
    def run(case):
        input, boxes, *arguments = case
        got, expected = pool(input.to(device), boxes.to(device), *arguments)
        assert_near(got[0], expected[0])
        assert_near_sum(got[1], expected[1])

    run()


# ---- against torchvision ----


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 0, 2])
def test_torchvision(device, layout, aligned, ratio):
    """Lists and rows of boxes, on maps large enough for whole blocks, some boxes beyond the map."""
    input = make_map((2, 18, 33, 50), layout=layout).to(device).requires_grad_()
    plain = input.detach().cpu().contiguous().requires_grad_()
    boxes = make_boxes(12, 2, (66, 100), seed=3, beyond=0.5)
    for each in (boxes, [boxes[boxes[:, 0] == i, 1:] for i in range(2)]):
        for output_size in (7, (14, 3)):
            on_device = [b.to(device) for b in each] if isinstance(each, list) else each.to(device)
            got = roi_align(input, on_device, output_size, 0.5, ratio, aligned)
            expected = torchvision.ops.roi_align(plain, each, output_size, 0.5, ratio, aligned)
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
            grad = make_map(expected.shape, seed=1)
            (dx,) = torch.autograd.grad(got, input, grad.to(device))
            (dx_ref,) = torch.autograd.grad(expected, plain, grad)
            torch.testing.assert_close(dx.cpu(), dx_ref, rtol=1e-4, atol=2e-4)


SPECIAL = {
    "inverted": [7.0, 6.0, 2.0, 1.0],
    "inverted in x": [7.0, 1.0, 2.0, 6.0],
    "zero area": [3.0, 3.0, 3.0, 3.0],
    "a line": [1.0, 3.0, 8.0, 3.0],
    "left of the map": [-30.0, 1.0, -20.0, 5.0],
    "below the map": [1.0, 40.0, 5.0, 60.0],
    "the whole map": [0.0, 0.0, 11.0, 9.0],
    "far larger than the map": [-300.0, -200.0, 400.0, 250.0],
    "on the border": [-1.0, -1.0, 12.0, 10.0],
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_boxes(device, name):
    boxes = torch.tensor([[0.0, *SPECIAL[name]]])
    input = make_map((1, 20, 9, 11))
    for aligned in (False, True):
        for ratio in (0, 2):
            got = roi_align(input.to(device), boxes.to(device), 3, 1.0, ratio, aligned)
            if name == "inverted in x" and aligned and ratio == 0:  # torchvision 0.29.1 asks for negative memory
                assert not got.any()
                continue
            expected = torchvision.ops.roi_align(input, boxes, 3, 1.0, ratio, aligned)
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_boxes_without_end(device):
    """Neither overflow nor endless loops: points off the map are not visited one by one."""
    boxes = torch.tensor([[0.0, -1e30, -1e30, 1e30, 1e30], [0.0, 0.0, 0.0, 1e9, 1e9], [0.0, 3e38, 3e38, -3e38, -3e38]])
    for mode in ("avg", "max"):
        for ratio in (0, 2):
            got = roi_align(make_map((1, 3, 5, 6)).to(device), boxes.to(device), 2, 1.0, ratio, True, mode=mode)
            assert got.isfinite().all()
    rotated = torch.tensor([[0.0, 2.0, 3.0, 1e9, 1e9, 30.0], [0.0, 1e5, 1e5, 3e5, 3e5, 45.0], [0.0, 3, 2, 1e30, 4, 5]])
    for mode in ("avg", "max"):
        got = roi_align(make_map((1, 3, 5, 6)).to(device), rotated.to(device), 2, mode=mode)
        assert got.isfinite().all()


def test_large_rotated_boxes(device):
    """Points off the map are left out, none on it: as without leaving any out."""
    boxes = torch.tensor([[0.0, 5.0, 4.0, 90.0, 60.0, 33.0], [0.0, -20.0, 30.0, 80.0, 120.0, -70.0]])
    input = make_map((1, 3, 9, 11))
    for mode in ("avg", "max"):
        got = roi_align(input.to(device), boxes.to(device), 2, mode=mode)
        assert_near(got, reference.roi_align(input, boxes, (2, 2), mode=mode))


def test_nothing_to_compute(device):
    boxes = make_boxes(2, 1, (5, 6)).to(device)
    for shape, rows in (((1, 3, 5, 6), boxes[:0]), ((1, 0, 5, 6), boxes), ((0, 3, 5, 6), boxes[:0])):
        x = torch.zeros(shape, device=device, requires_grad=True)
        y = roi_align(x, rows, 2)
        assert y.shape == (len(rows), shape[1], 2, 2)
        assert not torch.autograd.grad(y.sum(), x)[0].any()
    assert not roi_align(torch.zeros(1, 3, 0, 6, device=device), boxes, 2).any()
    assert roi_align(torch.zeros(1, 3, 5, 6, device=device), [], 2).shape == (0, 3, 2, 2)
    assert roi_align(torch.zeros(1, 3, 5, 6, device=device), [boxes[:0, 1:]], 2).shape == (0, 3, 2, 2)


def test_values_that_are_not_finite(device):
    """NaN and infinity reach the bins that read them, and no others."""
    input = torch.ones(1, 20, 8, 8)
    input[:, 3, 2, 2], input[:, 4, 6, 6] = float("nan"), float("inf")
    boxes = torch.tensor([[0.0, 0.25, 0.25, 7.75, 7.75]])
    for mode in ("avg", "max"):
        got = roi_align(input.to(device), boxes.to(device), 2, 1.0, 2, True, mode=mode).cpu()
        assert got[0, 3, 0, 0].isnan()
        assert got[0, 3].isnan().sum() == 1
        assert got[0, 4, 1, 1] == float("inf")
        assert got[0, torch.arange(20) > 4].isfinite().all()


def test_maximum_off_the_map(device):
    """Points off the map count as 0, which is more than anything here; no gradient then."""
    x = (-make_map((1, 20, 6, 6)).abs()).to(device).requires_grad_()
    boxes = torch.tensor([[0.0, -6.0, 1.0, 5.0, 5.0]], device=device)
    y = roi_align(x, boxes, 1, 1.0, 4, mode="max")
    assert not y.any()
    assert not torch.autograd.grad(y.sum(), x)[0].any()


# ---- gradients ----


def test_maximum_among_more_points_than_a_float_counts():
    """The last of 4097 * 4097 is the largest: it alone gets the gradient, not the one before it too."""
    grad, x = torch.ones(1, 1, 1, 1), torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    box = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]])
    arguments = ([x], box, [1, 1, 2, 2], [0], [1.0], 4097, False, "max", [], True, False)
    (dx,), _ = torch.ops.pyseg._roi_align_backward(grad, *arguments)
    torch.testing.assert_close(dx.sum(), torch.tensor(1.0))


def coordinates(kind, dims, aligned):
    """Away from integers, where the derivative jumps."""
    if kind == "rotated":
        return torch.tensor([[4.3, 5.1, 7.2, 6.9, 30.0], [3.2, 4.1, 4.3, 0.7, -75.0]], dtype=DOUBLE)
    if dims == 3:
        return torch.tensor([[1.3, 2.1, 0.7, 4.2, 5.1, 3.3], [0.2, 0.1, 0.3, 4.3, 3.7, 3.2]], dtype=DOUBLE)
    return torch.tensor([[1.3, 2.1, 7.21, 6.83], [0.2, 0.1, 4.3, 8.7]], dtype=DOUBLE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("aligned", [False, True])
def test_gradcheck(device, kind, mode, aligned):
    dims = len(KINDS[kind])
    boxes = coordinates(kind, dims, aligned).to(device).requires_grad_()
    index = torch.tensor([[0.0], [1.0]], dtype=DOUBLE, device=device)
    x = make_map((2, 2, *((9, 10) if dims == 2 else (4, 5, 6))), DOUBLE).to(device).requires_grad_()
    for ratio in (2, 0) if kind == "aligned" else (2,):

        def function(x, boxes, ratio=ratio):
            return roi_align(x, torch.cat([index, boxes], 1), 2, 1.0, ratio, aligned, mode=mode)

        assert torch.autograd.gradcheck(function, (x, boxes))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_of_boxes(device, layout):
    """In float32, over more channels than one block has."""
    x = make_map((1, 150, 9, 10), layout=layout).to(device).requires_grad_()
    boxes = torch.cat([torch.zeros(2, 1, dtype=DOUBLE), coordinates("aligned", 2, True)], 1).requires_grad_()
    own = boxes.detach().float().to(device).requires_grad_()
    y = roi_align(x, own, 3, 1.0, 2)
    grad = make_map(y.shape, seed=1)
    dx, db = torch.autograd.grad(y, (x, own), grad.to(device))
    x_ref = x.detach().cpu().double().requires_grad_()
    y_ref = reference.roi_align(x_ref, boxes, (3, 3), 1.0, 2)
    dx_ref, db_ref = torch.autograd.grad(y_ref, (x_ref, boxes), grad.double())
    assert_near_sum(dx, dx_ref)
    torch.testing.assert_close(db.cpu().double(), db_ref, rtol=1e-4, atol=1e-3)
    half = boxes.detach().half().to(device).requires_grad_()
    (dh,) = torch.autograd.grad(roi_align(x, half, 3, 1.0, 2).sum(), half)
    assert dh.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gradients(device, kind, dtype):
    """Of maps and boxes, for all types of maps and kinds of boxes."""
    dims = len(KINDS[kind])
    boxes = torch.cat([torch.zeros(2, 1, dtype=DOUBLE), coordinates(kind, dims, True)], 1)
    x = make_map((1, 9, *((9, 10) if dims == 2 else (4, 5, 6))), dtype, "channels_last").to(device).requires_grad_()
    own = boxes.to(DOUBLE if dtype == DOUBLE else FLOAT).to(device).requires_grad_()
    y = roi_align(x, own, 2, 1.0, 2)
    grad = make_map(y.shape, dtype, seed=1)
    dx, db = torch.autograd.grad(y, (x, own), grad.to(device))
    x_ref, own_ref = x.detach().cpu().double().requires_grad_(), own.detach().cpu().double().requires_grad_()
    y_ref = reference.roi_align(x_ref, own_ref, (2,) * dims, 1.0, 2)
    dx_ref, db_ref = torch.autograd.grad(y_ref, (x_ref, own_ref), grad.double())
    assert_near(y.detach(), y_ref.detach())
    assert_near_sum(dx, dx_ref)
    torch.testing.assert_close(db.cpu().double(), db_ref, rtol=1e-3, atol=1e-3)


def test_no_double_backward(device):
    x = make_map((1, 2, 5, 6)).to(device).requires_grad_()
    y = roi_align(x, make_boxes(1, 1, (5, 6)).to(device), 2)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="roi_align: the gradient cannot be differentiated again"):
        torch.autograd.grad(dx.sum(), x)


# ---- pyramids ----

SCALES = [0.25, 0.125, 0.0625, 0.03125]


def make_pyramid(channels=6, dtype=FLOAT, layout="contiguous", images=2):
    shapes = [(images, channels, 48 >> level, 64 >> level) for level in range(4)]
    return [make_map(shape, dtype, layout, seed=level) for level, shape in enumerate(shapes)]


def pyramid_boxes(dtype=FLOAT):
    """Of every level, exact powers of two, and of none."""
    boxes = make_boxes(30, 2, (192, 256), seed=2)
    sizes = torch.tensor([56.0, 112.0, 224.0, 448.0, 111.0, 0.0])
    exact = torch.stack([torch.arange(6) % 2, sizes * 0 + 3, sizes * 0 + 1, sizes + 3, sizes + 1], 1)
    inverted = torch.tensor([[0.0, 50.0, 20.0, 30.0, 60.0]])
    return torch.cat([boxes, exact, inverted]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
def test_pyramid(device, dtype, layout):
    features = make_pyramid(dtype=dtype, layout="contiguous" if layout == "mixed" else layout)
    if layout == "mixed":
        features[1::2] = [f.contiguous(memory_format=torch.channels_last) for f in features[1::2]]
    features = [f.to(device).requires_grad_() for f in features]
    boxes = on_grid(pyramid_boxes()).to(device)
    for mode in ("avg", "max"):
        got = multiscale_roi_align(features, boxes, 2, SCALES, 2, mode=mode)
        doubles = [f.detach().cpu().double().requires_grad_() for f in features]
        expected = reference.multiscale_roi_align(doubles, boxes.cpu(), (2, 2), SCALES, 2, mode=mode, levels=(2, 5))
        assert_near(got, expected.detach())
        assert not got[-1].any()
        if mode == "max" and dtype not in (FLOAT, DOUBLE):
            continue
        grad = make_map(got.shape, dtype, seed=9)
        grads = torch.autograd.grad(got, features, grad.to(device))
        for ours, theirs in zip(grads, torch.autograd.grad(expected, doubles, grad.double()), strict=True):
            assert_near_sum(ours, theirs)


def test_pyramid_gradcheck(device):
    x, y = (make_map((2, 2, 10 // s, 8 // s), DOUBLE).to(device).requires_grad_() for s in (1, 2))
    boxes = coordinates("aligned", 2, True).to(device).requires_grad_()
    index = torch.tensor([[0.0], [1.0]], dtype=DOUBLE, device=device)

    def function(x, y, boxes):
        rows = torch.cat([index, boxes], 1)
        return multiscale_roi_align([x, y], rows, 2, [1.0, 0.5], 2, levels=(4, 5), canonical_size=5.1)

    assert torch.autograd.gradcheck(function, (x, y, boxes))
    only = torch.autograd.grad(function(x, y.detach(), boxes.detach()).sum(), x)[0]
    assert only.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_module_like_torchvision(device, layout):
    names = ["0", "1", "2", "3"]
    features = {
        name: f.to(device)
        for name, f in zip([*names, "pool"], [*make_pyramid(layout=layout), make_map((2, 6, 3, 4))], strict=True)
    }
    plain = {name: f.cpu().contiguous() for name, f in features.items()}
    boxes = pyramid_boxes()[:-1]
    each = [boxes[boxes[:, 0] == i, 1:] for i in range(2)]
    for options in ({}, {"canonical_scale": 100, "canonical_level": 3}):
        for used in (names, names[1:], names[:1]):
            arguments = (used, 7, 2)
            ours = pyseg.nn.MultiScaleRoIAlign(*arguments, **options)
            theirs = torchvision.ops.MultiScaleRoIAlign(*arguments, **options)
            shapes = [(192, 250), (180, 256)]
            got = ours(features, [b.to(device) for b in each], shapes)
            torch.testing.assert_close(got.cpu(), theirs(plain, each, shapes), rtol=1e-4, atol=1e-4)
    assert "featmap_names=['0']" in repr(ours)
    with pytest.raises(ValueError, match="image_shapes must not be empty"):
        ours(features, [], [])


# ---- the contract ----


def test_same_bits_for_every_number_of_threads():
    threads, results = torch.get_num_threads(), []
    boxes = make_boxes(40, 2, (40, 50), seed=4)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = []
            for layout in ("contiguous", "channels_last"):
                for mode in ("avg", "max"):
                    x = make_map((2, 100, 40, 50), layout=layout).requires_grad_()
                    own = boxes.clone().requires_grad_()
                    y = roi_align(x, own, 5, 1.0, 2, mode=mode)
                    result += [y.detach(), *torch.autograd.grad(y.sin().sum(), (x, own))]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_opcheck(device, mode):
    x = make_map((2, 3, 5, 7), layout="channels_last").to(device).requires_grad_()
    boxes = make_boxes(3, 2, (5, 7)).to(device).requires_grad_(mode == "max")
    torch.library.opcheck(torch.ops.pyseg.roi_align.default, (x, boxes, [2, 3], 1.0, 2, True, mode))
    half = torch.randn(2, 3, 3, 4, device=device, requires_grad=True)
    pyramid = ([x, half], boxes, [2, 3], [1.0, 0.5], 0, False, mode, 4, 5, 5.0, 4.0, [0.0, 1e-6])
    torch.library.opcheck(torch.ops.pyseg.multiscale_roi_align.default, pyramid)
    sizes = [2, 3, 5, 7, 2, 3, 3, 4]
    backward = (
        [x.detach(), half.detach()],
        boxes.detach(),
        sizes,
        [1, 0],
        [1.0, 0.5],
        2,
        True,
        mode,
        [4.0, 5.0, 5.0, 4.0, 0.0, 1e-6],
    )
    grad = torch.randn(3, 3, 2, 3, device=device)
    torch.library.opcheck(torch.ops.pyseg._roi_align_backward.default, (grad, *backward, True, True))


def test_autocast(device):
    """16-bit maps are taken as they are, float32 boxes beside them; nothing is cast."""
    x = make_map((1, 20, 12, 14), torch.bfloat16).to(device)
    boxes = make_boxes(3, 1, (12, 14)).to(device)
    with torch.autocast(device, torch.bfloat16):
        got = roi_align(x, boxes, 3)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, roi_align(x, boxes, 3))
    assert_near(got, reference.roi_align(x.cpu(), boxes.cpu(), (3, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_more_images_than_16_bits_count(device, dtype):
    x = torch.arange(2100.0, device=device).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=dtype, device=device)
    assert torch.equal(roi_align(x, [box] * 2100, 1, 1.0, 1)[:, 0, 0, 0], x[:, 0, 0, 0])


def test_16_bit_coordinates_are_widened(device):
    """Positions of 16-bit boxes do not move to 16-bit positions."""
    x = make_map((1, 4, 300, 301), torch.float16).to(device)
    boxes = torch.tensor([[0, 101.0, 201.0, 230.0, 280.0]], dtype=torch.float16, device=device)
    assert_near(roi_align(x, boxes, 3, 1.0, 2), reference.roi_align(x.cpu(), boxes.cpu(), (3, 3), 1.0, 2))


def test_large_offsets():
    """Elements beyond 2^31 are found."""
    wide = torch.zeros(1).expand(1, 2**20, 2**6, 2**6)
    assert wide.numel() > 2**31
    boxes = torch.tensor([[0.0, 60.0, 60.0, 63.0, 63.0]])
    assert not roi_align(wide[:, :17], boxes, 2).any()
    memory = torch.empty(2**31 + 2**16, dtype=torch.bfloat16)  # pages that are never touched cost nothing
    x = memory.as_strided((2, 3, 4, 5), (2**31, 20, 5, 1))
    x.copy_(make_map((2, 3, 4, 5)))
    got = roi_align(x, torch.tensor([[1.0, 0.5, 0.5, 4.0, 3.0]]), 2)
    assert torch.equal(got, roi_align(x.clone(), torch.tensor([[1.0, 0.5, 0.5, 4.0, 3.0]]), 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, b: roi_align(x[0], b, 2),
            r"roi_align: input must be \[N, C, H, W\] or \[N, C, D, H, W\], got \[3, 5, 6\]",
        ),
        (lambda x, b: roi_align(x.long(), b, 2), "input must be float32, float64, float16 or bfloat16, got torch.Long"),
        (lambda x, b: roi_align(x, b[:, :4], 2), r"roi_align: boxes must be \[K, 5\] or \[K, 6\], got \[2, 4\]"),
        (lambda x, b: roi_align(x[..., None], b, 2), r"boxes must be \[K, 7\], got \[2, 5\]"),
        (lambda x, b: roi_align(x, b[0], 2), r"boxes must be \[K, 5\] or \[K, 6\], got \[5\]"),
        (lambda x, b: roi_align(x, b.long(), 2), "boxes must be float32, float64, float16 or bfloat16, got torch.Long"),
        (lambda x, b: roi_align(x, [b[0]], 2), r"boxes must be a list of tensors \[L, coordinates\], got \[5\]"),
        (lambda x, b: roi_align(x, b, 0), r"output_size must be 2 positive integers, got \[0, 0\]"),
        (lambda x, b: roi_align(x, b, (1, 2, 3)), r"output_size must be 2 positive integers, got \[1, 2, 3\]"),
        (lambda x, b: roi_align(x, b, 2, 0.0), "spatial_scale must be positive and finite, got 0"),
        (lambda x, b: roi_align(x, b, 2, float("nan")), "spatial_scale must be positive and finite, got nan"),
        (lambda x, b: roi_align(x, b, 2, mode="sum"), "mode must be avg or max, got sum"),
        (lambda x, b: multiscale_roi_align([], b, 2, []), "multiscale_roi_align: features must not be empty"),
        (
            lambda x, b: multiscale_roi_align([x, x], b, 2, [1.0]),
            r"spatial_scales must have an element for each of 2 maps, got \[1\]",
        ),
        (lambda x, b: multiscale_roi_align([x, x.double()], b, 2, [1.0, 0.5]), "features must have one dtype"),
        (
            lambda x, b: multiscale_roi_align([x, x[:, :2]], b, 2, [1.0, 0.5]),
            "features must have the same images and channels",
        ),
        (lambda x, b: multiscale_roi_align([x], b, 2, [-1.0]), "spatial_scales must be positive"),
        (
            lambda x, b: multiscale_roi_align([x], b, 2, [1.0], epsilon=(-1.0, 0.0)),
            r"epsilon must be two finite numbers, the first not negative, got \[-1, 0\]",
        ),
        (
            lambda x, b: multiscale_roi_align([x], b, 2, [1.0], levels=(5, 4)),
            "least_level must be at most most_level, got 5 and 4",
        ),
    ],
)
def test_errors(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(
            torch.ones(1, 3, 5, 6, device=device),
            torch.tensor([[0, 1.0, 1, 4, 4], [0, 0, 0, 2, 3.0]]).to(device),
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([2.0, 1, 1, 4, 4], "boxes must have batch indices from 0 to 0, got 2 in row 1"),
        ([-1.0, 1, 1, 4, 4], "boxes must have batch indices from 0 to 0, got -1 in row 1"),
        ([float("nan"), 1, 1, 4, 4], "boxes must be finite, got .?nan in row 1"),
        ([0.0, 1, 1, float("nan"), 4], "boxes must be finite, got .?nan in row 1"),
        ([0.0, 1, 1, 4, float("inf")], "boxes must be finite, got inf in row 1"),
    ],
)
def test_invalid_boxes(device, row, message):
    """Errors on the CPU; on CUDA, where nobody waits for the boxes, NaN and no gradient."""
    x = make_map((1, 3, 5, 6)).to(device).requires_grad_()
    boxes = torch.tensor([[0.0, 1, 1, 4, 4], row], device=device, requires_grad=True)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=message):
            roi_align(x, boxes, 2)
        return
    for y in (roi_align(x, boxes, 2), multiscale_roi_align([x, x], boxes, 2, [1.0, 0.5])):
        assert y[0].isfinite().all()
        assert y[1].isnan().all()
        dx, db = torch.autograd.grad(y.sum(), (x, boxes))
        assert dx.isfinite().all()
        assert not db[1].any()
