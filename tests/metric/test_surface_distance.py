"""Surface distances against brute force over all pairs of surface elements, and against MONAI."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import average_surface_distance, hausdorff_distance, surface_dice
from pyseg.functional.surface_distance import surface

SPACINGS = {2: [(1.0, 1.0), (0.7, 2.5)], 3: [(1.0, 1.0, 1.0), (3.0, 0.8, 1.3)]}


def blobs(*shape, seed=0, share=0.5):
    """Smooth random masks, some of which touch the edge of the map."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    smooth = ndimage.gaussian_filter(noise, 1.5)
    return torch.from_numpy(smooth > sorted(smooth.ravel())[int((1 - share) * (smooth.size - 1))])


def pair(dims, seed=0):
    shape = (13, 17) if dims == 2 else (6, 8, 7)
    return blobs(*shape, seed=seed, share=0.4), blobs(*shape, seed=seed + 100, share=0.3)


def close(got, expected):
    torch.testing.assert_close(got.cpu().item(), expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def check(prediction, target, spacing, device):
    a, b = prediction.to(device), target.to(device)
    for percentile in (None, 95, 50.0, 0, 100):
        for directed in (False, True):
            options = {"percentile": percentile, "directed": directed}
            expected = reference.hausdorff_distance(prediction, target, spacing, **options)
            close(hausdorff_distance(a, b, spacing, **options), expected)
    for symmetric in (True, False):
        expected = reference.average_surface_distance(prediction, target, spacing, symmetric=symmetric)
        close(average_surface_distance(a, b, spacing, symmetric=symmetric), expected)
    for tolerance in (0, 1, 2**0.5, 2.5):
        expected = reference.surface_dice(prediction, target, tolerance, spacing)
        close(surface_dice(a, b, tolerance, spacing), expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("anisotropic", [0, 1])
def test_brute_force(dims, anisotropic):
    for seed in range(4):
        check(*pair(dims, seed), SPACINGS[dims][anisotropic], "cpu")


@st.composite
def drawn(draw):
    dims = draw(st.sampled_from([2, 3]))
    shape = tuple(draw(st.integers(1, 7)) for _ in range(dims))
    shares = st.sampled_from([0.0, 0.02, 0.3, 0.7, 1.0])
    masks = [
        torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < draw(shares)
        for _ in range(2)
    ]
    return (*masks, tuple(draw(st.sampled_from([0.25, 1.0, 1.5, 4.0])) for _ in range(dims)))


@drawn_settings(60)
@given(drawn())
def test_drawn_cases(case):
    check(*case, "cpu")


@pytest.mark.parametrize("dims", [2, 3])
def test_surface(dims):
    """What a binary erosion takes away, outside being background."""
    for seed in range(5):
        mask = pair(dims, seed)[0]
        eroded = torch.from_numpy(ndimage.binary_erosion(mask.numpy()))
        assert torch.equal(surface(mask, dims=dims), mask & ~eroded)
        assert torch.equal(surface(mask.int() * 3, dims=dims), mask & ~eroded)
    batch = torch.stack([pair(dims, seed)[0] for seed in range(3)])
    assert torch.equal(surface(batch, dims=dims)[1], surface(batch[1], dims=dims))


@pytest.mark.parametrize("dims", [2, 3])
def test_batches(device, dims):
    """Any number of batch dimensions, a map with two empty masks and with one among them."""
    pairs = [pair(dims, seed) for seed in range(4)]
    first, second = (torch.stack(masks) for masks in zip(*pairs, strict=True))
    first[1], second[1], second[2] = False, False, False
    first, second = (x.unflatten(0, (2, 2)) for x in (first, second))
    spacing = SPACINGS[dims][1]
    results = {
        "max": (hausdorff_distance, {}),
        "hd95": (hausdorff_distance, {"percentile": 95}),
        "average": (average_surface_distance, {}),
        "dice": (surface_dice, {"tolerance": 2.0}),
    }
    for name, (function, options) in results.items():
        got = function(first.to(device), second.to(device), spacing=spacing, **options).cpu()
        assert got.shape == (2, 2)
        assert got.dtype == torch.float64
        for i in range(4):
            a, b = first.flatten(0, 1)[i], second.flatten(0, 1)[i]
            want = getattr(reference, function.__name__)(a, b, spacing=spacing, **options)
            close(got.flatten()[i], want)
        assert got[0, 1].isnan()
        assert got[1, 0].item() == (0 if name == "dice" else math.inf)


def test_no_masks_at_all():
    empty = torch.zeros(0, 3, 8, 8, dtype=torch.bool)
    for result in (
        hausdorff_distance(empty, empty),
        hausdorff_distance(empty, empty, percentile=95),
        average_surface_distance(empty, empty),
        surface_dice(empty, empty, 1),
    ):
        assert result.shape == (0, 3)


def test_percentile_of_infinities():
    """One empty mask in the batch: infinite, never NaN."""
    a = torch.zeros(2, 6, 6)
    a[:, 1:4, 2:5] = 1
    b = a.clone()
    b[0] = 0
    assert hausdorff_distance(a, b, percentile=95).tolist() == [math.inf, 0]
    assert hausdorff_distance(b, a, percentile=95, directed=True).tolist() == [math.inf, 0]


def test_known_distances():
    """Two squares, shifted by 3 columns of 2 mm."""
    a, b = torch.zeros(12, 16), torch.zeros(12, 16)
    a[3:8, 2:7] = 1
    b[3:8, 5:10] = 1
    assert hausdorff_distance(a, b, spacing=(1.0, 2.0)) == 6
    assert hausdorff_distance(a, b, 2.0) == 6
    assert surface_dice(a, a, 0) == 1
    assert average_surface_distance(a, a) == 0


# ---- MONAI ----


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spacing", [None, "anisotropic"])
def test_monai(dims, spacing):
    metrics = pytest.importorskip("monai.metrics")
    spacing = SPACINGS[dims][1] if spacing else None
    pairs = [pair(dims, seed) for seed in range(6)]
    first, second = (torch.stack(masks).unflatten(0, (3, 2)) for masks in zip(*pairs, strict=True))
    second[1, 1] = False  # one of two masks is empty
    options = {"y_pred": first, "y": second, "include_background": True, "spacing": spacing}
    ours = {"prediction": first, "target": second, "spacing": spacing, "dims": dims}
    close_to = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of the empty mask
        for percentile in (None, 95, 50):
            for directed in (False, True):
                more = {"percentile": percentile, "directed": directed}
                expected = metrics.compute_hausdorff_distance(**options, **more)
                got = hausdorff_distance(**ours, **more)
                assert got[1, 1] == math.inf
                expected[1, 1] = math.inf  # MONAI interpolates between infinities, which is NaN
                torch.testing.assert_close(got, expected, **close_to)
        for symmetric in (False, True):
            expected = metrics.compute_average_surface_distance(**options, symmetric=symmetric)
            torch.testing.assert_close(average_surface_distance(**ours, symmetric=symmetric), expected, **close_to)
        for tolerance in (0.0, 1.0, 2.5):
            expected = metrics.compute_surface_dice(**options, class_thresholds=[tolerance] * 2)
            torch.testing.assert_close(surface_dice(**ours, tolerance=tolerance), expected, **close_to)


# ---- errors, registration ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(4, 6)}, r"prediction must be \[4, 6\] like target, got \[4, 5\]"),
        ({"percentile": 101}, r"percentile must be in \[0, 100\], got 101"),
        ({"dims": 3}, r"target must be \[\*, D, H, W\] for 3 axes, got \[4, 5\]"),
        ({"dims": 4}, "spacing must have an element for each of 2 or 3 axes"),
        ({"spacing": (1.0, 2.0), "dims": 3}, r"spacing must have dims = 3 elements, got \[1.0, 2.0\]"),
    ],
    ids=str,
)
def test_errors(change, message):
    arguments = {"prediction": torch.zeros(4, 5), "target": torch.zeros(4, 5), **change}
    with pytest.raises(RuntimeError, match=f"^hausdorff_distance: {message}"):
        hausdorff_distance(**arguments)


def test_tolerance_error():
    with pytest.raises(RuntimeError, match="^surface_dice: tolerance must be >= 0, got -1"):
        surface_dice(torch.zeros(4, 5), torch.zeros(4, 5), -1)


def test_compiled():
    """What does not list the surface's elements is one graph for all sizes."""
    torch._dynamo.reset()

    def scores(a, b):
        return hausdorff_distance(a, b), average_surface_distance(a, b, (1.0, 2.0)), surface_dice(a, b, 1.5)

    fast = torch.compile(scores, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 9, 11), (3, 12, 8)):
        a, b = blobs(*size, seed=1), blobs(*size, seed=2)
        torch.testing.assert_close(fast(a, b), scores(a, b))
