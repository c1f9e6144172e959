"""distance_transform and distance_to_two_nearest_objects against brute force and scipy, on both devices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cpu_targets import OTHER_TARGETS, run_on_cpu_target
from cuda_budget import cuda_budget
from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import distance_to_two_nearest_objects, distance_transform

FLOAT, DOUBLE = torch.float32, torch.float64
UNIT2, UNIT3 = (1.0, 1.0), (1.0, 1.0, 1.0)
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
REALS = [torch.float16, torch.bfloat16, FLOAT, DOUBLE]
MODES = {
    "mask": {},
    "signed": {"signed": True},
    "labels": {"labels": True},
    "objects": {"labels": True, "zero_background": True},
}


def assert_near(actual, expected, spacing=UNIT2):
    """Within rounding: one of the result for spacing 1, else also those of the arithmetic."""
    exact = all(s == 1 for s in spacing)
    rtol = {(FLOAT, True): 6e-8, (FLOAT, False): 5e-7, (DOUBLE, True): 2e-16, (DOUBLE, False): 1e-15}
    torch.testing.assert_close(actual.cpu().double(), expected.double(), rtol=rtol[actual.dtype, exact], atol=0)


def random_map(*shape, foreground=0.5, values=2, seed=0):
    """0 with probability 1 - foreground, else one of 1..values - 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, values, shape, generator=generator)
    return labels * (torch.rand(shape, generator=generator) < foreground)


