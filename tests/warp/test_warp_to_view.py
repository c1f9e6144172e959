"""warp_to_view against the reference, torch's grid_sample, kornia, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from view_cases import DOUBLE, DTYPES, LAYOUTS, assert_near, intrinsics, make_geometry, make_scores

from cuda_budget import cuda_budget
from devices import ORDERS, fake_gpu
from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import warp_to_view

TOLERANCE = {"absolute_tolerance": 0.6, "relative_tolerance": 0.02}


def compare(scores, geometry, device, tested=True):
    """Result, mask and gradient of both; the share of pixels that are seen."""
    *cameras, measured = geometry
    measured = measured if tested else None
    x = scores.to(device).requires_grad_()
    on_device = [t if t is None else t.to(device) for t in (*cameras, measured)]
    y, valid = warp_to_view(x, *on_device, **TOLERANCE)
    x_ref = scores.detach().double().requires_grad_()
    y_ref, valid_ref = reference.warp_to_view(x_ref, *cameras, measured, **TOLERANCE)
    assert torch.equal(valid.cpu(), valid_ref)
    assert y.dtype == scores.dtype
    assert_near(y, y_ref)
    if valid_ref.any():
        grad = make_scores(y.shape, y.dtype, seed=9)
        (dx,) = torch.autograd.grad(y, x, grad.to(device))
        (dx_ref,) = torch.autograd.grad(y_ref, x_ref, grad.double())
        assert_near(dx, dx_ref, terms=20)
    return valid_ref.double().mean().item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(device, dtype, layout):
    """Channel counts on both sides of the vectors' lengths and of the chunks of 16."""
    geometry = make_geometry(2, (5, 9), (7, 6))
    for channels in (1, 8, 19):
        seen = compare(make_scores((2, channels, 7, 6), dtype, layout), geometry, device)
        assert 0.1 < seen < 0.9


def test_second_derivative_in_slices_of_channels(device):
    """The operator reads what the gradient's gradient is, of whatever strides."""
    geometry = [t.to(device) for t in make_geometry(1, (4, 3), (3, 4))]
    grad = torch.ones(1, 3, 4, 3, device=device, requires_grad=True)
    arguments = (*geometry[:4], None, 3, 4, True, 0.6, 0.02)
    dx = torch.ops.pyseg._warp_to_view_backward(grad, *arguments)
    v = make_scores((1, 3, 3, 4), layout="every other channel").to(device)
    (got,) = torch.autograd.grad(dx, grad, v)
    assert_near(got, warp_to_view(v.contiguous(), *geometry[:4])[0].cpu())


def test_long_rows(device):
    """More than one tile of a row, and of a view's rows."""
    for layout in ("contiguous", "channels_last"):
        assert compare(make_scores((1, 3, 9, 140), layout=layout), make_geometry(1, (2, 133), (9, 140)), device) > 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (8, 1), (2, 2)])
def test_one_row_or_column(device, size):
    seen = [
        compare(make_scores((1, 2, *size), DOUBLE, layout), make_geometry(1, (6, 5), size, angle=0.01), device, False)
        for layout in ("contiguous", "channels_last")
    ]
    assert min(seen) > 0


@st.composite
def drawn(draw):
    images, channels = draw(st.integers(1, 2)), draw(st.integers(1, 20))
    key_size, size = ([draw(st.integers(1, 6)) for _ in range(2)] for _ in range(2))
    layout = draw(st.sampled_from(LAYOUTS))
    seed = draw(st.integers(0, 99))
    scores = make_scores((images, channels, *size), draw(st.sampled_from(DTYPES)), layout, seed)
    return scores, make_geometry(images, key_size, size, seed), draw(st.booleans())


def test_drawn_cases(device):
    @drawn_settings(30, 6, device)
    @given(drawn())
    def run(case):
        compare(*case[:2], device, case[2])

    run()


def test_identity(device):
    """A camera sees its own image, up to its edges; invalid depths are holes."""
    x = make_scores((2, 3, 6, 7)).to(device)
    depth = torch.full((2, 1, 6, 7), 2.0, device=device)
    for i, wrong in enumerate((0.0, -1.0, math.nan, math.inf)):
        depth[1, 0, i, i] = wrong
    k = intrinsics(1, 6, 7)[0].to(device)
    y, valid = warp_to_view(x, depth, k, k, torch.eye(4, device=device), depth)
    expected = torch.ones(2, 6, 7, dtype=torch.bool)
    expected[1, range(4), range(4)] = False
    assert torch.equal(valid.cpu(), expected)
    assert_near(y, x.cpu().double() * expected.unsqueeze(1))


