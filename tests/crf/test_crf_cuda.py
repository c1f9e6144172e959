"""What the CUDA kernels of the dense CRF do on the way to their results: bytes moved, branches, lattices that lie.

Counts come from the fake GPU, which knows no cache: a sector that two requests touch counts twice. On a real GPU only
results are compared.
"""

import pytest
import torch
from crf_cases import rand, randn

from cuda_budget import cuda_budget
from pyseg import reference
from pyseg.functional import gaussian_filter, permutohedral_filter, permutohedral_lattice
from pyseg.functional.permutohedral_lattice import LEVELS

pytestmark = pytest.mark.cuda_only

LATTICE = torch.ops.pyseg.permutohedral_lattice.default
KERNEL = torch.ops.pyseg.permutohedral_vertex_kernel.default
MEAN_FIELD = torch.ops.pyseg._mean_field.default
FLOAT, DOUBLE = torch.float32, torch.float64


def assert_near(got, expected, tolerance=1e-5):
    expected = expected.double().cpu()
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=tolerance * scale)


def expected_of(features, values, accuracy="fast"):
    return reference.permutohedral_filter(features, values, **LEVELS[accuracy]._asdict())


# ---- the lattice ----


@pytest.mark.sm(75, 80, 90)
@pytest.mark.block_orders
@pytest.mark.parametrize(
    ("d", "images", "points"),
    [
        (2, 3, 70),  # keys of one word
        (4, 33, 8),  # of two because of the images
        (8, 5, 40),
    ],
)
def test_lattices_of_images_are_those_of_each(device, d, images, points):
    """Vertices of an image follow each other, in the order of their keys. Few enough for one block of CUB's scan."""
    check_images(device, d, images, points)


@pytest.mark.sm(75, 80, 90)
def test_lattice_of_many_entries(device):
    """Sorts and prefix sums of several blocks: CUB's wait for each other, on the fake GPU in the forward order only."""
    check_images(device, 4, 40, 70)


