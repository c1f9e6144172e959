"""permutohedral_filter against the slow lattice, its transpose, its gradients."""

import pytest
import torch
from crf_cases import on_each_number_of_threads, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from pyseg import reference
from pyseg.functional import permutohedral_filter, permutohedral_lattice
from pyseg.functional.permutohedral_lattice import LEVELS

OP = torch.ops.pyseg.permutohedral_filter.default


def expected_of(features, values, accuracy, transpose=False):
    return reference.permutohedral_filter(features, values, **LEVELS[accuracy]._asdict(), reverse=transpose)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("accuracy", LEVELS)
@pytest.mark.parametrize("d", range(1, 9))
def test_definition(device, d, accuracy, transpose):
    points = 50 if device == "cpu" else 20
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        features, values = randn(2, d, points, seed=d, dtype=dtype) * 1.5, randn(2, 5, points, seed=9, dtype=dtype)
        expected = expected_of(features, values, accuracy, transpose)
        lattice = permutohedral_lattice(features.to(device), accuracy)
        got = permutohedral_filter(lattice, values.to(device), transpose=transpose)
        assert got.dtype == dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=tolerance * scale)


@settings(max_examples=25)
@given(
    d=st.integers(1, 8),
    images=st.integers(1, 3),
    points=st.integers(1, 40),
    channels=st.integers(1, 40),
    accuracy=st.sampled_from(list(LEVELS)),
    spread=st.sampled_from([0.05, 1.0, 5.0]),
    seed=st.integers(0, 2**16),
)
def test_hypothesis(d, images, points, channels, accuracy, spread, seed):
    features, values = randn(images, d, points, seed=seed) * spread, randn(images, channels, points, seed=seed + 1)
    got = permutohedral_filter(permutohedral_lattice(features, accuracy), values)
    torch.testing.assert_close(got, expected_of(features, values, accuracy), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 16, 21, 32, 33, 150])
def test_channels(device, channels):
    """Every width of rows has its own loops."""
    features = randn(2, 3, 23, seed=1, dtype=torch.float32)
    values = randn(2, channels, 23, seed=2, dtype=torch.float32)
    lattice = permutohedral_lattice(features.to(device))
    got = permutohedral_filter(lattice, values.to(device)).cpu().double()
    torch.testing.assert_close(got, expected_of(features, values, "fast"), rtol=1e-5, atol=1e-5)