def test_occlusion(device):
    """Of two points on a ray of the frame the nearer one is seen; without its depth map both are."""
    scores = torch.ones(1, 1, 3, 3, device=device)
    depth = torch.tensor([1.0, 2.0, 3.0], device=device).expand(3, 3).unsqueeze(0)
    k, pose = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]], device=device), torch.eye(4, device=device)
    measured = torch.full((1, 3, 3), 2.0, device=device)
    for tolerances, seen in (((0.5, 0.0), [0, 1, 0]), ((0.0, 0.5), [1, 1, 1]), ((1.0, 0.0), [1, 1, 1])):
        named = dict(zip(("absolute_tolerance", "relative_tolerance"), tolerances, strict=True))
        valid = warp_to_view(scores, depth, k, k, pose, measured, **named)[1]
        assert valid.cpu().tolist() == [[[bool(each) for each in seen]] * 3]
    assert warp_to_view(scores, depth, k, k, pose)[1].all()


def test_values_that_are_not_finite(device):
    """NaN reaches what lies beside it; none of what is not seen."""
    geometry = [t.to(device) for t in make_geometry(1, (6, 7), (6, 7))]
    x = torch.full((1, 17, 6, 7), math.nan, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        y, valid = warp_to_view(x.contiguous(memory_format=layout), *geometry, **TOLERANCE)
        assert torch.equal(y.isnan().all(1), valid)
        assert (y.nan_to_num() == 0).all()


def test_grid_sample_and_kornia():
    """What users compose today, where their semantics match: no depth test, every point within the view."""
    depth = torch.rand(2, 1, 9, 11, dtype=DOUBLE) + 4
    k = intrinsics(2, 9, 11)
    k[:, 0, 1] = 0  # kornia takes no skew
    pose = torch.eye(4, dtype=DOUBLE).repeat(2, 1, 1)
    pose[:, :2, 3] = torch.tensor([[0.05, -0.04], [0.1, 0.02]], dtype=DOUBLE)
    pose[:, 2, 3] = 1.5  # the keyframe's camera is nearer to the scene
    x = make_scores((2, 4, 9, 11), DOUBLE)
    y, valid = warp_to_view(x, depth, k, k, pose)
    assert valid.all()
    kornia = pytest.importorskip("kornia.geometry.depth")
    torch.testing.assert_close(y, kornia.warp_frame_depth(x, depth, pose, k))
    v, u = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    rays = torch.linalg.inv(k) @ torch.stack([u, v, torch.ones_like(u)]).double().flatten(1)
    points = k @ (pose[:, :3, :3] @ (rays * depth.flatten(2)) + pose[:, :3, 3:])
    x_at, y_at = points[:, 0] / points[:, 2] / 5 - 1, points[:, 1] / points[:, 2] / 4 - 1
    grid = torch.stack([x_at, y_at], -1).unflatten(1, (9, 11))
    torch.testing.assert_close(y, F.grid_sample(x, grid, align_corners=True))


def test_one_keyframe_of_many_frames(device):
    """Depth and cameras of one image stand for all; the operator's sum over views is that of the frames."""
    geometry = [t.to(device) for t in make_geometry(3, (5, 6), (6, 5))]
    x = make_scores((3, 17, 6, 5), DOUBLE).to(device)
    depth, key, source, pose, measured = geometry
    y, valid = warp_to_view(x, depth[:1], key[0], source[:1], pose, measured, **TOLERANCE)
    each = (key, source[:1].expand(3, 3, 3), pose, measured)
    full, mask = warp_to_view(x, depth[:1].expand(3, -1, -1), *each, **TOLERANCE)
    assert torch.equal(y, full)
    assert torch.equal(valid, mask)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        total, count = torch.ops.pyseg.warp_to_view(leaf, depth[:1], key[:1], *each[1:], 0.6, 0.02)
        torch.testing.assert_close(total[0], full.sum(0))
        assert torch.equal(count[0], mask.sum(0, dtype=torch.uint8))
        grad = make_scores(total.shape, DOUBLE, seed=3).to(device)
        (dx,) = torch.autograd.grad(total, leaf, grad)
        again = x.clone().requires_grad_()
        parts = warp_to_view(again, depth[:1].expand(3, -1, -1), *each, **TOLERANCE)[0]
        torch.testing.assert_close(dx, torch.autograd.grad(parts, again, grad.expand_as(parts))[0])


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_of_depth(device, narrow):
    """Depth maps of any float dtype, cameras of float32 and float64, mixed."""
    depth, key, source, pose, measured = make_geometry(1, (5, 6), (6, 5))
    depth, measured, pose = depth.to(narrow), measured.to(narrow), pose.float()
    x = make_scores((1, 3, 6, 5), DOUBLE)
    got = warp_to_view(*(t.to(device) for t in (x, depth, key, source, pose, measured)), **TOLERANCE)
    expected = reference.warp_to_view(x, depth.double(), key, source, pose.double(), measured.double(), **TOLERANCE)
    assert torch.equal(got[1].cpu(), expected[1])
    torch.testing.assert_close(got[0].cpu(), expected[0])


def test_empty(device):
    depth, key, source, pose, _ = (t.to(device) for t in make_geometry(2, (3, 4), (4, 3)))
    y, valid = warp_to_view(torch.ones(0, 2, 4, 3, device=device), depth[:0], key[:0], source[:0], pose[:0])
    assert y.shape == (0, 2, 3, 4)
    assert valid.shape == (0, 3, 4)
    x = torch.ones(2, 0, 4, 3, device=device, requires_grad=True)
    y, valid = warp_to_view(x, depth, key, source, pose)
    assert y.shape == (2, 0, 3, 4)
    assert valid.any()
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


# ---- derivatives ----


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device, layout):
    geometry = [t.to(device) for t in make_geometry(2, (4, 3), (3, 4))]
    x = make_scores((2, 2, 3, 4), DOUBLE, layout).to(device).requires_grad_()
    function = lambda x: warp_to_view(x, *geometry, **TOLERANCE)[0]  # noqa: E731
    assert function(x).any()
    assert torch.autograd.gradcheck(function, x, fast_mode=device == "cuda")
    assert torch.autograd.gradgradcheck(lambda x: function(x).square(), x, fast_mode=device == "cuda")