def check_images(device, d, images, points):
    features = randn(images, d, points, seed=d, dtype=FLOAT)
    vertex, weight, row, entry, neighbour, offset, key = (t.cpu() for t in LATTICE(features.to(device), 1.0, -1))
    for n in range(0, images, max(1, images // 3)):
        one = [t.cpu() for t in LATTICE(features[n : n + 1].to(device), 1.0, -1)]
        first, last = offset[n].item(), offset[n + 1].item()
        assert torch.equal(vertex[n] - first, one[0][0])
        assert torch.equal(weight[n], one[1][0])
        assert torch.equal(key[first:last], one[6])
        own = neighbour[:, first:last]
        assert torch.equal(torch.where(own < 0, own, own - first), one[4])
        start = n * vertex[0].numel()
        assert torch.equal(row[first : last + 1] - start, one[2])
        assert torch.equal(entry[start : start + vertex[0].numel()] - start, one[3])
    again = LATTICE(features.to(device), 1.0, -1)
    assert torch.equal(again[4].cpu(), neighbour)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("d", range(1, 9))
def test_lattice_gradient(device, d, dtype):
    features, grad = randn(2, d, 37, seed=d, dtype=dtype), randn(2, 37, d + 1, seed=1, dtype=dtype)
    backward = torch.ops.pyseg._permutohedral_lattice_backward
    with cuda_budget("lattice_backward_kernel<", launches=1, min_bytes=2 * features.nbytes + grad.nbytes):
        got = backward(grad.to(device), features.to(device), 1.2)
    wide = features.double().requires_grad_()
    weight = torch.stack([reference.permutohedral_simplices(f, 1.2)[1] for f in wide])
    assert_near(got, torch.autograd.grad(weight, wide, grad.double())[0], 1e-4 if dtype == FLOAT else 1e-12)


def test_simplices_write_once(device):
    features = randn(1, 5, 2048, dtype=FLOAT)
    entries = 2048 * 6
    written = features.nbytes + entries * (4 + 8 + 8 + 4)  # weight, key, entry
    with cuda_budget("lattice_simplices_kernel<", launches=1, min_bytes=written, bytes_ratio=1.05, bank_conflicts=1.6):
        LATTICE(features.to(device), 1.0, -1)


def test_too_few_vertices(device):
    """Without a synchronisation nobody can raise: points at vertices that are left out are NaN, the count is true."""
    features, values = randn(2, 3, 30, dtype=FLOAT), rand(2, 4, 30, dtype=FLOAT)
    whole = permutohedral_lattice(features.to(device))
    count = whole.offset[-1].item()
    for size in (0, 1, count - 1):
        lattice = permutohedral_lattice(features.to(device), max_vertices=size)
        assert torch.equal(lattice.offset, whole.offset)
        out = whole.vertex >= size
        assert torch.equal(lattice.vertex < 0, out)
        assert torch.equal(lattice.weight.isnan(), out)
        filtered = permutohedral_filter(lattice, values.to(device))
        assert torch.equal(filtered.isnan().all(1), out.any(2))
        assert torch.equal(filtered.isnan().any(1), out.any(2))


def test_nothing_but_points_left_out(device):
    features = torch.full((2, 3, 9), float("nan"))
    lattice = permutohedral_lattice(features.to(device))
    assert lattice.key.shape == (0, 3)
    assert torch.equal(lattice.offset.cpu(), torch.zeros(3, dtype=torch.int64))
    assert permutohedral_filter(lattice, rand(2, 2, 9, dtype=FLOAT).to(device)).isnan().all()
    padded = permutohedral_lattice(features.to(device), max_vertices=5)
    assert (padded.neighbour == -1).all()
    assert (padded.row == 0).all()


# ---- filters ----


@pytest.mark.sm(75, 80, 90)
@pytest.mark.block_orders
@pytest.mark.parametrize("channels", [1, 21, 150])
def test_long_and_short_rows(device, channels):
    """Rows of a vertex within a segment of the splat, over two of them and over many."""
    points = 600
    features = randn(1, 2, points, seed=3, dtype=FLOAT) * 0.05
    features[0, :, ::7] *= 60
    values = rand(1, channels, points, seed=4, dtype=FLOAT)
    lattice = permutohedral_lattice(features.to(device))
    lengths = lattice.row.cpu().diff()
    assert lengths.min() < 10
    assert lengths.max() > 300
    got = permutohedral_filter(lattice, values.to(device))
    assert_near(got, expected_of(features, values))
    assert torch.equal(permutohedral_filter(lattice, values.to(device)), got)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_filter_moves_rows_in_whole_sectors(device, dtype):
    channels, points = 24, 512
    features, values = randn(1, 3, points, dtype=dtype) * 0.5, rand(1, channels, points, seed=1, dtype=dtype)
    lattice = permutohedral_lattice(features.to(device))
    v = values.to(device)
    size = values.element_size()
    rows, table = values.nbytes, lattice.key.shape[0] * channels * size
    entries = lattice.entry.numel()
    items = entries * (4 + size)
    gathered = entries * channels * size
    blurred = 4 * (2 * table + lattice.neighbour.nbytes / 4)
    near = (lattice.neighbour >= 0).sum().item() * channels * size
    name = "float" if dtype == FLOAT else "double"
    with (
        cuda_budget(f"crf_pack_kernel<{name}>", launches=1, min_bytes=2 * rows, bytes_ratio=1.01, bank_conflicts=2),
        cuda_budget(f"lattice_splat_kernel<{name}>", launches=1, min_bytes=gathered + items + table, bytes_ratio=1.6),
        cuda_budget(f"lattice_blur_kernel<{name}>", launches=4, min_bytes=blurred + near, bytes_ratio=1.2),
        cuda_budget(f"lattice_slice_kernel<{name}>", launches=1, min_bytes=gathered + rows, bytes_ratio=1.6),
    ):
        got = permutohedral_filter(lattice, v)
    assert_near(got, expected_of(features, values), 1e-5)


@pytest.mark.block_orders
@pytest.mark.parametrize("channels", [1, 6, 140])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_gradient_of_weights(device, dtype, channels):
    features = randn(2, 3, 45, seed=5, dtype=dtype)
    values, grad = randn(2, channels, 45, seed=6, dtype=dtype), randn(2, channels, 45, seed=7, dtype=dtype)
    gradients = []
    for where in ("cpu", device):
        lattice = permutohedral_lattice(features.to(where))
        weight = lattice.weight.detach().requires_grad_()
        out = permutohedral_filter(lattice._replace(weight=weight), values.to(where))
        gradients.append(torch.autograd.grad(out, weight, grad.to(where))[0])
    assert_near(gradients[1], gradients[0], 1e-5 if dtype == FLOAT else 1e-12)


@pytest.mark.parametrize("name", ["vertex", "row", "entry", "neighbour", "offset", "kernel_row", "kernel_vertex"])
def test_nothing_is_read_outside(device, name):
    """A lattice that holds nonsense gives nonsense: no access out of bounds, which the fake GPU would report."""
    accuracy = "high" if name.startswith("kernel") else "fast"
    lattice = permutohedral_lattice(randn(2, 2, 40, dtype=FLOAT).to(device), accuracy)
    values = rand(2, 3, 40, dtype=FLOAT).to(device)
    for wrong in (2**30, -(2**30)):
        bad = lattice._replace(**{name: torch.full_like(getattr(lattice, name), wrong)})
        bad = bad._replace(weight=bad.weight.detach().requires_grad_())
        out = permutohedral_filter(bad, values)
        assert out.shape == values.shape
        torch.autograd.grad(out.sum(), bad.weight)


@pytest.mark.block_orders
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("d", range(1, 9))
def test_vertex_kernel_of_many_tiles(device, d, dtype):
    """As on the CPU, whose rows are in the order in which it finds their entries; here they ascend."""
    points = 400 if d == 1 else 150 if d < 4 else 40
    features = randn(3, d, points, seed=d, dtype=dtype) * (20 if d == 1 else 3 if d < 4 else 1.5)
    *_, offset, key = LATTICE(features.to(device), 1.4, -1)
    row, vertex, weight = (t.cpu() for t in KERNEL(key, offset, 1.4, 2.5, 0.9, dtype == DOUBLE))
    expected = KERNEL(key.cpu(), offset.cpu(), 1.4, 2.5, 0.9, dtype == DOUBLE)
    assert torch.equal(row, expected[0])
    owner = torch.repeat_interleave(torch.arange(len(row) - 1), row.diff())
    order = (owner * len(row) + expected[1]).argsort()
    assert torch.equal(vertex, expected[1][order])
    torch.testing.assert_close(weight, expected[2][order])


def test_vertex_kernel_of_a_padded_lattice(device):
    features = randn(2, 2, 40, dtype=FLOAT)
    *_, offset, key = LATTICE(features.to(device), 1.4, -1)
    *_, padded_offset, padded_key = LATTICE(features.to(device), 1.4, key.shape[0] + 150)
    expected = KERNEL(key, offset, 1.4, 3.0, 0.9, False)
    got = KERNEL(padded_key, padded_offset, 1.4, 3.0, 0.9, False)
    assert torch.equal(got[0][: key.shape[0] + 1], expected[0])
    assert (got[0][key.shape[0] :] == expected[1].numel()).all()
    assert torch.equal(got[1], expected[1])
    assert KERNEL(key[:0], torch.zeros_like(offset), 1.4, 3.0, 0.9, False)[0].tolist() == [0]


# ---- the separable Gaussian ----


@pytest.mark.sm(75, 80, 90)
@pytest.mark.block_orders
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 20, 24), (1, 2, 19, 7), (1, 1, 300), (3, 2, 9, 1, 5)], ids=str)
def test_gaussian_of_units_and_single_elements(device, shape, dtype):
    values = randn(*shape, dtype=dtype)
    for sigma in ([1.3, 0.4, 2.0], [0.0, 6.0, 0.0]):
        sigma = sigma[-len(shape) + 2 :]
        for normalize in (False, True):
            got = gaussian_filter(values.to(device), sigma, 2.5, normalize)
            assert_near(got, reference.gaussian_filter(values, sigma, 2.5, normalize), 1e-5)


