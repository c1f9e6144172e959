"""joint_warp against the reference, torch and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from warp_cases import (
    BORDERS,
    DOUBLE,
    DTYPES,
    FLOAT,
    FLOATS,
    LAYOUTS,
    assert_labels,
    assert_near,
    make_factors,
    make_image,
    make_labels,
    make_warp,
)

from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import elastic_deform, joint_warp, warp_matrix

SIZES = {2: ((9, 21), (11, 37)), 3: ((4, 6, 9), (3, 5, 18))}  # of the image and of the output


def compare(image, labels, affine, displacement, gain, bias, device, **options):
    """joint_warp on the device with the reference."""
    moved = [None if t is None else t.to(device) for t in (image, labels, affine, displacement)]
    y, warped = joint_warp(*moved, gain=gain, bias=bias, **options)
    options.pop("dtype", None)
    options["label_border"] = options.get("label_border") or options.get("border", "reflect")
    expected, labels_expected = reference.joint_warp(image, labels, affine, displacement, gain, bias, **options)
    size = options.get("size") or image.shape[2:]
    if y.dtype == torch.uint8:  # rounded to the nearest
        assert ((y.cpu().double() - expected.clamp(0, 255)).abs() <= 0.501).all()
    else:
        # A place in float32 is wrong by a share of the image's size; the image's slope is what it is.
        assert_near(y, expected, scale=1 if y.dtype in (torch.float16, torch.bfloat16) else 4)
    if labels is None:
        assert warped is None
    elif labels.is_floating_point():
        assert_near(warped, labels_expected, scale=4)
    else:
        assert warped.dtype == labels.dtype
        assert_labels(warped, labels_expected, affine, displacement, size, options.get("cubic", -0.5))
    return y, warped


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("border", BORDERS)
def test_reference(device, axes, border):
    """Places inside and far outside, labels with another border, all factors."""
    size, out = SIZES[axes]
    for dtype, layout in ((FLOAT, "contiguous"), (DOUBLE, "strided")):
        image = make_image((2, 3, *size), dtype, layout)
        affine, displacement = make_warp(2, size)
        for label_border in BORDERS:
            compare(
                image,
                make_labels((2, *size)),
                affine,
                displacement,
                *make_factors(2, 3),
                device,
                size=out,
                border=border,
                fill=0.4,
                label_border=label_border,
                ignore_index=-100,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", [2, 3])
def test_dtypes_and_layouts(device, dtype, axes):
    size, out = SIZES[axes]
    affine, displacement = make_warp(2, size)
    for layout in LAYOUTS:
        image = make_image((2, 3, *size), dtype, layout)
        labels = make_labels((2, *size)).transpose(-1, -2).contiguous().transpose(-1, -2)
        y, _ = compare(image, labels, affine, displacement, None, None, device, size=out)
        assert y.dtype == dtype
        last = torch.channels_last if axes == 2 else torch.channels_last_3d
        assert y.is_contiguous(memory_format=last if layout == "channels_last" else torch.contiguous_format)
        if dtype == torch.uint8:
            y, _ = compare(image, None, affine, displacement, *make_factors(2, 3), device, dtype=FLOAT)
            assert y.dtype == FLOAT
            y, _ = compare(image, None, affine, None, *make_factors(2, 3), device)
            assert y.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_label_dtypes(device, dtype):
    affine, displacement = make_warp(2, (9, 21))
    image, labels = make_image((2, 1, 9, 21)), make_labels((2, 9, 21), dtype)
    ignored = 1 if dtype == torch.bool else 127
    compare(image, labels, affine, displacement, None, None, device, label_border="constant", ignore_index=ignored)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, torch.bfloat16, torch.uint8], ids=str)
def test_soft_labels(device, dtype):
    """One-hot maps stay a partition of one, and are what the image would be."""
    affine, displacement = make_warp(2, (9, 21))
    image, labels = make_image((2, 3, 9, 21), dtype), make_labels((2, 9, 21)) % 4
    soft = F.one_hot(labels, 4).movedim(-1, 1).to(FLOAT if dtype == torch.uint8 else dtype)
    _, warped = compare(image, soft, affine, displacement, None, None, device)
    torch.testing.assert_close(warped.sum(1).double(), torch.ones_like(warped[:, 0]).double(), rtol=0, atol=2e-2)
    if dtype != torch.uint8:
        again, _ = joint_warp(soft.to(device), None, affine, displacement)
        assert torch.equal(again, warped)


@pytest.mark.parametrize("cubic", [-0.5, -0.75])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 3), (5, 9)])
def test_field(device, cubic, grid):
    """An image that holds its own coordinates shows the places; torch's bicubic interpolation is cubic=-3/4."""
    out = (13, 41)
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([rows, columns])[None].double().to(device)
    affine = torch.tensor([[[1.0, 0.0, 20.0], [0.0, 1.0, 10.0]]], dtype=DOUBLE)
    _, displacement = make_warp(1, (16, 16), grid)
    places, _ = joint_warp(image, None, affine, displacement, size=out, cubic=cubic)
    expected = reference.warp_places(affine, displacement, out, cubic)
    torch.testing.assert_close(places.cpu(), expected, rtol=0, atol=1e-9)
    if cubic == -0.75:
        theirs = F.interpolate(displacement.double(), out, mode="bicubic", align_corners=True)
        start = torch.stack(torch.meshgrid(20.0 + torch.arange(13), 10.0 + torch.arange(41), indexing="ij"))
        torch.testing.assert_close(places.cpu(), theirs + start, rtol=0, atol=1e-9)