def test_many_points_on_one_vertex(device):
    """Constant images: rows of the lattice that are as long as the image."""
    points = 5000 if device == "cpu" else 700
    features = torch.zeros(1, 2, points)
    features[0, 0, points // 2 :] = 0.3
    values = rand(1, 2, points, dtype=torch.float32)
    got = permutohedral_filter(permutohedral_lattice(features.to(device)), values.to(device)).cpu().double()
    torch.testing.assert_close(got, expected_of(features, values, "fast"), rtol=1e-5, atol=1e-2)


def test_layouts(device):
    """[N, C, *S] of any strides and [P, C]."""
    features, values = randn(2, 3, 4, 5, dtype=torch.float32), randn(2, 6, 4, 5, seed=1, dtype=torch.float32)
    lattice = permutohedral_lattice(features.to(device))
    expected = permutohedral_filter(lattice, values.to(device))
    torch.testing.assert_close(
        expected.flatten(2).cpu().double(), expected_of(features.flatten(2), values.flatten(2), "fast"), rtol=1e-5,
        atol=1e-5,
    )  # fmt: skip
    for strided in (
        values.to(device).contiguous(memory_format=torch.channels_last),
        values.to(device).transpose(2, 3).contiguous().transpose(2, 3),
        values.to(device).repeat_interleave(2, 3)[..., ::2],
        values.to(device)[:, :1].expand(-1, 6, -1, -1),
    ):
        got = permutohedral_filter(lattice, strided)
        assert torch.equal(got, permutohedral_filter(lattice, strided.contiguous()))
    points = permutohedral_lattice(features[0].flatten(1).T.to(device))
    one = permutohedral_filter(points, values[0].flatten(1).T.to(device))
    assert one.shape == (20, 6)
    torch.testing.assert_close(one.T, expected[0].flatten(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_types(device, dtype):
    """Computed in float32, rounded once."""
    features, values = randn(1, 3, 30, dtype=torch.float32), rand(1, 4, 30, dtype=torch.float32).to(dtype)
    lattice = permutohedral_lattice(features.to(device))
    for transpose in (False, True):
        got = permutohedral_filter(lattice, values.to(device), transpose=transpose)
        wide = permutohedral_filter(lattice, values.to(device).float(), transpose=transpose)
        assert got.dtype == dtype
        assert torch.equal(got, wide.to(dtype))


def test_nothing(device):
    for images, channels, points in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        lattice = permutohedral_lattice(torch.zeros(images, 2, points, device=device))
        values = torch.zeros(images, channels, points, device=device)
        assert permutohedral_filter(lattice, values).shape == values.shape


def test_values_that_are_not_finite(device):
    """They reach their neighbours in their own channel, not other channels or images."""
    features, values = randn(2, 2, 30, dtype=torch.float32) * 0.2, rand(2, 3, 30, dtype=torch.float32)
    lattice = permutohedral_lattice(features.to(device))
    clean = permutohedral_filter(lattice, values.to(device))
    values[0, 1, 4] = float("nan")
    got = permutohedral_filter(lattice, values.to(device))
    assert got[0, 1].isnan().any()
    assert torch.equal(got[0, [0, 2]], clean[0, [0, 2]])
    assert torch.equal(got[1], clean[1])


@pytest.mark.parametrize("accuracy", LEVELS)
def test_transpose(device, accuracy):
    """<A x, y> = <x, A^T y>."""
    lattice = permutohedral_lattice(randn(2, 4, 25).to(device), accuracy)
    x, y = randn(2, 3, 25, seed=1).to(device), randn(2, 3, 25, seed=2).to(device)
    left = (permutohedral_filter(lattice, x) * y).sum()
    right = (x * permutohedral_filter(lattice, y, transpose=True)).sum()
    torch.testing.assert_close(left, right)


def test_same_bits_for_every_number_of_threads():
    """Many images, one large image, few and many channels."""
    for images, d, points, channels in ((3, 5, 500, 21), (1, 2, 9000, 1), (1, 3, 2500, 33)):
        features, values = randn(images, d, points, dtype=torch.float32), randn(images, channels, points, seed=1)
        values = values.float()
        for accuracy in LEVELS:

            def run(features=features, values=values, accuracy=accuracy):
                f, v = features.clone().requires_grad_(), values.clone().requires_grad_()
                filtered = permutohedral_filter(permutohedral_lattice(f, accuracy), v)
                return [filtered.detach(), *torch.autograd.grad(filtered.square().sum(), (f, v))]

            if accuracy == "fast" or points < 1000:
                on_each_number_of_threads(run)


# ---- gradients ----


@pytest.mark.parametrize("accuracy", LEVELS)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_gradcheck(device, d, accuracy):
    features, values = randn(2, d, 7, seed=3).to(device), randn(2, 3, 7, seed=4).to(device).requires_grad_()
    lattice = permutohedral_lattice(features, accuracy)
    fast = device == "cuda"
    for transpose in (False, True):
        assert torch.autograd.gradcheck(
            lambda v, t=transpose: permutohedral_filter(lattice, v, transpose=t), values, fast_mode=fast
        )
    features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, v: permutohedral_filter(permutohedral_lattice(f, accuracy), v), (features, values), eps=1e-7,
        atol=1e-5, fast_mode=fast,
    )  # fmt: skip


@pytest.mark.parametrize("accuracy", LEVELS)
def test_gradients_of_the_reference(device, accuracy):
    features, values = randn(1, 3, 20, seed=3).requires_grad_(), randn(1, 4, 20, seed=4).requires_grad_()
    upstream = randn(1, 4, 20, seed=5)
    expected = torch.autograd.grad(expected_of(features, values, accuracy), (features, values), upstream)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        f, v = (t.detach().to(device, dtype).requires_grad_() for t in (features, values))
        got = torch.autograd.grad(
            permutohedral_filter(permutohedral_lattice(f, accuracy), v), (f, v), upstream.to(device, dtype)
        )
        for a, b in zip(got, expected, strict=True):
            scale = b.abs().max().item()
            torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=tolerance * scale)


def test_gradient_of_narrow_values(device):
    lattice = permutohedral_lattice(randn(1, 2, 20, dtype=torch.float32).to(device))
    values = rand(1, 3, 20).to(device, torch.bfloat16).requires_grad_()
    (grad,) = torch.autograd.grad(permutohedral_filter(lattice, values).sum(), values)
    assert grad.dtype == torch.bfloat16
    ones = torch.ones(1, 3, 20, device=device)
    torch.testing.assert_close(grad.float(), permutohedral_filter(lattice, ones, transpose=True), rtol=1e-2, atol=1e-2)


def test_second_order(device):
    """Linear in the values, to any order; the weights' gradient ends there."""
    features, values = randn(1, 2, 6, seed=3).to(device), randn(1, 2, 6, seed=4).to(device).requires_grad_()
    lattice = permutohedral_lattice(features)
    assert torch.autograd.gradgradcheck(lambda v: permutohedral_filter(lattice, v).square(), values)
    features.requires_grad_()
    filtered = permutohedral_filter(permutohedral_lattice(features), values)
    (grad,) = torch.autograd.grad(filtered.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="permutohedral_.*: the gradient cannot be differentiated again"):
        grad.sum().backward()


# ---- the contract ----


@pytest.mark.parametrize("accuracy", LEVELS)
def test_opcheck(device, accuracy):
    features, values = randn(2, 3, 7).to(device).requires_grad_(), randn(2, 2, 7).to(device).requires_grad_()
    lattice = [tensor.detach() for tensor in permutohedral_lattice(features, accuracy)[:9]]
    lattice[1].requires_grad_()
    torch.library.opcheck(OP, (values, *lattice, False))
    plain = [tensor.detach() for tensor in (values, values, *lattice)]
    torch.library.opcheck(torch.ops.pyseg._permutohedral_filter_backward_weight.default, (*plain, True))


def test_vmap(device):
    """Many values on one lattice."""
    lattice = permutohedral_lattice(randn(2, 3, 7).to(device))
    values = randn(4, 2, 5, 7).to(device)
    got = torch.vmap(lambda v: permutohedral_filter(lattice, v))(values)
    torch.testing.assert_close(got, torch.stack([permutohedral_filter(lattice, v) for v in values]))
    got = torch.vmap(lambda v: permutohedral_filter(lattice, v), in_dims=2, out_dims=2)(values.movedim(0, 2))
    torch.testing.assert_close(got.movedim(2, 0), torch.stack([permutohedral_filter(lattice, v) for v in values]))
    weights = lattice.weight.expand(4, -1, -1, -1)
    with pytest.raises(RuntimeError, match="permutohedral_filter: vmap must be over values alone"):
        torch.vmap(lambda w, v: permutohedral_filter(lattice._replace(weight=w), v))(weights, values)
    with pytest.raises(RuntimeError, match="permutohedral_lattice: vmap must not be over features"):
        torch.vmap(lambda f: permutohedral_lattice(f).weight)(randn(4, 2, 3, 7).to(device))


def test_autocast(device):
    """Changes nothing."""
    lattice = permutohedral_lattice(randn(1, 2, 7, dtype=torch.float32).to(device))
    values = rand(1, 2, 7, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(permutohedral_filter(lattice, values), permutohedral_filter(lattice, values.clone()))
        assert permutohedral_filter(lattice, values).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": lambda v: v[0]}, r"values must be \[2, C, 7\], got \[1, 2, 7\]|values must be \[2, C, 7\]"),
        ({"values": lambda v: v[..., :6]}, r"values must be \[2, C, 7\], got \[2, 2, 6\]"),
        ({"values": lambda v: v.long()}, "values must be float32, float64, float16 or bfloat16, got"),
        ({"values": lambda v: v.double()}, "weight must be torch.Double, got torch.Float"),
        ({"weight": lambda t: t[:1]}, r"weight must be \[2, 7, 4\], got \[1, 7, 4\]"),
        ({"vertex": lambda t: t.long()}, "vertex must be torch.Int, got torch.Long"),
        ({"vertex": lambda t: t[0]}, r"vertex must be \[N, P, d \+ 1\] with d from 1 to 8"),
        ({"neighbour": lambda t: t[:3]}, r"neighbour must be \[4, "),
        ({"offset": lambda t: t[:2]}, r"offset must be \[3\], got \[2\]"),
        ({"kernel_weight": lambda t: t.new_zeros(3)}, r"kernel_weight must be \[0\], got \[3\]"),
    ],
)
def test_errors(device, change, message):
    features, values = randn(2, 3, 7, dtype=torch.float32), randn(2, 2, 7, dtype=torch.float32)
    lattice, values = permutohedral_lattice(features.to(device)), values.to(device)
    for name, to in change.items():
        if name == "values":
            values = to(values)
        else:
            lattice = lattice._replace(**{name: to(getattr(lattice, name))})
    with pytest.raises(RuntimeError, match=f"permutohedral_filter: ({message})"):
        permutohedral_filter(lattice, values)