def test_depth_and_cameras_are_constants(device):
    geometry = [t.to(device).requires_grad_() for t in make_geometry(1, (4, 3), (3, 4))]
    y, _ = warp_to_view(make_scores((1, 2, 3, 4)).to(device).requires_grad_(), *geometry, **TOLERANCE)
    assert torch.autograd.grad(y.sum(), geometry, allow_unused=True) == (None,) * 5


# ---- the contract ----


def test_same_bits_for_every_number_of_threads():
    threads, results = torch.get_num_threads(), []
    geometry = make_geometry(2, (60, 130), (60, 70), shift=0.1)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = []
            for layout in ("contiguous", "channels_last"):
                x = make_scores((2, 70, 60, 70), layout=layout).requires_grad_()
                y, _ = warp_to_view(x, *geometry, **TOLERANCE)
                result += [y.detach(), *torch.autograd.grad(y.sin().sum(), x)]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cuda_only
@pytest.mark.sm(75, 80, 90)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_order_of_blocks(device, dtype):
    """Every kernel on every capability, and nothing added up in the order in which blocks come."""
    geometry = [t.to(device) for t in make_geometry(1, (9, 17), (8, 17))]
    for channels, layout in ((17, "contiguous"), (16, "channels_last"), (5, "channels_last")):
        results = []
        for order in ORDERS:
            if fake_gpu() is not None:
                fake_gpu().set_order(order)
            x = make_scores((1, channels, 8, 17), dtype, layout).to(device).requires_grad_()
            y, _ = warp_to_view(x, *geometry, **TOLERANCE)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        if fake_gpu() is not None:
            fake_gpu().set_order(ORDERS[0])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cuda_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_budget(device, layout):
    """One launch each; sectors are counted without a cache, a source element for each of the four that read it."""
    x = make_scores((1, 16, 16, 32), layout=layout).to(device)
    depth, k = torch.full((1, 16, 32), 2.0, device=device), intrinsics(1, 16, 32).to(device)
    pose = torch.eye(4, device=device).unsqueeze(0)
    kernel = "planes" if layout == "contiguous" else "pixels"
    moved = 2 * x.nbytes + depth.nbytes
    with cuda_budget(f"::view_warp_{kernel}<", launches=1, min_bytes=moved, bytes_ratio=4):
        warp_to_view(x, depth, k, k, pose)
    arguments = (x, depth, k, k, pose, None, 16, 32, layout == "channels_last", 0.1, 0.1)
    with cuda_budget(f"::view_gather_{kernel}<", launches=1, min_bytes=moved, bytes_ratio=4):
        torch.ops.pyseg._warp_to_view_backward(*arguments)
    with cuda_budget("::view_(cells|rows)<", launches=2):
        torch.ops.pyseg._warp_to_view_backward(*arguments)