@pytest.mark.parametrize("border", ["reflect", "constant"])
def test_grid_sample(device, border):
    """torch's own sampling of the same grid, image and nearest labels."""
    image, labels = make_image((2, 3, 20, 30), DOUBLE), make_labels((2, 20, 30))
    affine, displacement = make_warp(2, (20, 30))
    places = reference.warp_places(affine, displacement, (20, 30))
    grid = torch.stack([places[:, 1] / 29, places[:, 0] / 19], -1) * 2 - 1
    options = {"padding_mode": "reflection" if border == "reflect" else "zeros", "align_corners": True}
    y, warped = joint_warp(image.to(device), labels.to(device), affine, displacement, border=border)
    torch.testing.assert_close(y.cpu(), F.grid_sample(image, grid, **options), rtol=0, atol=1e-9)
    nearest = F.grid_sample(labels[:, None].double(), grid, mode="nearest", **options)[:, 0].long()
    assert torch.equal(warped.cpu(), nearest)


def test_exact_copies(device):
    """Flips, quarter turns and crops copy, whatever lies beside; labels are at the same elements."""
    image = make_image((1, 2, 8, 8))
    image[0, 0, 3, 4], image[0, 1, 5, 5] = float("nan"), float("inf")
    labels = torch.arange(64).reshape(1, 8, 8)
    flip = torch.tensor([[True, False]])
    cases = {
        "flip": (warp_matrix((8, 8), flip=flip), lambda t: t.flip(-2)),
        "quarter": (warp_matrix((8, 8), rotation=90.0), lambda t: t.rot90(1, (-2, -1))),
        "half": (warp_matrix((8, 8), rotation=180.0), lambda t: t.rot90(2, (-2, -1))),
        "crop": (warp_matrix((8, 8), (4, 4)), lambda t: t[..., 2:6, 2:6]),
    }
    for affine, expected in cases.values():
        size = expected(image).shape[2:]
        y, warped = joint_warp(image.to(device), labels.to(device), affine, size=size)
        assert torch.equal(y.cpu().nan_to_num(7), expected(image).nan_to_num(7))
        assert torch.equal(warped.cpu(), expected(labels))


def test_one_element_axes(device):
    """Images and outputs of one row, column or pixel."""
    for size, out in (((1, 5), (3, 4)), ((5, 1), (1, 6)), ((1, 1), (2, 3)), ((7, 6), (1, 1))):
        for border in BORDERS:
            affine, displacement = make_warp(2, (4, 4), (2, 2))
            compare(
                make_image((2, 2, *size)),
                make_labels((2, *size)),
                affine,
                displacement,
                None,
                None,
                device,
                size=out,
                border=border,
                fill=0.5,
            )


def test_places_that_are_not_finite(device):
    """Nothing is read out of bounds."""
    image, labels = make_image((1, 1, 5, 6)).to(device), make_labels((1, 5, 6)).to(device)
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        for border in BORDERS:
            affine = torch.full((1, 2, 3), value)
            y, warped = joint_warp(image, labels, affine, border=border, fill=2.0)
            assert ((y == 2) | torch.isin(y, image)).all()
            assert ((warped == 0) | torch.isin(warped, labels)).all()