def test_gaussian_reads_a_line_for_eight_results(device):
    values = randn(1, 2, 64, 128, dtype=FLOAT)
    moved = values.nbytes * ((8 + 2 * 3) / 8 * 15 / 16 + 1)  # the halo at the border is none
    with cuda_budget("gaussian_pass_kernel<float, 4, 8>", launches=1, min_bytes=moved, bytes_ratio=1.2):
        gaussian_filter(values.to(device), [1.0, 0.0], 3.0)


# ---- mean field ----


def mean_field(unary, features, accuracy="fast", gaussians=1, matrix=False, iterations=2, **arguments):
    """The operator's arguments, for a kernel on a lattice and `gaussians` separable ones."""
    device, dtype = unary.device, unary.dtype
    n, classes, *sizes = unary.shape
    points = unary[0, 0].numel()
    kernels = gaussians + (features is not None)
    lattices = [] if features is None else list(permutohedral_lattice(features, accuracy)[:9])
    shape = (classes, classes) if matrix else (classes,)
    costs = [(randn(*shape, seed=70 + k, dtype=dtype) / points**0.5).to(device) for k in range(kernels)]
    before = [rand(n if k % 2 else 1, points, seed=80 + k, dtype=dtype).to(device) for k in range(kernels)]
    after = [rand(n, points, seed=90 + k, dtype=dtype).to(device) for k in range(kernels)]
    sigmas = [0.5 + k / 4 for k in range(gaussians) for _ in sizes]
    return (unary, None, iterations, 0.8, lattices, sigmas, 3.0, False, before, after, costs)