@pytest.mark.cuda_only
def test_second_device(device):
    if torch.cuda.device_count() < 2:
        return
    there = [t.to("cuda:1") for t in make_geometry(1, (4, 3), (3, 4))]
    x = make_scores((1, 2, 3, 4))
    assert warp_to_view(x.to("cuda:1"), *there)[0].device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="warp_to_view: depth must be on the device of the others"):
        warp_to_view(x.to("cuda:0"), *there)


def test_opcheck(device):
    depth, key, source, pose, measured = (t.to(device) for t in make_geometry(2, (4, 3), (3, 4)))
    x = make_scores((2, 2, 3, 4), layout="channels_last").to(device).requires_grad_()
    cameras = (key, source, pose)
    torch.library.opcheck(torch.ops.pyseg.warp_to_view.default, (x, depth, *cameras, measured, 0.6, 0.0))
    one = (x, depth[:1], key[:1], source, pose, None, 0.6, 0.0)
    torch.library.opcheck(torch.ops.pyseg.warp_to_view.default, one)
    grad = make_scores((2, 2, 4, 3)).to(device).requires_grad_()
    arguments = (grad, depth, *cameras, measured, 3, 4, True, 0.6, 0.0)
    torch.library.opcheck(torch.ops.pyseg._warp_to_view_backward.default, arguments)


def test_vmap(device):
    geometry = [t.to(device) for t in make_geometry(2, (4, 3), (3, 4))]
    x = make_scores((3, 2, 2, 3, 4)).to(device)
    function = lambda x: warp_to_view(x, *geometry, **TOLERANCE)  # noqa: E731
    got = torch.vmap(function)(x)
    for each, expected in zip(got, zip(*map(function, x), strict=True), strict=True):
        assert torch.equal(each, torch.stack(expected))
    leaf = x[0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x)[0], leaf, check_batched_grad=True, fast_mode=False)


def test_autocast(device):
    geometry = [t.to(device) for t in make_geometry(1, (4, 3), (3, 4))]
    x = make_scores((1, 2, 3, 4), torch.bfloat16).to(device)
    with torch.autocast(device, torch.bfloat16):
        y, _ = warp_to_view(x, *geometry)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, warp_to_view(x, *geometry)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(3, 4)}, r"warp_to_view: scores must be \[N, C, H, W\], got \[3, 4\]"),
        ({"scores": torch.ones(2, 2, 3, 4).long()}, "scores must be float32, float64, float16 or bfloat16, got"),
        ({"scores": torch.ones(2, 2, 0, 4)}, r"scores must have positive H and W, got \[0, 4\]"),
        ({"depth": torch.ones(2, 2, 4, 3)}, r"depth must be \[N, 1, H, W\] or \[N, H, W\], got \[2, 2, 4, 3\]"),
        ({"depth": torch.ones(3, 4, 3)}, "scores must have as many views of each of 3 keyframes, got 2"),
        ({"key_intrinsics": torch.ones(2, 3, 4)}, r"key_intrinsics must be \[2, 3, 3\], got \[2, 3, 4\]"),
        ({"source_intrinsics": torch.ones(2, 3, 3).half()}, "source_intrinsics must be float32 or float64, got"),
        ({"pose": torch.ones(3, 4, 4)}, r"pose must be \[2, 4, 4\], got \[3, 4, 4\]"),
        ({"source_depth": torch.ones(2, 4, 4)}, r"source_depth must be \[2, 3, 4\], got \[2, 4, 4\]"),
        ({"absolute_tolerance": -1.0}, "absolute_tolerance must be at least 0, got -1"),
        ({"relative_tolerance": math.nan}, "relative_tolerance must be at least 0, got nan"),
    ],
)
def test_errors(device, change, message):
    names = ("depth", "key_intrinsics", "source_intrinsics", "pose", "source_depth")
    arguments = {"scores": torch.ones(2, 2, 3, 4), **dict(zip(names, make_geometry(2, (4, 3), (3, 4)), strict=True))}
    arguments.update(change)
    on_device = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        warp_to_view(**on_device)