def test_values_without_channels():
    lattice = permutohedral_lattice(randn(1, 3, 7))
    with pytest.raises(RuntimeError, match=r"values must be \[N, C, \*S\] or \[P, C\], got \[7\]"):
        permutohedral_filter(lattice, randn(7))


@pytest.mark.parametrize("accuracy", LEVELS)
@pytest.mark.parametrize("name", ["vertex", "neighbour", "offset", "kernel_row", "kernel_vertex"])
def test_lattices_that_would_be_read_out_of_bounds(name, accuracy):
    """On the CPU contents are checked, too."""
    for images in (1, 2):
        lattice = permutohedral_lattice(randn(images, 3, 7), accuracy)
        tensor = getattr(lattice, name)
        if tensor.numel() == 0:
            continue
        for value in (1 << 20, -2):
            wrong = tensor.clone()
            wrong.view(-1)[tensor.numel() // 2] = value
            with pytest.raises(RuntimeError, match=f"permutohedral_filter: {name.removeprefix('kernel_')[:6]}|kernel_"):
                permutohedral_filter(lattice._replace(**{name: wrong}), randn(images, 2, 7))


@pytest.mark.parametrize("accuracy", LEVELS)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", ["vertex", "neighbour", "kernel_vertex"])
def test_vertices_of_the_padding(name, images, accuracy):
    """Tables end with an image's vertices, which may be fewer than the lattice has rows."""
    plain = permutohedral_lattice(randn(images, 3, 7), accuracy)
    lattice = permutohedral_lattice(randn(images, 3, 7), accuracy, max_vertices=len(plain.key) + 5)
    values = randn(images, 2, 7)
    torch.testing.assert_close(permutohedral_filter(lattice, values), permutohedral_filter(plain, values))
    wrong = getattr(lattice, name).clone()
    if wrong.numel() > 0:
        wrong.view(-1)[0] = len(plain.key) + 2
        with pytest.raises(RuntimeError, match=f"permutohedral_filter: {name} must be of its image"):
            permutohedral_filter(lattice._replace(**{name: wrong}), values)


@pytest.mark.parametrize("images", [1, 2])
def test_offsets_that_do_not_start_at_zero(images):
    lattice = permutohedral_lattice(randn(images, 3, 7), max_vertices=100)
    with pytest.raises(RuntimeError, match="permutohedral_filter: offset must start at 0, got 1"):
        permutohedral_filter(lattice._replace(offset=lattice.offset + 1), randn(images, 2, 7))


def test_rows_that_do_not_ascend():
    lattice = permutohedral_lattice(randn(2, 3, 7), "high")
    row = lattice.kernel_row.clone()
    row[1] = row[2] + 1
    with pytest.raises(RuntimeError, match="permutohedral_filter: kernel_row must ascend"):
        permutohedral_filter(lattice._replace(kernel_row=row), randn(2, 2, 7))