def compare(arguments, features, device, tolerance):
    got = MEAN_FIELD(*arguments)
    unary, initial, iterations, temperature, _, sigmas, truncate, _, before, after, costs = arguments
    cpu = [None if t is None else t.cpu() for t in (unary, initial)]
    lists = [[t.cpu() for t in tensors] for tensors in (before, after, costs)]
    lattice = [] if features is None else list(permutohedral_lattice(features.cpu())[:9])
    expected = MEAN_FIELD(*cpu, iterations, temperature, lattice, sigmas, truncate, False, *lists)
    assert_near(got, expected, tolerance)
    assert torch.equal(MEAN_FIELD(*arguments), got)


@pytest.mark.sm(75, 80, 90)
@pytest.mark.block_orders
@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("classes", [1, 5, 21, 100, 140, 270])  # in registers, up to two units a thread, or in memory
def test_mean_field_of_many_classes(device, classes, dtype, matrix):
    sizes = (5, 9) if classes < 100 else (2, 3)
    unary = (randn(2, classes, *sizes, seed=1, dtype=dtype) * 2).to(device)
    features = randn(2, 3, sizes[0] * sizes[1], seed=2, dtype=dtype).to(device)
    compare(mean_field(unary, features, matrix=matrix), features, device, 1e-4 if dtype == FLOAT else 1e-10)


@pytest.mark.parametrize("classes", [3, 270])
def test_mean_field_of_many_kernels(device, classes):
    """More than one launch takes: energies are kept between them."""
    unary = (randn(1, classes, 4, 6, seed=1, dtype=FLOAT) * 2).to(device)
    features = randn(1, 3, 24, seed=2, dtype=FLOAT).to(device)
    with cuda_budget("mean_field_update_kernel<", launches=2 * (1 + 2 * 3)):
        compare(mean_field(unary, features, gaussians=17), features, device, 1e-4)


def test_mean_field_does_not_wait(device):
    """Three launches for a Gaussian kernel of two axes and its update, however many iterations."""
    unary = randn(1, 5, 6, 8, dtype=FLOAT).to(device)
    arguments = mean_field(unary, None, iterations=4)
    with (
        cuda_budget("gaussian_pass_kernel<", launches=8),
        cuda_budget("mean_field_update_kernel<", launches=5),
        cuda_budget("crf_unpack_kernel<", launches=1),
    ):
        MEAN_FIELD(*arguments)


def test_update_reads_rows_once(device):
    """Unaries, the slice's rows and one filtered map in, marginals out."""
    unary = randn(1, 24, 8, 64, dtype=FLOAT).to(device)
    features = (randn(1, 3, 512, seed=2, dtype=FLOAT) * 0.3).to(device)
    arguments = mean_field(unary, features, iterations=1)
    start = 2 * unary.nbytes
    update = unary.nbytes * (1 + 4 + 1 + 1)
    with cuda_budget("mean_field_update_kernel<float, 1>", launches=2, min_bytes=start + update, bytes_ratio=1.6):
        MEAN_FIELD(*arguments)


def test_second_device(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    features, values = randn(1, 2, 20, dtype=FLOAT), rand(1, 3, 20, dtype=FLOAT)
    for accuracy in LEVELS:
        lattice = permutohedral_lattice(features.to("cuda:1"), accuracy)
        got = permutohedral_filter(lattice, values.to("cuda:1"))
        assert got.device == torch.device("cuda:1")
        assert_near(got, expected_of(features, values, accuracy))
    unary = randn(1, 3, 4, 5, dtype=FLOAT).to("cuda:1")
    assert MEAN_FIELD(*mean_field(unary, features.to("cuda:1"))).device == torch.device("cuda:1")
