"""upsample_concat_depthwise against the reference, torch's own operators and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from upsample_cases import DOUBLE, DTYPES, FLOAT, LAYOUTS, assert_near, doubles, make_filters, make_map, make_pyramid

from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import upsample_concat_depthwise

SHAPES = [(5, 12, 13), (18, 6, 7), (33, 3, 4)]
CHANNELS = sum(shape[0] for shape in SHAPES)


def compare(maps, filters, dilations, size=None, align_corners=True, terms=900):
    """Result and all gradients, beside the reference's in float64."""
    weight, scale, shift = filters
    arguments = [t for t in (*maps, *filters) if t is not None]
    leaves = [t.requires_grad_() for t in arguments]
    y = upsample_concat_depthwise(
        maps, weight, dilations, scale=scale, shift=shift, size=size, align_corners=align_corners
    )
    oracle = doubles(leaves)
    named = dict(
        zip([n for n, t in zip("wsb", filters, strict=True) if t is not None], oracle[len(maps) :], strict=True)
    )
    expected = reference.upsample_concat_depthwise(
        oracle[: len(maps)],
        named["w"],
        dilations,
        size or tuple(maps[0].shape[2:]),
        scale=named.get("s"),
        shift=named.get("b"),
        align_corners=align_corners,
    )
    assert y.dtype == maps[0].dtype
    assert_near(y, expected, terms=9)
    grad = make_map(y.shape, y.dtype, seed=9).to(y.device)
    grads = torch.autograd.grad(y, leaves, grad)
    for got, want, leaf in zip(grads, torch.autograd.grad(expected, oracle, grad.cpu().double()), leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert_near(got, want, terms=terms)
    return y, grads


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(device, dtype, layout):
    """Channel counts on both sides of the blocks' and vectors' lengths."""
    maps = make_pyramid(SHAPES, dtype, "contiguous" if layout == "mixed" else layout, device=device)
    if layout == "mixed":
        maps[1] = maps[1].contiguous(memory_format=torch.channels_last)
    y, grads = compare(maps, make_filters(2, CHANNELS, dtype, device), (1, 3))
    last = layout in ("channels_last", "sliced channels", "mixed")
    memory_format = torch.channels_last if last else torch.contiguous_format
    if layout != "expanded":
        assert all(part.is_contiguous(memory_format=memory_format) for part in (*y, *grads[:3]))


@pytest.mark.parametrize("dilations", [(1,), (1, 2, 4, 8), (7, 1, 30), (2,) * 16])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dilations(device, dilations, align_corners, layout):
    """Within the map, up to its borders and far beyond; as many as there may be."""
    maps = make_pyramid([(3, 9, 12), (5, 4, 5)], layout=layout, device=device)
    compare(maps, make_filters(len(dilations), 8, device=device), dilations, align_corners=align_corners)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_without_scale_or_shift(device, scale, shift):
    weight, s, b = make_filters(2, 8, device=device)
    maps = make_pyramid([(3, 6, 5), (5, 3, 4)], device=device)
    compare(maps, (weight, s if scale else None, b if shift else None), (1, 2))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 2), (7, 40)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes(device, size, layout):
    """One pixel, lines, a size that no input has; maps of one pixel and larger than the output."""
    maps = make_pyramid([(3, 6, 5), (17, 1, 1), (2, 20, 3)], layout=layout, device=device)
    compare(maps, make_filters(2, 22, device=device), (1, 4), size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wide_filters(device, dtype):
    """float32 filters beside 16-bit maps are not rounded, and their gradients are of float32."""
    maps = make_pyramid(SHAPES, dtype, "channels_last", device=device)
    compare(maps, make_filters(2, CHANNELS, FLOAT, device), (1, 2))


@st.composite
def drawn(draw):
    images = draw(st.integers(1, 2))
    shapes = [
        (draw(st.integers(1, 36)), draw(st.integers(1, 9)), draw(st.integers(1, 21)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    dilations = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS[:4]))
    size = draw(st.one_of(st.none(), st.tuples(st.integers(1, 12), st.integers(1, 12))))
    return make_pyramid(shapes, dtype, layout, images), dilations, size, draw(st.booleans())


def test_drawn_cases(device):
    @drawn_settings(50, 8, device)
    @given(drawn())
    def run(case):
        maps, dilations, size, align_corners = case
        filters = make_filters(len(dilations), sum(m.shape[1] for m in maps), maps[0].dtype, device)
        compare([m.to(device) for m in maps], filters, dilations, size, align_corners)

    run()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_torch_on_large_maps(layout):
    """Joint Pyramid Upsampling's front as torch runs it; large enough for stores past the caches."""
    maps = make_pyramid([(96, 40, 44), (96, 20, 22), (96, 10, 11)], layout=layout, images=1)
    weight, scale, shift = make_filters(4, 288)
    got = upsample_concat_depthwise(maps, weight, scale=scale, shift=shift)
    up = [F.interpolate(m, (40, 44), mode="bilinear", align_corners=True) for m in maps]
    x = torch.cat(up, 1)
    for r, d in enumerate((1, 2, 4, 8)):
        y = F.conv2d(x, weight[r][:, None], None, 1, d, d, 288)
        expected = y * scale[r][:, None, None] + shift[r][:, None, None]
        torch.testing.assert_close(got[r], expected, rtol=1e-4, atol=1e-4)


def test_batch_norm(device):
    """Folded as the docstring says."""
    maps, (weight, gamma, beta) = make_pyramid([(4, 6, 5)], DOUBLE, device=device), make_filters(1, 4, DOUBLE, device)
    mean, var = torch.randn(4, dtype=DOUBLE).to(device), torch.rand(4, dtype=DOUBLE).to(device) + 0.5
    scale = gamma / (var + 1e-5).sqrt()
    got = upsample_concat_depthwise(maps, weight, (2,), scale=scale, shift=beta - mean * scale)
    plain = upsample_concat_depthwise(maps, weight, (2,))
    expected = F.batch_norm(plain[0].cpu(), mean.cpu(), var.cpu(), gamma[0].cpu(), beta[0].cpu(), False, 0.0, 1e-5)
    torch.testing.assert_close(got[0].cpu(), expected)


def test_nothing_to_compute(device):
    weight, scale, shift = make_filters(2, 3, device=device)
    for shape, filters in (((0, 3, 4, 5), (weight, scale, shift)), ((2, 0, 4, 5), (weight[:, :0], scale[:, :0], None))):
        maps = [torch.zeros(shape, device=device, requires_grad=True)]
        leaf = filters[0].detach().requires_grad_()
        y = upsample_concat_depthwise(maps, leaf, (1, 2), scale=filters[1], shift=filters[2])
        assert y.shape == (2, *shape)
        dx, dw = torch.autograd.grad(y.sum(), (maps[0], leaf))
        assert dx.shape == shape
        assert not dw.any()


def test_values_that_are_not_finite(device):
    """NaN reaches the outputs whose window holds it."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(1, 20, 9, 9).to(device).contiguous(memory_format=layout)
        x[:, 3, 4, 4] = float("nan")
        y = upsample_concat_depthwise([x], torch.ones(1, 20, 3, 3, device=device), (2,)).cpu()
        assert y.isnan().nonzero()[:, 2].unique().tolist() == [3]
        assert y[0, 0, 3].isnan().nonzero().tolist() == [[i, j] for i in (2, 4, 6) for j in (2, 4, 6)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [5, 13, 32])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, torch.bfloat16], ids=str)
def test_infinity_in_the_gradient_of_weights(device, dtype, width, layout):
    """It reaches the taps that read it, and nothing else."""
    for column in (0, 1, width - 2, width - 1):
        x = torch.ones(1, 20, 6, width, dtype=dtype)
        x[:, 3, 4, column] = float("inf")
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.ones(2, 20, 3, 3, dtype=dtype, device=device, requires_grad=True)
        y = upsample_concat_depthwise([x.to(device)], weight, (1, 3))
        (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
        for r, d in enumerate((1, 3)):
            reads = [[0 <= 4 - a * d < 6 and 0 <= column - b * d < width for b in (-1, 0, 1)] for a in (-1, 0, 1)]
            assert grad[r, 3].isinf().tolist() == reads
            assert grad[r, 3].isfinite().tolist() == [[not read for read in row] for row in reads]
        assert grad[:, [*range(3), *range(4, 20)]].isfinite().all()


# ---- derivatives ----


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck(device, layout, align_corners):
    maps = make_pyramid([(1, 4, 3), (2, 2, 2), (1, 4, 3)], DOUBLE, layout, images=2, device=device)
    leaves = [t.requires_grad_() for t in (*maps, *make_filters(2, 4, DOUBLE, device))]

    def function(a, b, c, weight, scale, shift):
        return upsample_concat_depthwise(
            [a, b, c], weight, (1, 2), scale=scale, shift=shift, align_corners=align_corners
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=device == "cuda")
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=device == "cuda")


def test_gradients_of_some(device):
    """What is not asked for is not computed, and does not disturb the rest."""
    maps, filters = make_pyramid([(3, 6, 5), (5, 3, 4)], device=device), make_filters(2, 8, device=device)
    every = [t.requires_grad_() for t in (*maps, *filters)]

    def gradients(*wanted):
        arguments = [t if i in wanted else t.detach() for i, t in enumerate(every)]
        y = upsample_concat_depthwise(arguments[:2], arguments[2], (1, 2), scale=arguments[3], shift=arguments[4])
        return torch.autograd.grad(y.sin().sum(), [every[i] for i in wanted])

    full = gradients(*range(5))
    for wanted in ((0,), (1,), (2,), (3,), (4,), (0, 4), (1, 2)):
        for got, i in zip(gradients(*wanted), wanted, strict=True):
            assert torch.equal(got, full[i])


# ---- the contract ----


def test_same_bits_for_every_number_of_threads():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = []
            for layout in ("contiguous", "channels_last"):
                for shapes in ([(1, 60, 30), (2, 30, 20)], [(70, 20, 18), (60, 10, 9)]):
                    maps = make_pyramid(shapes, layout=layout)
                    leaves = [t.requires_grad_() for t in (*maps, *make_filters(2, sum(s[0] for s in shapes)))]
                    y = upsample_concat_depthwise(leaves[:2], leaves[2], (1, 4), scale=leaves[3], shift=leaves[4])
                    result += [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck(device):
    maps = [m.requires_grad_() for m in make_pyramid([(3, 6, 5), (5, 3, 4)], layout="channels_last", device=device)]
    weight, scale, shift = (t.requires_grad_() for t in make_filters(2, 8, device=device))
    op = torch.ops.pyseg.upsample_concat_depthwise.default
    torch.library.opcheck(op, (maps, weight, scale, shift, [6, 5], [1, 2], True))
    torch.library.opcheck(op, (maps[:1], weight[:, :3], None, None, [9, 5], [1, 2], False))
    backward = torch.ops.pyseg._upsample_concat_depthwise_backward.default
    grad = make_map((2, 2, 8, 6, 5)).to(device).requires_grad_()
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward, (grad, maps, weight, [1, 2], True, *needed))


def test_vmap(device):
    x, y = make_map((3, 2, 4, 6, 5)).to(device), make_map((2, 4, 3, 4)).to(device)
    weight, scale, shift = make_filters(2, 8, device=device)

    def function(x, y, weight):
        return upsample_concat_depthwise([x, y], weight, (1, 2), scale=scale, shift=shift)

    got = torch.vmap(function, (0, None, None))(x, y, weight)
    assert torch.equal(got, torch.stack([function(sample, y, weight) for sample in x]))
    weights = torch.stack([weight, weight * 2, -weight])
    got = torch.vmap(function)(x, torch.stack([y] * 3), weights)
    assert torch.equal(got, torch.stack([function(sample, y, w) for sample, w in zip(x, weights, strict=True)]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batched_gradients(device, layout):
    """Many gradients in one call, and the derivatives of such."""
    images = 2 if device == "cpu" else 1  # interpreted kernels take long
    maps = make_pyramid([(1, 3, 2), (2, 2, 2)], DOUBLE, layout, images=images, device=device)
    leaves = [t.requires_grad_() for t in (*maps, *make_filters(2, 3, DOUBLE, device))]

    def function(a, b, weight, scale, shift):
        return upsample_concat_depthwise([a, b], weight, (1, 2), scale=scale, shift=shift)

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True)


def test_vmap_of_gradients(device):
    """Over the gradients of one result, and of all that the backward operator takes."""
    x, y = make_map((3, 2, 4, 6, 5)).to(device), make_map((2, 4, 3, 4)).to(device)
    weight, *_ = make_filters(2, 8, device=device)
    leaves = [t.detach().requires_grad_() for t in (x[0], y, weight)]
    output = upsample_concat_depthwise(leaves[:2], leaves[2], (1, 2))
    vectors = make_map((3, *output.shape), seed=9).to(device)

    def gradients(vector):
        return torch.autograd.grad(output, leaves, vector, retain_graph=True)

    expected = [torch.stack(each) for each in zip(*map(gradients, vectors), strict=True)]
    assert all(torch.equal(*pair) for pair in zip(torch.vmap(gradients)(vectors), expected, strict=True))

    def backward(vector, x, weight):
        grads = torch.ops.pyseg._upsample_concat_depthwise_backward(vector, [x, y], weight, [1, 2], True, True, True)
        return *grads[0], *grads[1:]

    weights = torch.stack([weight, weight * 2, -weight])
    expected = [torch.stack(each) for each in zip(*map(backward, vectors, x, weights), strict=True)]
    assert all(torch.equal(*pair) for pair in zip(torch.vmap(backward)(vectors, x, weights), expected, strict=True))


def test_autocast(device):
    """Maps in autocast's dtype, filters as they are."""
    maps = [m.requires_grad_() for m in make_pyramid([(3, 6, 5), (5, 3, 4)], device=device)]
    weight, scale, shift = (t.requires_grad_() for t in make_filters(2, 8, device=device))
    with torch.autocast(device, torch.bfloat16):
        got = upsample_concat_depthwise(maps, weight, (1, 2), scale=scale, shift=shift)
    cast = [m.bfloat16() for m in maps]
    expected = upsample_concat_depthwise(cast, weight, (1, 2), scale=scale, shift=shift)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    grads = torch.autograd.grad(got.float().sum(), (*maps, weight, scale, shift))
    assert all(grad.dtype == FLOAT for grad in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "upsample_concat_depthwise: inputs must not be empty"),
        ({"inputs": [torch.ones(8, 6, 5)]}, r"inputs must be \[N, C, H, W\], got \[8, 6, 5\]"),
        (
            {"inputs": [torch.ones(1, 8, 6, 5).int()]},
            "inputs must be float32, float64, float16 or bfloat16, got torch.",
        ),
        ({"weight": torch.ones(2, 7, 3, 3)}, r"weight must be \[2, 8, 3, 3\], got \[2, 7, 3, 3\]"),
        ({"weight": torch.ones(2, 8, 1, 3, 3)}, r"weight must be \[2, 8, 3, 3\], got \[2, 8, 1, 3, 3\]"),
        ({"weight": torch.ones(2, 8, 3, 3).double()}, "weight must be torch.* like the inputs or what they are"),
        ({"dilations": (1, 2, 4)}, r"weight must be \[3, 8, 3, 3\], got \[2, 8, 3, 3\]"),
        ({"dilations": ()}, r"dilations must be 1 to 16 positive integers, got \[\]"),
        ({"dilations": (0, 1)}, r"dilations must be 1 to 16 positive integers, got \[0, 1\]"),
        ({"dilations": (1,) * 17}, r"dilations must be 1 to 16 positive integers, got \[1, 1"),
        ({"scale": torch.ones(8)}, r"scale must be \[2, 8\], got \[8\]"),
        ({"shift": torch.ones(2, 8).half()}, "shift must be torch.* like the inputs or what they are computed in, got"),
        ({"size": (0, 5)}, r"size must have positive H and W, got \[0, 5\]"),
    ],
)
def test_errors(device, change, message):
    arguments = {
        "inputs": [torch.ones(1, 3, 6, 5), torch.ones(1, 5, 3, 4)],
        "weight": torch.ones(2, 8, 3, 3),
        "dilations": (1, 2),
        **change,
    }
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to(device)
    arguments["inputs"] = [x.to(device) for x in arguments["inputs"]]
    with pytest.raises(RuntimeError, match=message):
        upsample_concat_depthwise(**arguments)
