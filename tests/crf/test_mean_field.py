"""_mean_field, the fused iterations, against the same ones written with the filters."""

import pytest
import torch
from crf_cases import on_each_number_of_threads, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from pyseg.functional import gaussian_filter, permutohedral_filter, permutohedral_lattice

OP = torch.ops.pyseg._mean_field.default
TRUNCATE = 3.0


def softmax_of(energy, temperature):
    return (-energy / temperature).softmax(1)


def iterated(unary, initial, iterations, temperature, lattices, sigmas, scale_in, scale_out, compatibility):
    """The definition, with lattices as `PermutohedralLattice`s and sigmas by kernel."""
    shape = unary.shape

    def scaled(values, scale):
        return values if scale.numel() == 0 else values * scale.reshape(scale.shape[0], 1, *shape[2:])

    filters = [lambda v, lattice=lattice: permutohedral_filter(lattice, v) for lattice in lattices]
    filters += [lambda v, sigma=sigma: gaussian_filter(v, sigma, TRUNCATE, False) for sigma in sigmas]
    q = softmax_of(unary, temperature) if initial is None else initial
    for _ in range(iterations):
        energy = unary
        for filtered, before, after, costs in zip(filters, scale_in, scale_out, compatibility, strict=True):
            message = scaled(filtered(scaled(q, before)), after).flatten(2)
            term = costs[:, None] * message if costs.dim() == 1 else costs @ message
            energy = energy + term.reshape(shape)
        q = softmax_of(energy, temperature)
    return q


def run(unary, initial, iterations, temperature, lattices, sigmas, scale_in, scale_out, compatibility, coarse=False):
    return OP(
        unary,
        initial,
        iterations,
        temperature,
        [tensor for lattice in lattices for tensor in lattice[:9]],
        [float(s) for sigma in sigmas for s in sigma],
        TRUNCATE,
        coarse,
        scale_in,
        scale_out,
        compatibility,
    )


def problem(device, dtype, images, classes, shape, lattices=("fast",), gaussians=1, seed=0, d=3, matrix=False):
    """Arguments of `run`, with every kind of scale and compatibility among the kernels."""
    points = torch.Size(shape).numel()
    kernels = len(lattices) + gaussians
    features = [randn(images, d, points, seed=seed + k, dtype=dtype).to(device) for k in range(len(lattices))]

    def scale(k):
        kind = k % 3
        return rand([images, 1, 0][kind], points, seed=seed + k, dtype=dtype).to(device) if kind < 2 else torch.zeros(
            0, dtype=dtype, device=device
        )  # fmt: skip

    def costs(k):
        sizes = (classes, classes) if matrix and k % 2 == 0 else (classes,)
        return (randn(*sizes, seed=seed + 20 + k, dtype=dtype) / points**0.5).to(device)

    return {
        "unary": (randn(images, classes, *shape, seed=seed + 50, dtype=dtype) * 2).to(device),
        "initial": None,
        "iterations": 3,
        "temperature": 1.0,
        "lattices": [permutohedral_lattice(f, a) for f, a in zip(features, lattices, strict=True)],
        "sigmas": [[1.0 + k / 2 + axis / 4 for axis in range(len(shape))] for k in range(gaussians)],
        "scale_in": [scale(k) for k in range(kernels)],
        "scale_out": [scale(k + 1) for k in range(kernels)],
        "compatibility": [costs(k) for k in range(kernels)],
    }