def test_empty(device):
    image = torch.ones(0, 3, 5, 6, device=device, requires_grad=True)
    labels = torch.ones(0, 5, 6, dtype=torch.long, device=device)
    y, warped = joint_warp(image, labels, torch.ones(0, 2, 3), torch.ones(0, 2, 3, 3), size=(4, 7))
    assert (y.shape, warped.shape) == ((0, 3, 4, 7), (0, 4, 7))
    assert torch.autograd.grad(y.sum(), image)[0].shape == image.shape
    y, warped = joint_warp(torch.ones(2, 0, 5, 6, device=device), make_labels((2, 5, 6)).to(device))
    assert y.shape == (2, 0, 5, 6)
    assert torch.equal(warped.cpu(), make_labels((2, 5, 6)))


@st.composite
def drawn(draw):
    axes = draw(st.sampled_from([2, 2, 3]))
    size, out = ([draw(st.integers(1, 12)) for _ in range(axes)] for _ in range(2))
    if axes == 2 and draw(st.booleans()):
        out[1] = draw(st.integers(250, 530))  # several runs of a row
    images, channels = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    grid = [draw(st.integers(1, 5)) for _ in range(axes)]
    dtype, layout, seed = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 9))
    affine, displacement = make_warp(images, size, grid, draw(st.sampled_from([0.05, 0.3])), seed)
    options = {"size": out, "border": draw(st.sampled_from(BORDERS)), "fill": draw(st.sampled_from([0.0, 3.0]))}
    options["cubic"] = draw(st.sampled_from([-0.5, -0.75]))
    image = make_image((images, channels, *size), dtype, layout, seed)
    return image, make_labels((images, *size)), affine, displacement if draw(st.booleans()) else None, options


def test_drawn_cases(device):
    @drawn_settings(80, 12, device)
    @given(drawn())
    def run(case):
        image, labels, affine, displacement, options = case
        compare(image, labels, affine, displacement, None, None, device, **options)

    run()


# ---- gradients ----


def both_gradients(image, soft, device, **options):
    """Of joint_warp and of the reference, with respect to image and soft labels."""
    affine, displacement = make_warp(image.shape[0], image.shape[2:])
    gain, bias = make_factors(*image.shape[:2])
    leaves = [t.to(device).requires_grad_() for t in (image, soft)]
    outputs = joint_warp(leaves[0], leaves[1], affine, displacement, gain=gain, bias=bias, **options)
    grads = [make_image(y.shape, y.dtype, seed=9) for y in outputs]
    got = torch.autograd.grad(outputs, leaves, [g.to(device) for g in grads])
    options["label_border"] = options.get("label_border") or options.get("border", "reflect")
    doubles = [t.double().requires_grad_() for t in (image, soft)]
    expected = reference.joint_warp(*doubles, affine, displacement, gain, bias, **options)
    return got, torch.autograd.grad(expected, doubles, [g.double() for g in grads])


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(device, axes, dtype):
    size, out = SIZES[axes]
    for border, layout in zip(BORDERS, ("contiguous", "channels_last", "strided"), strict=True):
        image, soft = make_image((2, 5, *size), dtype, layout), make_image((2, 2, *size), dtype, seed=4)
        got, expected = both_gradients(image, soft, device, size=out, border=border)
        last = torch.channels_last if axes == 2 else torch.channels_last_3d
        assert got[0].is_contiguous(memory_format=last if layout == "channels_last" else torch.contiguous_format)
        for grad, wanted in zip(got, expected, strict=True):
            assert_near(grad, wanted, scale=20)


def test_gradient_of_expanded(device):
    """The gradient of a sum has no strides."""
    affine, displacement = make_warp(1, (6, 7))
    image = make_image((1, 2, 6, 7)).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(joint_warp(image, None, affine, displacement)[0].sum(), image)
    assert grad.sum().item() == pytest.approx(2 * 42, rel=1e-5)  # reflected: no weight is lost


def test_gradcheck(device):
    for size in ((4, 5), (2, 3, 2)):
        affine, displacement = (t.double() for t in make_warp(2, size))
        image, soft = (make_image((2, 2, *size), DOUBLE, seed=s).to(device).requires_grad_() for s in (0, 5))
        gain, bias = make_factors(2, 2)

        def function(x, s, affine=affine, displacement=displacement, gain=gain, bias=bias):
            return joint_warp(x, s, affine, displacement, gain=gain, bias=bias, border="constant", fill=0.3)

        # Interpreted kernels are slow: along random directions, and the second derivative on the CPU alone.
        fast = device != "cpu"
        assert torch.autograd.gradcheck(function, (image, soft), fast_mode=fast, check_batched_grad=not fast)
        if not fast:
            assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, None)[0].sin(), (image,))