def blocks_map(*shape, size=20, values=4, seed=0):
    """Blocks of one label: long distances."""
    coarse = random_map(*[(n + size - 1) // size for n in shape], foreground=0.8, values=values, seed=seed)
    for axis in range(len(shape)):
        coarse = coarse.repeat_interleave(size, axis)
    return coarse[tuple(slice(n) for n in shape)].contiguous()


def blob_mask(*shape, sigma=6, seed=0):
    noise = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(ndimage.gaussian_filter(noise, sigma) > 0)


def scipy_distances(mask, spacing=UNIT2):
    """scipy's transform of every map; infinity where a map has no background, for which scipy defines nothing."""
    maps = mask.reshape(-1, *mask.shape[mask.dim() - len(spacing) :]).numpy() != 0
    results = [
        np.full(m.shape, np.inf) if m.all() else ndimage.distance_transform_edt(m, sampling=spacing) for m in maps
    ]
    return torch.from_numpy(np.stack(results)).reshape(mask.shape)


def check_indices(input, distances, indices, spacing, mode="mask"):
    """Whether each index is a source of its element and attains the distance."""
    dims = len(spacing)
    axes = input.shape[input.dim() - dims :]
    maps, indices = input.cpu().reshape(-1, *axes), indices.cpu().reshape(-1, dims, *axes)
    if mode == "signed":
        maps = maps != 0
    grid = torch.stack(torch.meshgrid(*[torch.arange(n) for n in axes], indexing="ij"))
    for values, d, index in zip(maps, distances.cpu().double().reshape(-1, *axes), indices, strict=True):
        finite = d.isfinite()
        assert (index[:, ~finite] == -1).all()
        own, source = values[finite], values[tuple(index[:, finite])]
        is_own = (own == 0) if mode == "objects" else torch.zeros_like(own, dtype=torch.bool)
        assert (source == 0).all() if mode == "mask" else ((source != own) | is_own).all()
        steps = (grid - index).double() * torch.tensor(spacing, dtype=DOUBLE).reshape(-1, *[1] * dims)
        attained = steps.square().sum(0).sqrt()
        torch.testing.assert_close(attained[finite], d.abs()[finite], rtol=1e-6, atol=0)


# ---- against brute force ----


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("spacing", [UNIT2, (2.0, 0.5), UNIT3, (3.0, 1.0, 0.7)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_brute_force(device, mode, spacing, dtype):
    shapes = [(1, 1), (2, 7, 9), (2, 1, 33), (1, 34, 3)] if len(spacing) == 2 else [(1, 1, 1), (2, 4, 5, 6), (3, 1, 9)]
    for shape in shapes:
        for foreground in (0.0, 0.5, 0.95, 1.0):
            input = random_map(*shape, foreground=foreground, values=3 if mode in ("labels", "objects") else 2)
            got, indices = distance_transform(
                input.to(device), spacing, dtype=dtype, return_indices=True, **MODES[mode]
            )
            assert_near(got, reference.distance_transform(input, spacing, **MODES[mode]), spacing)
            check_indices(input, got, indices, spacing, mode)
            squared = distance_transform(input.to(device), spacing, dtype=dtype, squared=True, **MODES[mode])
            assert_near(squared, reference.distance_transform(input, spacing, squared=True, **MODES[mode]), spacing)
            assert torch.equal(got, distance_transform(input.to(device), spacing, dtype=dtype, **MODES[mode]))


@pytest.mark.parametrize("dtype", INTEGERS + REALS, ids=str)
def test_input_dtypes(device, dtype):
    """Whatever is not zero is foreground, NaN too; minus zero is zero."""
    mask = random_map(2, 9, 37, foreground=0.7).bool()
    input = mask.to(dtype)
    if dtype.is_floating_point:
        input = torch.where(mask, torch.tensor([float("nan"), float("-inf"), 1e-7])[torch.arange(37) % 3], -0.0)
        input = input.to(dtype)
    for options in ({}, {"signed": True}):
        got = distance_transform(input.to(device), **options)
        assert_near(got, reference.distance_transform(mask, **options))
    half = distance_transform(input.to(device), 0.5)
    assert_near(half, reference.distance_transform(mask, (0.5, 0.5)))  # exact, in float32 arithmetic
    if dtype in INTEGERS:
        assert_near(distance_transform(input.to(device), labels=True), reference.distance_transform(mask, labels=True))
        assert_near(
            distance_transform(input.to(device), 2.0, labels=True, dtype=DOUBLE),
            reference.distance_transform(mask, (2.0, 2.0), labels=True),
        )


@st.composite
def drawn(draw):
    dims = draw(st.sampled_from([2, 3]))
    most = 40 if dims == 2 else 9
    shape = [draw(st.integers(1, most)) for _ in range(dims)]
    batch = [draw(st.integers(0, 2)) for _ in range(draw(st.integers(0, 2)))]
    spacing = (1.0,) * dims
    if draw(st.booleans()):
        spacing = tuple(draw(st.sampled_from([0.25, 0.7, 1.0, 1.5, 3.0])) for _ in range(dims))
    foreground = draw(st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]))
    input = random_map(*batch, *shape, foreground=foreground, values=4, seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):
        input = input.transpose(-1, -2)
        spacing = (*spacing[:-2], spacing[-1], spacing[-2])
    return input, spacing, draw(st.sampled_from([*MODES])), draw(st.sampled_from([FLOAT, DOUBLE]))


def test_drawn_cases(device):
    @drawn_settings(80, 12, device)
    @given(drawn())
    def run(case):
        input, spacing, mode, dtype = case
        on_device = input.to(device)
        got, indices = distance_transform(on_device, spacing, dtype=dtype, return_indices=True, **MODES[mode])
        assert_near(got, reference.distance_transform(input, spacing, **MODES[mode]), spacing)
        if input.numel() == 0:
            return
        check_indices(input, got, indices, spacing, mode)
        if mode == "mask":
            assert_near(got, scipy_distances(input, spacing), spacing)
        pair = distance_to_two_nearest_objects(on_device, spacing, dtype=dtype)
        for a, b in zip(pair, reference.distance_to_two_nearest_objects(input, spacing), strict=True):
            assert_near(a, b, spacing)

    run()


# ---- against scipy, on maps that are too large for brute force ----


def one_zero(*shape, at=None):
    mask = torch.ones(shape, dtype=torch.bool)
    mask[tuple(at or [n // 3 for n in shape])] = False
    return mask


def disc(n):
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return (y - n // 2) ** 2 + (x - n // 2) ** 2 < (n // 2 - 2) ** 2


def stripes(h, w, period, axis):
    mask = torch.ones(h, w, dtype=torch.bool)
    mask.movedim(axis, 0)[::period] = False
    return mask


LARGE = {
    "blobs": blob_mask(3, 200, 190),
    "volume": blob_mask(40, 50, 70, sigma=4),
    "deep volume": one_zero(150, 20, 30),
    "wide volume": ~torch.eye(190, dtype=torch.bool).repeat(3, 1, 1),
    "noise": random_map(200, 300),
    "sparse": random_map(250, 310, foreground=0.9995),
    "one": one_zero(300, 257),
    "corner": one_zero(280, 190, at=(0, 0)),
    "disc": disc(300),
    "rows": stripes(150, 200, 149, 0),
    "columns": stripes(200, 150, 149, 1),
    "diagonal": ~torch.eye(260, dtype=torch.bool),
    "thin": one_zero(2000, 3),
    "flat": one_zero(3, 2000),
    "blocks": blocks_map(320, 300, size=150, values=2) != 0,
}


@pytest.mark.parametrize("name", LARGE)
def test_scipy(name):
    mask = LARGE[name]
    for spacing in ((1.0,) * 3, (2.0, 1.0, 0.5)) if "volume" in name else (UNIT2, (0.5, 1.5)):
        expected, outside = scipy_distances(mask, spacing), scipy_distances(mask == 0, spacing)
        for dtype in (FLOAT, DOUBLE):
            got, indices = distance_transform(mask, spacing, dtype=dtype, return_indices=True)
            assert_near(got, expected, spacing)
            check_indices(mask, got, indices, spacing)
            assert_near(distance_transform(mask, spacing, dtype=dtype), expected, spacing)
            signed = distance_transform(mask, spacing, dtype=dtype, signed=True)
            assert_near(signed, torch.where(mask != 0, expected, -outside), spacing)
            labels, indices = distance_transform(
                mask.to(torch.uint8), spacing, labels=True, dtype=dtype, return_indices=True
            )
            assert_near(labels, signed.abs().cpu(), spacing)
            check_indices(mask, labels, indices, spacing, "labels")


@pytest.mark.parametrize("size", [7, 40, 150])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_labels(size, dtype):
    """Every label's own transform, all in one pass; labels that differ in their high bits only are different."""
    labels = blocks_map(2, 180, 210, size=size)
    expected = torch.zeros(labels.shape, dtype=DOUBLE)
    for label in labels.unique():
        expected += torch.where(labels == label, scipy_distances(labels == label), 0)
    values = labels.to(dtype) if dtype == torch.uint8 else labels << 40
    assert_near(distance_transform(values, labels=True), expected)
    expected[labels == 0] = 0
    assert_near(distance_transform(values, labels=True, zero_background=True), expected)


def test_volume_labels(device):
    labels = blocks_map(12, 10, 14, size=5)
    got, indices = distance_transform(labels.to(device), dims=3, labels=True, return_indices=True)
    assert_near(got, reference.distance_transform(labels, UNIT3, labels=True))
    check_indices(labels, got, indices, UNIT3, "labels")


@pytest.mark.parametrize("arithmetic", ["int32", "float", "double"])
@pytest.mark.parametrize("lines", ["wide tiles", "narrow tiles", "too long"])
def test_line_lengths(device, lines, arithmetic):
    """Lines that fit shared memory many at a time, a few at a time, and not at all."""
    rows = {"wide tiles": 30, "narrow tiles": 800, "too long": 8000}[lines]
    mask = stripes(rows, 2, 29, 0)
    mask[:, 1] = stripes(rows, 1, 17, 0)[:, 0]
    spacing = (1.0, 1.0) if arithmetic == "int32" else (0.5, 1.0)
    dtype = DOUBLE if arithmetic == "double" else FLOAT
    input = mask.to(device)
    assert_near(distance_transform(input, spacing, dtype=dtype), scipy_distances(mask, spacing), spacing)
    if arithmetic == "int32":
        inside, outside = scipy_distances(mask), scipy_distances(~mask)
        assert_near(distance_transform(input, signed=True), torch.where(mask, inside, -outside))


def test_long_rows(device):
    """Rows of more elements than a warp looks at together."""
    mask = torch.ones(2, 9000, dtype=torch.bool)
    mask[0, [40, 8500]] = False
    assert_near(distance_transform(mask.to(device)), scipy_distances(mask))
    labels = (torch.arange(9000) // 4100).expand(2, -1)
    expected = reference_along_row(labels)
    assert_near(distance_transform(labels.to(device), labels=True), expected)


def reference_along_row(labels):
    distances = [scipy_distances(labels == label) for label in labels.unique()]
    return torch.stack([torch.where(labels == i, d, 0) for i, d in enumerate(distances)]).sum(0)


@pytest.mark.parametrize("shape", [(2, 70_000), (30_000, 2)], ids=str)
def test_very_long_lines(shape):
    """Squared distances beyond int32, positions beyond 16 bits: exact in float64."""
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, 0] = False
    got, indices = distance_transform(mask, squared=True, dtype=DOUBLE, return_indices=True)
    steps = torch.meshgrid(*[torch.arange(n, dtype=DOUBLE) for n in shape], indexing="ij")
    assert torch.equal(got, steps[0].square() + steps[1].square())
    assert not indices.any()
    assert torch.equal(distance_transform(mask, squared=True), got.float())


# ---- two nearest objects ----


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("spacing", [UNIT2, (2.0, 0.5), UNIT3, (3.0, 1.0, 0.7)], ids=str)
def test_two_nearest(device, spacing, dtype):
    for objects, foreground in ((1, 0.0), (1, 0.05), (2, 0.1), (5, 0.05), (40, 0.4)):
        shape = (2, 13, 18) if len(spacing) == 2 else (2, 4, 6, 7)
        labels = random_map(*shape, foreground=foreground, values=objects + 1, seed=objects)
        got = distance_to_two_nearest_objects(labels.to(device), spacing, dtype=dtype)
        expected = reference.distance_to_two_nearest_objects(labels, spacing)
        squares = distance_to_two_nearest_objects(labels.to(device), spacing, dtype=dtype, squared=True)
        for d, square, e in zip(got, squares, expected, strict=True):
            assert_near(d, e, spacing)
            torch.testing.assert_close(square.sqrt(), d, rtol=1e-6, atol=0)


def test_two_nearest_of_cells():
    """As U-Net's weights are computed with scipy: one transform for each object."""
    labels = torch.from_numpy(ndimage.label(blob_mask(150, 170, sigma=5, seed=3).numpy())[0])
    distances = torch.stack([scipy_distances(labels != label) for label in labels.unique() if label])
    first, second = distances.sort(0).values[:2]
    for dtype in (torch.int32, torch.int64, torch.uint8):
        got = distance_to_two_nearest_objects(labels.to(dtype))
        assert_near(got[0], first)
        assert_near(got[1], second)


# ---- the contract ----


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 0, 4), (3, 0, 0)], ids=str)
def test_nothing_to_compute(device, shape):
    input = torch.zeros(shape, dtype=torch.int64, device=device)
    distances, indices = distance_transform(input, return_indices=True)
    assert distances.shape == input.shape
    assert indices.shape == (*input.shape[:-2], 2, *input.shape[-2:])
    assert all(d.shape == input.shape for d in distance_to_two_nearest_objects(input))


def test_no_sources(device):
    """Infinity in a map without background, minus infinity in one without foreground; each map of a batch by itself."""
    input = torch.stack([torch.ones(5, 40), torch.zeros(5, 40), torch.ones(5, 40)])
    input[2, 0, 0] = 0
    plain, signed = distance_transform(input.to(device)).cpu(), distance_transform(input.to(device), signed=True).cpu()
    assert plain[0].isposinf().all()
    assert (plain[1] == 0).all()
    assert signed[0].isposinf().all()
    assert signed[1].isneginf().all()
    assert plain[2].isfinite().all()
    assert distance_transform(input.int().to(device), labels=True)[:2].isposinf().all()
    assert distance_transform(input.to(device), squared=True)[0].isposinf().all()


def test_layouts(device):
    """Strides of any kind, and batch dimensions of any number."""
    mask = random_map(2, 3, 11, 13, foreground=0.8)
    expected = scipy_distances(mask)
    for input in (
        mask.to(device).contiguous(memory_format=torch.channels_last),
        mask.to(device).transpose(2, 3).contiguous().transpose(2, 3),
        mask.to(device).repeat_interleave(2, 3)[..., ::2],
        mask.to(device)[:, :, None].expand(-1, -1, 4, -1, -1)[:, :, 2],
    ):
        assert_near(distance_transform(input), expected)
    assert_near(distance_transform(mask.to(device)[0, 0]), expected[0, 0])
    offset = torch.cat([torch.ones(1, dtype=mask.dtype), mask.flatten()]).to(device)[1:].view(mask.shape)
    assert_near(distance_transform(offset), expected)


def test_same_bits_for_every_number_of_threads():
    threads, results = torch.get_num_threads(), []
    labels = blocks_map(3, 130, 150, size=70)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = []
            for input, spacing in ((labels, UNIT2), (labels[:1], UNIT2), (labels[:1], (0.3, 1.7)), (labels, UNIT3)):
                for mode in MODES:
                    result += distance_transform(input, spacing, return_indices=True, **MODES[mode])
                    result.append(distance_transform(input, spacing, **MODES[mode]))
                result += distance_to_two_nearest_objects(input, spacing)
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_cpu_targets(target):
    """The same maps on every other instruction set that the machine has."""
    maps = "blobs or volume or sparse or disc or thin or blocks"
    tests = f"(test_scipy and ({maps})) or test_labels or test_very_long_lines or test_two_nearest or test_input_dtypes"
    selected = f"({tests}) and not cuda"
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", selected, __file__]
    run_on_cpu_target(target, f"import pytest, sys\nsys.exit(pytest.main({arguments}))", Path(__file__).parent)


ARGUMENTS = {
    "mask": (torch.bool, ([1.0, 1.0], "mask", False, False, False)),
    "indices": (torch.int32, ([2.0, 1.0], "labels", True, True, True)),
    "volume": (FLOAT, ([1.0, 1.0, 1.0], "signed", False, True, False)),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_opcheck(device, case):
    dtype, arguments = ARGUMENTS[case]
    input = random_map(2, 3, 5, 7).to(device, dtype)
    torch.library.opcheck(torch.ops.pyseg.distance_transform.default, (input, *arguments))


def test_opcheck_two_nearest(device):
    labels = random_map(2, 5, 7, values=4).to(device)
    torch.library.opcheck(torch.ops.pyseg.distance_to_two_nearest_objects.default, (labels, [1.0, 2.0], False, False))


def test_vmap():
    masks = random_map(4, 3, 6, 7)
    assert torch.equal(torch.vmap(distance_transform, in_dims=1)(masks), distance_transform(masks).movedim(1, 0))
    d, index = torch.vmap(lambda m: distance_transform(m, return_indices=True))(masks)
    assert torch.equal(d, distance_transform(masks))
    assert index.shape == (4, 3, 2, 6, 7)
    pairs = torch.vmap(distance_to_two_nearest_objects)(masks)
    assert all(torch.equal(a, b) for a, b in zip(pairs, distance_to_two_nearest_objects(masks), strict=True))


def test_no_gradient(device):
    input = torch.rand(4, 5, device=device, requires_grad=True)
    assert not distance_transform(input).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: distance_transform(x, (1, 0)), r"spacing must be positive and finite, got \[1, 0\]"),
        (lambda x: distance_transform(x, (1, -2)), "spacing must be positive and finite"),
        (lambda x: distance_transform(x, (1, float("nan"))), "spacing must be positive and finite"),
        (lambda x: distance_transform(x, (1, 1e25)), "spacing must give squared distances in the range of float32"),
        (lambda x: distance_transform(x, 1e-25), "spacing must give squared distances in the range of float32"),
        (lambda x: distance_transform(x, 1e200, dtype=torch.float64), "in the range of float64"),
        (lambda x: distance_to_two_nearest_objects(x, 1e39), "in the range of float32"),
        (lambda x: torch.vmap(lambda row: distance_transform(row, dims=2))(x), r"input must be \[\*, H, W\] for 2"),
        (lambda x: distance_transform(x, float("inf")), "spacing must be positive and finite"),
        (lambda x: distance_transform(x, (1.0,)), r"spacing must have an element for each of 2 or 3 axes, got \[1\]"),
        (lambda x: distance_transform(x, (1.0, 1.0), dims=3), r"spacing must have dims = 3 elements"),
        (lambda x: distance_transform(x, dims=4), "dims must be 2 or 3, got 4"),
        (lambda x: distance_transform(x, dims=3), r"input must be \[\*, D, H, W\] for 3 axes, got \[4, 5\]"),
        (lambda x: distance_transform(x[0]), r"input must be \[\*, H, W\] for 2 axes, got \[5\]"),
        (lambda x: distance_transform(x.float(), labels=True), "input must be integers as labels, got torch.Float"),
        (lambda x: distance_transform(x.cfloat()), "input must be bool, integers or real numbers, got"),
        (lambda x: distance_transform(x, dtype=torch.float16), "dtype must be torch.float32 or torch.float64, got"),
        (lambda x: distance_transform(x, labels=True, signed=True), "signed must be False with labels=True"),
        (lambda x: distance_transform(x, zero_background=True), "zero_background must be False without labels=True"),
        (
            lambda x: torch.ops.pyseg.distance_transform(x, [1.0, 1.0], "edge", False, False, False),
            "mode must be mask, signed, labels or objects, got edge",
        ),
        (lambda x: distance_to_two_nearest_objects(x.float()), "labels must be integers as labels, got torch.Float"),
        (lambda x: distance_to_two_nearest_objects(x[0]), r"labels must be \[\*, H, W\] for 2 axes, got \[5\]"),
    ],
)
def test_errors(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(4, 5, dtype=torch.int64, device=device))


# ---- what the CUDA kernels do ----


@pytest.mark.cuda_only
@pytest.mark.sm(75, 80, 90)
@pytest.mark.block_orders
def test_cuda_reads_and_writes_about_once(device):
    mask = random_map(2, 64, 96, foreground=0.6).bool()
    elements = mask.numel()
    with (
        cuda_budget("distance_rows<", launches=1, min_bytes=5 * elements, bytes_ratio=1.1, bank_conflicts=1.01),
        cuda_budget("distance_along_axis<", launches=1, min_bytes=8 * elements, bytes_ratio=1.1, bank_conflicts=1.01),
    ):
        got = distance_transform(mask.to(device))
    assert_near(got, scipy_distances(mask))


@pytest.mark.cuda_only
@pytest.mark.sm(75, 80, 90)
@pytest.mark.block_orders
@pytest.mark.parametrize("dims", [2, 3])
def test_cuda_block_orders(device, dims):
    labels = blocks_map(9, 20, 37, size=6)
    got, indices = distance_transform(labels.to(device), dims=dims, labels=True, return_indices=True)
    assert_near(got, reference.distance_transform(labels, (1.0,) * dims, labels=True))
    check_indices(labels, got, indices, (1.0,) * dims, "labels")
    pair = distance_to_two_nearest_objects(labels.to(device), dims=dims)
    for a, b in zip(pair, reference.distance_to_two_nearest_objects(labels, (1.0,) * dims), strict=True):
        assert_near(a, b)