def check(arguments, tolerance):
    torch.testing.assert_close(run(**arguments), iterated(**arguments), rtol=0, atol=tolerance)


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        ("fast", (5, 7), ("fast",), 1),
        ("high", (5, 7), ("high",), 1),
        ("both", (4, 9), ("fast", "high", "fast"), 2),
        ("lattice alone", (3, 5), ("fast",), 0),
        ("gaussian alone", (9, 14), (), 1),
        ("nothing", (3, 5), (), 0),
        ("line", (23,), ("fast",), 1),
        ("volume", (3, 4, 5), ("fast",), 1),
        ("one plane", (1, 6, 7), ("fast",), 2),
        ("one pixel", (1, 1, 1), (), 1),
    ],
    ids=lambda case: case[0],
)
def test_definition(device, case, dtype, matrix):
    _, shape, lattices, gaussians = case
    arguments = problem(device, dtype, 2, 4, shape, lattices, gaussians, matrix=matrix)
    check(arguments, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 8, 16, 21, 33, 150])
def test_classes(device, classes):
    """Every width of rows has its own loops."""
    for matrix in (False, True):
        arguments = problem(device, torch.float32, 1, classes, (5, 6), matrix=matrix)
        check({**arguments, "iterations": 2}, 1e-5)


@settings(max_examples=30)
@given(
    images=st.integers(1, 3),
    classes=st.integers(2, 24),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    lattices=st.lists(st.sampled_from(["fast", "high"]), max_size=2),
    gaussians=st.integers(0, 2),
    matrix=st.booleans(),
    iterations=st.integers(0, 3),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    start=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_hypothesis(images, classes, shape, lattices, gaussians, matrix, iterations, temperature, start, seed):
    arguments = problem("cpu", torch.float64, images, classes, shape, lattices, gaussians, seed, matrix=matrix)
    arguments |= {"iterations": iterations, "temperature": temperature}
    if start:
        arguments["initial"] = rand(*arguments["unary"].shape, seed=seed)
    check(arguments, 1e-11)


def test_temperature_and_start(device):
    arguments = problem(device, torch.float64, 2, 3, (4, 5))
    for temperature in (0.3, 2.0):
        for initial in (None, rand(2, 3, 4, 5).to(device)):
            for iterations in (0, 1, 4):
                changed = {"temperature": temperature, "initial": initial, "iterations": iterations}
                check({**arguments, **changed}, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_types(device, dtype):
    """Computed in float32, rounded once."""
    arguments = problem(device, torch.float32, 2, 3, (4, 5))
    narrow = {**arguments, "unary": arguments["unary"].to(dtype)}
    got = run(**narrow)
    assert got.dtype == dtype
    assert torch.equal(got, run(**{**narrow, "unary": narrow["unary"].float()}).to(dtype))
    narrow["initial"] = rand(2, 3, 4, 5).to(device, dtype)
    assert run(**narrow).dtype == dtype


def test_layouts(device):
    arguments = problem(device, torch.float32, 2, 3, (4, 5))
    expected = run(**arguments)
    unary = arguments["unary"]
    for strided in (
        unary.contiguous(memory_format=torch.channels_last),
        unary.transpose(2, 3).contiguous().transpose(2, 3),
        unary.repeat_interleave(2, 3)[..., ::2],
    ):
        assert torch.equal(run(**{**arguments, "unary": strided}), expected)


def test_no_images(device):
    arguments = problem(device, torch.float32, 0, 3, (4, 5))
    assert run(**arguments).shape == (0, 3, 4, 5)


def test_energies_out_of_the_ordinary(device):
    """Large ones do not overflow, infinite ones exclude a label."""
    arguments = problem(device, torch.float32, 1, 3, (4, 5))
    arguments["unary"] *= 1e4
    arguments["unary"][0, 1, 2] = float("inf")
    got = run(**arguments)
    assert got.isfinite().all()
    assert (got[0, 1, 2] == 0).all()
    torch.testing.assert_close(got.sum(1), torch.ones_like(got[:, 0]))


def test_nan(device):
    arguments = problem(device, torch.float32, 1, 3, (4, 5))
    arguments["unary"][0, 1, 2, 3] = float("nan")
    if device == "cpu":
        with pytest.raises(RuntimeError, match="unary must not be NaN"):
            run(**arguments)
    else:  # no synchronisation to look for it
        assert run(**arguments).isnan().any()


def test_same_bits_for_every_number_of_threads():
    for images, classes, shape, lattices in (
        (1, 21, (40, 60), ("fast",)),
        (3, 4, (20, 30), ("fast", "high")),
        (1, 2, (90, 120), ("fast",)),
    ):
        arguments = problem("cpu", torch.float32, images, classes, shape, lattices, matrix=classes == 4)
        on_each_number_of_threads(lambda arguments=arguments: [run(**arguments)])


def coarse_matrix(size, sigma):
    """What stands for the Gaussian along an axis: tents onto nodes two pixels apart, taps between these, and back."""
    nodes = size // 2 + size % 2 + 2
    at = torch.arange(size, dtype=torch.float64)[None] - (2 * torch.arange(nodes, dtype=torch.float64)[:, None] - 1.5)
    tents = (1 - at.abs() / 2).clamp_min(0)
    variance = (sigma**2 - 1.5) / 4
    radius = int(TRUNCATE * variance**0.5 + 0.5) + 1
    steps = torch.arange(nodes, dtype=torch.float64)
    steps = (steps[:, None] - steps[None]).abs()
    taps = torch.where(steps <= radius, (-steps.square() / (2 * variance)).exp(), 0)
    own = torch.arange(-radius, radius + 1, dtype=torch.float64)
    exact = torch.arange(-int(TRUNCATE * sigma + 0.5), int(TRUNCATE * sigma + 0.5) + 1, dtype=torch.float64)
    total = (-exact.square() / (2 * sigma**2)).exp().sum() / 2 / (-own.square() / (2 * variance)).exp().sum()
    return tents.T @ (taps * total) @ tents


@pytest.mark.parametrize(
    ("classes", "shape", "sigma"),
    [
        (2, (35, 50), (3.0, 4.0)),
        (21, (64, 101), (3.0, 3.0)),
        (40, (32, 33), (3.5, 6.0)),
        (3, (4, 33, 100), (1.0, 3.0, 3.5)),
        (5, (9, 40, 32), (0.0, 3.0, 3.0)),
    ],
)
def test_coarse_grid(classes, shape, sigma):
    """On the CPU wide Gaussian kernels are filtered on every second pixel: the definition, and how near it is."""
    unary = randn(2, classes, *shape, dtype=torch.float64, seed=3)
    scale = rand(1, torch.Size(shape).numel(), dtype=torch.float64) / 20 + 0.05
    costs = randn(classes, classes, dtype=torch.float64, seed=4)
    got, exact = (run(unary, None, 2, 1.2, [], [sigma], [scale], [scale], [costs], coarse) for coarse in (True, False))
    matrices = [coarse_matrix(size, s) for size, s in zip(shape[-2:], sigma[-2:], strict=True)]
    if len(shape) == 3:
        along = torch.eye(shape[0], dtype=torch.float64).reshape(1, shape[0], 1, 1, shape[0])
        depth = gaussian_filter(along, (0, 0, sigma[0]), TRUNCATE, False) if sigma[0] else along
        matrices = [depth.reshape(shape[0], shape[0]), *matrices]
    q, weights = softmax_of(unary, 1.2), scale.reshape(1, 1, *shape)
    for _ in range(2):
        message = q * weights
        for axis, matrix in enumerate(matrices):
            message = (message.movedim(2 + axis, -1) @ matrix).movedim(-1, 2 + axis)
        q = softmax_of(unary + (costs @ (message * weights).flatten(2)).reshape(unary.shape), 1.2)
    torch.testing.assert_close(got, q, rtol=0, atol=1e-11)
    assert (got - exact).abs().mean() < 1e-2 * (exact - softmax_of(unary, 1.2)).abs().mean()


def test_no_coarse_grid_for_narrow_kernels():
    unary, scale = randn(1, 3, 40, 50), torch.zeros(0, dtype=torch.float64)
    for sigma in ((2.9, 3.0), (3.0, 2.9)):
        arguments = (unary, None, 2, 1.0, [], [sigma], [scale], [scale], [rand(3)])
        assert torch.equal(run(*arguments, coarse=True), run(*arguments))


def softmax_op(unary, temperature=1.3):
    return OP(unary, None, 0, temperature, [], [], TRUNCATE, False, [], [], [])


def test_softmax(device):
    """Without iterations it is one, which has gradients of first and second order; with some it has none."""
    unary = randn(2, 3, 4, 5).to(device).requires_grad_()
    assert torch.autograd.gradcheck(softmax_op, unary, fast_mode=True)
    assert torch.autograd.gradgradcheck(softmax_op, unary, fast_mode=True)
    torch.library.opcheck(OP, (unary, None, 0, 1.3, [], [], TRUNCATE, False, [], [], []))
    arguments = problem(device, torch.float64, 2, 3, (4, 5))
    with pytest.raises(RuntimeError, match="_mean_field: iterations have no gradient"):
        run(**{**arguments, "unary": unary}).sum().backward()


def test_opcheck(device):
    arguments = problem(device, torch.float32, 2, 3, (4, 5), ("fast", "fast"), 1, matrix=True)
    lattices = [tensor for lattice in arguments["lattices"] for tensor in lattice[:9]]
    scales = arguments["scale_in"], arguments["scale_out"], arguments["compatibility"]
    torch.library.opcheck(OP, (arguments["unary"], None, 2, 1.0, lattices, [1.0, 2.0], TRUNCATE, True, *scales))
    initial = rand(2, 3, 4, 5, dtype=torch.float32).to(device)
    torch.library.opcheck(OP, (arguments["unary"], initial, 2, 1.0, lattices, [1.0, 2.0], TRUNCATE, True, *scales))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unary": lambda u: u[0]}, r"sigmas must be 1 for each kernel|vertex must be|unary must be"),
        ({"unary": lambda u: u[0, 0]}, r"unary must be \[N, C, \*S\] with S of 1 to 3 axes, got \[4, 5\]"),
        ({"unary": lambda u: u.long()}, "unary must be float32, float64, float16 or bfloat16, got"),
        ({"unary": lambda u: u[..., :4]}, r"vertex must be \[2, 16, d \+ 1\] for unary"),
        ({"unary": lambda u: u.double()}, "weight must be torch.Double, got torch.Float"),
        ({"initial": lambda i: torch.zeros(2, 3, 4, 4)}, r"initial must be \[2, 3, 4, 5\], got \[2, 3, 4, 4\]"),
        ({"iterations": lambda i: -1}, "iterations must not be negative, got -1"),
        ({"temperature": lambda t: 0.0}, "temperature must be from 1e-30 to 1e30, got 0"),
        ({"temperature": lambda t: float("nan")}, "temperature must be from 1e-30 to 1e30, got nan"),
        ({"sigmas": lambda s: [[1.0]]}, "sigmas must be 2 for each kernel, got 1"),
        ({"sigmas": lambda s: [[1.0, -1.0]]}, "sigma must be finite and not negative, got -1"),
        ({"scale_in": lambda s: s[:1]}, "scale_in, scale_out and compatibility must have an element for each of 2"),
        ({"scale_out": lambda s: [s[0][:, :3], s[1]]}, "scale must be"),
        ({"compatibility": lambda c: [c[0][:2], c[1]]}, r"compatibility must be \[3\], got \[2\]"),
        ({"compatibility": lambda c: [c[0].double(), c[1]]}, "compatibility must be torch.Float, got torch.Double"),
        ({"lattices": lambda x: [x[0]._replace(offset=x[0].offset[:2])]}, r"offset must be \[3\], got \[2\]"),
    ],
)
def test_errors(device, change, message):
    arguments = problem(device, torch.float32, 2, 3, (4, 5))
    for name, to in change.items():
        value = to(arguments[name])
        arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(RuntimeError, match=f"_mean_field: .*({message})"):
        run(**arguments)
