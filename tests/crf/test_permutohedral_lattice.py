"""permutohedral_lattice against its definition: vertices by their keys, weights, neighbours, rows; gradients."""

import itertools

import pytest
import torch
from crf_cases import on_each_number_of_threads, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from pyseg import reference
from pyseg.functional import PermutohedralLattice, permutohedral_filter, permutohedral_lattice

OP = torch.ops.pyseg.permutohedral_lattice.default


def keys_of(key):
    """Whole coordinates of vertices, [M, d + 1]."""
    key = key.long().cpu()
    return torch.cat([key, -key.sum(1, keepdim=True)], 1)


def check_lattice(features, scale, result, tolerance):
    """Everything that the operator returns, for features [N, d, P]."""
    vertex, weight, row, entry, neighbour, offset, key = (tensor.cpu() for tensor in result)
    images, d, points = features.shape
    keys = keys_of(key)
    assert offset[0] == 0
    assert offset.shape == (images + 1,)
    used = 0
    for n in range(images):
        vertices, expected = reference.permutohedral_simplices(features[n].cpu(), scale)
        first, last = offset[n].item(), offset[n + 1].item()
        number = {tuple(keys[v].tolist()): v for v in range(first, last)}
        assert len(number) == last - first  # each vertex once
        assert set(number) == set(itertools.chain(*vertices))
        want = torch.tensor([[number[v] for v in corners] for corners in vertices]).reshape(points, d + 1)
        assert torch.equal(vertex[n].long(), want)
        torch.testing.assert_close(weight[n].double(), expected, rtol=0, atol=tolerance)
        for j in range(d + 1):
            step = [1 if k != j else -d for k in range(d + 1)]
            for at, v in number.items():
                near = {number.get(tuple(c + sign * s for c, s in zip(at, step, strict=True)), -1) for sign in (1, -1)}
                assert set(neighbour[j, v].tolist()) == near
        used = last
    assert (neighbour[:, used:] == -1).all()
    if row.numel():  # compressed rows, where splatting gathers
        assert row[0] == 0
        assert (row[used:] == vertex.numel()).all()
        assert torch.equal(entry.long().sort().values, torch.arange(vertex.numel()))
        for v in range(used):
            mine = entry[row[v] : row[v + 1]].long()
            assert (vertex.flatten()[mine] == v).all()
            assert (mine.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("d", range(1, 9))
def test_definition(device, d, dtype):
    points = 40 if device == "cpu" else 25
    features = randn(2, d, points, seed=d, dtype=dtype) * 2
    for scale in (1.0, 1.4):
        result = OP(features.to(device), scale, -1)
        assert result[1].dtype == dtype
        check_lattice(features, scale, result, 1e-12 if dtype == torch.float64 else 1e-4)


@settings(max_examples=25)
@given(
    d=st.integers(1, 8),
    images=st.integers(1, 3),
    points=st.integers(0, 33),
    scale=st.sampled_from([0.3, 1.0, 2.5]),
    spread=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_hypothesis(d, images, points, scale, spread, seed):
    features = randn(images, d, points, seed=seed) * spread
    check_lattice(features, scale, OP(features, scale, -1), 1e-9)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_points_on_vertices_and_faces(device, d):
    """Ties: the origin, and points that share coordinates. Weights are not negative and sum to one."""
    features = torch.zeros(1, d, 12, dtype=torch.float64)
    features[0, 0, 4:8] = torch.arange(4.0)
    features[0, d - 1, 8:] = -torch.arange(4.0)
    vertex, weight, *_ = OP(features.to(device), 1.0, -1)
    assert (weight >= -1e-12).all()
    torch.testing.assert_close(weight.sum(2), torch.ones_like(weight[..., 0]))
    assert torch.equal(vertex[0, 0], vertex[0, 3])
    assert (vertex >= 0).all()


@pytest.mark.parametrize("d", [2, 5, 8])
def test_far_points(device, d):
    """Keys are whole: vertices at the two ends of the range are different ones."""
    limit = 32000 / ((d + 1) * (2 / 3) ** 0.5 * (d / (d + 1)) ** 0.5)
    features = randn(1, d, 2 * d + 1)  # without ties
    for i in range(d):
        features[0, i, 2 * i] += limit * 0.9
        features[0, i, 2 * i + 1] -= limit * 0.9
    check_lattice(features, 1.0, OP(features.to(device), 1.0, -1), 1e-6)


def test_too_far():
    """An error, not a truncated key."""
    features = torch.zeros(1, 5, 3)
    for bad in (1e4, -1e6, float("inf"), float("nan")):
        features[0, 2, 1] = bad
        with pytest.raises(RuntimeError, match="features must be finite and within about .* standard deviations"):
            permutohedral_lattice(features)


@pytest.mark.cuda_only
def test_too_far_on_cuda(device):
    """Such points are left out: weights NaN, and so is what is filtered there."""
    features = randn(1, 3, 20, dtype=torch.float32)
    features[0, 1, 4], features[0, 0, 9], features[0, 2, 15] = float("nan"), float("inf"), 1e6
    lattice = permutohedral_lattice(features.to(device))
    assert (lattice.vertex[0, [4, 9, 15]] == -1).all()
    assert lattice.weight[0, [4, 9, 15]].isnan().all()
    good = [i for i in range(20) if i not in (4, 9, 15)]
    expected = permutohedral_lattice(features[:, :, good])
    torch.testing.assert_close(lattice.weight[:, good].cpu(), expected.weight)
    values = rand(1, 2, 20, dtype=torch.float32)
    filtered = permutohedral_filter(lattice, values.to(device)).cpu()
    assert filtered[..., [4, 9, 15]].isnan().all()
    torch.testing.assert_close(filtered[..., good], permutohedral_filter(expected, values[..., good]))


def test_max_vertices(device):
    """A padded lattice filters as the exact one; one that is too small is an error, on CUDA a count."""
    features, values = randn(2, 3, 30).to(device), rand(2, 4, 30).to(device)
    exact = permutohedral_lattice(features)
    count = exact.offset[-1].item()
    assert exact.key.shape == (count, 3)
    for accuracy in ("fast", "high") if device == "cpu" else ("fast",):
        exact = permutohedral_lattice(features, accuracy)
        size = exact.offset[-1].item()
        padded = permutohedral_lattice(features, accuracy, max_vertices=size + 7)
        assert padded.key.shape == (size + 7, 3)
        assert padded.neighbour.shape == (4, size + 7, 2)
        torch.testing.assert_close(permutohedral_filter(padded, values), permutohedral_filter(exact, values))
    if device == "cpu":
        with pytest.raises(RuntimeError, match=f"max_vertices must be at least {count}, got 5"):
            permutohedral_lattice(features, max_vertices=5)
    else:
        assert permutohedral_lattice(features, max_vertices=5).offset[-1] == count


def test_layouts_and_types(device):
    features = randn(2, 3, 5, 4, dtype=torch.float32).to(device)
    expected = permutohedral_lattice(features)
    strided = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for a, b in zip(expected, permutohedral_lattice(strided), strict=True):
        assert torch.equal(a, b)
    one = permutohedral_lattice(features[1].flatten(1).T)
    assert one.vertex.shape == (1, 20, 4)
    torch.testing.assert_close(one.weight[0], expected.weight[1])
    for dtype in (torch.float16, torch.bfloat16):
        narrow = permutohedral_lattice(features.to(dtype))
        assert narrow.weight.dtype == torch.float32
        assert torch.equal(narrow.weight, permutohedral_lattice(features.to(dtype).float()).weight)


def test_nothing(device):
    for shape in ((0, 3, 5), (2, 3, 0), (0, 1, 0)):
        lattice = permutohedral_lattice(torch.zeros(shape, device=device))
        assert lattice.vertex.shape == (shape[0], shape[2], shape[1] + 1)
        assert lattice.key.shape == (0, shape[1])
        assert torch.equal(lattice.offset.cpu(), torch.zeros(shape[0] + 1, dtype=torch.int64))


def test_same_bits_for_every_number_of_threads():
    for d, points in ((2, 3000), (5, 2500), (8, 700)):
        features = randn(3, d, points, dtype=torch.float32)

        def build(features=features):
            lattice = permutohedral_lattice(features.requires_grad_())
            (grad,) = torch.autograd.grad(lattice.weight.square().sum(), features)
            return [lattice.weight.detach(), grad]

        on_each_number_of_threads(build)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_gradcheck(device, d):
    """Weights are linear in the features within a simplex: random points are not on its faces."""
    features = randn(2, d, 6, seed=5).to(device).requires_grad_()
    fast = device == "cuda"
    assert torch.autograd.gradcheck(
        lambda f: permutohedral_lattice(f).weight, features, eps=1e-7, atol=1e-6, fast_mode=fast
    )


def test_gradient_of_the_reference(device):
    features = randn(3, 17, seed=2).requires_grad_()
    (expected,) = torch.autograd.grad(reference.permutohedral_simplices(features)[1].square().sum(), features)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.float16, 2e-2)):
        moved = features.detach()[None].to(device, dtype).requires_grad_()
        (grad,) = torch.autograd.grad(permutohedral_lattice(moved).weight.square().sum(), moved)
        assert grad.dtype == dtype
        rounded = features.detach().to(dtype).double().requires_grad_()
        (expected,) = torch.autograd.grad(reference.permutohedral_simplices(rounded)[1].square().sum(), rounded)
        torch.testing.assert_close(grad[0].double().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_no_double_backward():
    features = randn(1, 2, 5).requires_grad_()
    (grad,) = torch.autograd.grad(permutohedral_lattice(features).weight.pow(2).sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="permutohedral_lattice: the gradient cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("d", [1, 3, 5])
def test_vertex_kernel(d):
    """exp(-r^2 / (2 v)) between all vertices of an image that are near enough, each once."""
    features = randn(2, d, 40, seed=d) * 1.5
    for scale, cutoff, variance in ((1.0, 2.5, 1.0), (1.4, 3.0, 0.8)):
        *_, offset, key = OP(features, scale, -1)
        row, vertex, weight = torch.ops.pyseg.permutohedral_vertex_kernel(key, offset, scale, cutoff, variance, True)
        keys, size = keys_of(key).double(), key.shape[0]
        squares = (keys[:, None] - keys[None]).square().sum(2) / (scale**2 * (d + 1) ** 2 * 2 / 3)
        image = torch.bucketize(torch.arange(size), offset[1:], right=True)
        near = (squares <= cutoff**2) & (image[:, None] == image[None])
        expected = torch.where(near, (-squares / (2 * variance)).exp(), 0)
        places = torch.repeat_interleave(torch.arange(size), row.diff()), vertex.long()
        dense = torch.zeros(size, size, dtype=torch.float64).index_put(places, weight)
        torch.testing.assert_close(dense, expected)
        assert all(len(vertex[row[v] : row[v + 1]].unique()) == row[v + 1] - row[v] for v in range(size))
        single = torch.ops.pyseg.permutohedral_vertex_kernel(key, offset, scale, cutoff, variance, False)[2]
        torch.testing.assert_close(single.double(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_vertices", [-1, 200])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, max_vertices, requires_grad):
    features = randn(2, 3, 7, dtype=torch.float32).to(device).requires_grad_(requires_grad)
    # Its test of gradients adds up all results, in place and the integers first; tests/test_compile.py has our own.
    skipped = {"test_aot_dispatch_dynamic"} if requires_grad else set()
    tests = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"} - skipped
    torch.library.opcheck(OP, (features, 1.0, max_vertices), test_utils=sorted(tests))


def test_opcheck_private(device):
    features = randn(2, 3, 7).to(device)
    torch.library.opcheck(
        torch.ops.pyseg._permutohedral_lattice_backward.default, (rand(2, 7, 4).to(device), features, 1.0)
    )
    if device == "cpu":
        lattice = permutohedral_lattice(features)
        torch.library.opcheck(
            torch.ops.pyseg.permutohedral_vertex_kernel.default, (lattice.key, lattice.offset, 1.0, 2.0, 1.0, True)
        )


def test_pytree():
    lattice = permutohedral_lattice(randn(1, 2, 9))
    leaves, spec = torch.utils._pytree.tree_flatten(lattice)
    assert len(leaves) == 10
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), PermutohedralLattice)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: permutohedral_lattice(f[0, 0]), r"features must be \[N, d, \*S\] or \[P, d\], got \[5\]"),
        (lambda f: permutohedral_lattice(f.long()), "features must be float32, float64, float16 or bfloat16, got"),
        (lambda f: permutohedral_lattice(f.repeat(1, 3, 1)), r"features must be \[N, d, P\] with d from 1 to 8, got"),
        (lambda f: permutohedral_lattice(f[:, :0]), r"features must be \[N, d, P\] with d from 1 to 8, got"),
        (lambda f: permutohedral_lattice(f, "exact"), "accuracy must be fast or high, got exact"),
        (lambda f: permutohedral_lattice(f, max_vertices=-2), "max_vertices must be .* got -2"),
        (lambda f: OP(f, 0.0, -1), "scale must be positive and finite, got 0"),
        (lambda f: OP(f, float("nan"), -1), "scale must be positive and finite, got nan"),
        (
            lambda f: torch.ops.pyseg._permutohedral_lattice_backward(f, f, 1.0),
            r"_permutohedral_lattice_backward: grad_weight must be \[2, 5, 4\], got \[2, 3, 5\]",
        ),
    ],
)
def test_errors(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(randn(2, 3, 5, dtype=torch.float32).to(device))


def test_errors_of_the_vertex_kernel():
    lattice = permutohedral_lattice(randn(2, 3, 5))
    kernel = torch.ops.pyseg.permutohedral_vertex_kernel
    for arguments, message in (
        ((lattice.key.int(), lattice.offset, 1.0, 2.0, 1.0, True), "key must be torch.Short"),
        ((lattice.key, lattice.offset + 1, 1.0, 2.0, 1.0, True), "offset must ascend from 0"),
        ((lattice.key, lattice.offset, 0.5, 2.0, 1.0, True), "scale must be above 1/2"),
        ((lattice.key, lattice.offset, 1.0, 0.0, 1.0, True), "cutoff must be from 0 to 10000"),
        ((lattice.key, lattice.offset, 1.0, 2.0, 0.0, True), "variance must be positive and finite, got 0"),
        ((lattice.key, lattice.offset[-1:], 1.0, 2.0, 1.0, True), "offset must ascend from 0"),
        (
            (lattice.key, lattice.offset, 1e9, 2.0, 1.0, True),
            r"scale \* cutoff \* \(d \+ 1\) must be .* 5016, got 8e",
        ),
        ((lattice.key, lattice.offset, 1.0, 9999.0, 1.0, True), r"scale \* cutoff \* \(d \+ 1\) must be below 5016"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel(*arguments)