def test_parameters_take_no_gradient(device):
    image = make_image((1, 1, 4, 5)).to(device)
    affine, displacement = make_warp(1, (4, 5))
    with pytest.raises(RuntimeError, match="joint_warp: displacement takes no gradient"):
        joint_warp(image, None, affine, displacement.requires_grad_())
    y, labels = joint_warp(image.requires_grad_(), make_labels((1, 4, 5)).to(device), affine)
    assert y.requires_grad
    assert not labels.requires_grad


@pytest.mark.parametrize("axes", [2, 3])
def test_threads(axes):
    """The same bits for every number of threads, forward and backward."""
    size = (70, 90) if axes == 2 else (12, 22, 30)
    affine, displacement = make_warp(2, size)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            image = make_image((2, 3, *size)).requires_grad_()
            y, labels = joint_warp(image, make_labels((2, *size)), affine, displacement)
            results.append((y, labels, *torch.autograd.grad(y.square().sum(), image)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- other functions ----


def test_devices_agree(device):
    """The same bits on each, for a seed: places are rounded the same way everywhere."""
    for image in (make_image((2, 3, 24, 35)), make_image((1, 2, 5, 6, 17), torch.uint8)):
        labels = make_labels((image.shape[0], *image.shape[2:]))
        results = []
        for where in ("cpu", device):
            generator = torch.Generator().manual_seed(5)
            deformed = elastic_deform(image.to(where), labels.to(where), sigma=4, generator=generator)
            results.append([t.cpu() for t in deformed])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_elastic_deform_statistics():
    """The control points have the deviation asked for, and reach the image."""
    rows, columns = torch.meshgrid(torch.arange(65.0), torch.arange(65.0), indexing="ij")
    image = torch.stack([rows, columns])[None].expand(400, -1, -1, -1)
    moved, _ = elastic_deform(image, sigma=(2.0, 4.0), generator=torch.Generator().manual_seed(0), border="replicate")
    deviation = (moved - image)[:, :, 32, 32].std(0)  # the middle control point
    torch.testing.assert_close(deviation, torch.tensor([2.0, 4.0]), rtol=0.1, atol=0)
    with pytest.raises(RuntimeError, match="elastic_deform: grid must be a positive integer or 2, got 0"):
        elastic_deform(image, grid=0)
    with pytest.raises(RuntimeError, match="elastic_deform: sigma must be a number or 2, not negative, got -1"):
        elastic_deform(image, sigma=-1)


def test_warp_matrix():
    """A turn, scale and shift by hand; flips of volumes."""
    matrix = warp_matrix((5, 9), (3, 7), rotation=torch.tensor([0.0, 90.0]), scale=2.0)
    assert matrix.shape == (2, 2, 3)
    centre = torch.tensor([1.0, 3.0, 1.0], dtype=DOUBLE)
    torch.testing.assert_close(matrix @ centre, torch.tensor([[2.0, 4.0]] * 2, dtype=DOUBLE))
    right = torch.tensor([1.0, 5.0, 1.0], dtype=DOUBLE)  # two columns from the centre, one in the image
    torch.testing.assert_close(matrix @ right, torch.tensor([[2.0, 5.0], [3.0, 4.0]], dtype=DOUBLE))
    volume = make_image((1, 1, 3, 4, 5))
    for flips in ((True, False, False), (False, True, True)):
        affine = warp_matrix((3, 4, 5), flip=torch.tensor([flips]))
        assert torch.equal(joint_warp(volume, None, affine)[0], volume.flip([2 + d for d in range(3) if flips[d]]))
    for axis, plane in enumerate(((-2, -1), (-3, -1), (-3, -2))):
        cube, turns = make_image((1, 1, 4, 4, 4)), torch.zeros(1, 3)
        turns[0, axis] = 90
        assert torch.equal(joint_warp(cube, None, warp_matrix((4, 4, 4), rotation=turns))[0], cube.rot90(1, plane))


# ---- the operator ----


def test_opcheck(device):
    affine, displacement = (t.to(device) for t in make_warp(2, (5, 6)))
    gain, bias = (t.to(device) for t in make_factors(2, 3))
    image = make_image((2, 3, 5, 6)).to(device)
    rest = ([4, 7], "reflect", 0.0, "constant", -1, -0.5, False)
    hard, soft = make_labels((2, 5, 6)).to(device), make_image((2, 2, 5, 6)).to(device).requires_grad_()
    for labels in (None, hard, soft) if device == "cpu" else (hard,):
        arguments = (image.requires_grad_(), labels, affine, displacement, gain, bias, *rest)
        torch.library.opcheck(torch.ops.pyseg.joint_warp.default, arguments)
    grad = make_image((2, 3, 4, 7)).to(device).requires_grad_()
    arguments = (grad, affine, displacement, gain, [5, 6], "reflect", -0.5, True)
    torch.library.opcheck(torch.ops.pyseg._joint_warp_backward.default, arguments)


def test_vmap(device):
    affine, displacement = (t.to(device) for t in make_warp(2, (5, 6)))
    images, labels = make_image((3, 2, 1, 5, 6)).to(device), make_labels((2, 5, 6)).to(device)

    def function(x):
        return joint_warp(x, labels, affine, displacement)

    y, warped = torch.vmap(function)(images)
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(function(images[i]), (y[i], warped[i]), strict=True))
    alone = torch.vmap(lambda x, a: joint_warp(x, None, a)[0])(images, affine.expand(3, -1, -1, -1))
    assert torch.equal(alone[1], joint_warp(images[1], None, affine)[0])


def test_autocast(device):
    """Changes nothing."""
    affine, displacement = make_warp(1, (5, 6))
    image = make_image((1, 1, 5, 6)).to(device)
    with torch.autocast(device, torch.bfloat16):
        y, _ = joint_warp(image, None, affine, displacement)
    assert torch.equal(y, joint_warp(image, None, affine, displacement)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.ones(3, 5, 6)}, r"image must be \[N, C, H, W\] or \[N, C, D, H, W\], got \[3, 5, 6\]"),
        ({"image": torch.ones(2, 3, 5, 6).int()}, "image must be float32, float64, float16, bfloat16 or uint8, got"),
        ({"image": torch.ones(2, 3, 0, 6)}, r"image must have sides of 1 to 2\^24, got \[2, 3, 0, 6\]"),
        ({"affine": torch.ones(1, 2, 3)}, r"affine must be \[2, 2, 3\], got \[1, 2, 3\]"),
        ({"affine": torch.ones(2, 2, 3).int()}, "affine must be float32, float64, float16 or bfloat16, got"),
        ({"displacement": torch.ones(2, 3, 3)}, r"displacement must be \[2, 2\] and a grid of 2 axes, got \[2, 3, 3\]"),
        ({"displacement": torch.ones(2, 2, 0, 3)}, r"displacement must have sides of 1 to 2\^24, got"),
        ({"gain": torch.ones(2, 4)}, r"gain must be \[2, 3\], got \[2, 4\]"),
        ({"bias": torch.ones(2, 3, 1)}, r"bias must be a number, \[N\] or \[N, C\], got \[2, 3, 1\]"),
        ({"labels": torch.ones(2, 5, 7).long()}, r"labels must be \[2, 5, 6\], got \[2, 5, 7\]"),
        ({"labels": torch.ones(2, 5, 6)}, r"labels of floating point must be \[N, K, \*S\] like the image's"),
        ({"labels": torch.ones(2, 3, 5, 6).double()}, "labels of floating point must be of the image's dtype"),
        ({"labels": torch.ones(2, 5, 6, dtype=torch.uint8), "ignore_index": -1}, "ignore_index must fit labels of"),
        ({"labels": torch.ones(2, 5, 6, dtype=torch.complex64)}, "labels must be of integers, bool or floating point"),
        ({"size": (4,)}, r"size must be 2 integers, got \[4\]"),
        ({"size": (4, 0)}, r"size must have sides of 1 to 2\^24, got \[4, 0\]"),
        ({"border": "wrap"}, "border must be reflect, replicate or constant, got wrap"),
        ({"dtype": torch.float64}, "dtype must be one of .*, got torch.float64"),
    ],
)
def test_errors(device, change, message):
    affine, displacement = make_warp(2, (5, 6))
    arguments = {"image": torch.ones(2, 3, 5, 6), "affine": affine, "displacement": displacement, **change}
    arguments = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    with pytest.raises(RuntimeError, match="joint_warp: " + message):
        joint_warp(**arguments)


def test_far_strides():
    """Elements beyond the reach of 32 bits: a storage of which a few pages are touched."""
    storage = torch.empty(5 << 30, dtype=torch.uint8)
    image = storage.as_strided((1, 1, 4, 5), (0, 0, 1 << 30, 1))
    image.copy_(make_image((1, 1, 4, 5), torch.uint8))
    affine, displacement = make_warp(1, (4, 5))
    expected, _ = joint_warp(image.contiguous(), None, affine, displacement)
    assert torch.equal(joint_warp(image, None, affine, displacement)[0], expected)
