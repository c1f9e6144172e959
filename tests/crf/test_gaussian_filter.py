"""gaussian_filter against its definition and scipy, on both devices."""

import numpy as np
import pytest
import torch
from crf_cases import on_each_number_of_threads, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pyseg import reference
from pyseg.functional import gaussian_filter

OP = torch.ops.pyseg.gaussian_filter.default

CASES = {  # shape, sigma, truncate
    "line": ((2, 3, 41), (2.0,), 3.0),
    "image": ((2, 3, 17, 23), (1.5, 3.0), 3.0),
    "wide": ((1, 2, 70, 90), (3.0, 3.0), 4.0),
    "volume": ((1, 2, 9, 7, 11), (1.0, 0.0, 2.0), 3.0),
    "one axis": ((1, 2, 9, 12), (0.0, 2.0), 3.0),
    "other axis": ((1, 2, 9, 12), (2.0, 0.0), 3.0),
    "none": ((1, 2, 9, 12), (0.0, 0.0), 3.0),
    "beyond the map": ((1, 1, 5, 3), (20.0, 30.0), 3.0),
    "one tap": ((1, 1, 5, 8), (0.1, 0.1), 3.0),
    "one pixel": ((2, 2, 1, 1), (1.0, 2.0), 3.0),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_definition(device, case, normalize):
    shape, sigma, truncate = CASES[case]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        values = randn(*shape, dtype=dtype)
        got = gaussian_filter(values.to(device), sigma, truncate, normalize)
        assert got.dtype == dtype
        expected = reference.gaussian_filter(values, sigma, truncate, normalize)
        scale = expected.abs().max().item()
        torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=tolerance * max(scale, 1))


@settings(max_examples=30)
@given(
    axes=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.3, 1.0, 2.7, 9.0])), min_size=1, max_size=3),
    maps=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    truncate=st.sampled_from([0.5, 3.0, 4.2]),
    normalize=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_hypothesis(axes, maps, truncate, normalize, seed):
    sizes, sigma = zip(*axes, strict=True)
    values = randn(*maps, *sizes, seed=seed)
    got = gaussian_filter(values, sigma, truncate, normalize)
    torch.testing.assert_close(got, reference.gaussian_filter(values, sigma, truncate, normalize))


def test_scipy(device):
    values = randn(2, 2, 30, 41)
    for sigma in (0.7, 3.0):
        expected = [
            ndimage.gaussian_filter(m, sigma, mode="constant", truncate=3.0) for m in values.flatten(0, 1).numpy()
        ]
        got = gaussian_filter(values.to(device), sigma).cpu().flatten(0, 1)
        torch.testing.assert_close(got, torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_types(device, dtype):
    values = rand(2, 3, 11, 9).to(device, dtype)
    got = gaussian_filter(values, 1.5)
    assert got.dtype == dtype
    assert torch.equal(got, gaussian_filter(values.float(), 1.5).to(dtype))


def test_layouts(device):
    values = randn(2, 3, 11, 9, dtype=torch.float32).to(device)
    expected = gaussian_filter(values, 1.5)
    for strided in (
        values.contiguous(memory_format=torch.channels_last),
        values.transpose(2, 3).contiguous().transpose(2, 3),
        values.repeat_interleave(2, 3)[..., ::2],
    ):
        assert torch.equal(gaussian_filter(strided, 1.5), expected)


def test_nothing(device):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        assert gaussian_filter(torch.zeros(shape, device=device), 2.0).shape == shape


def test_values_that_are_not_finite(device):
    """NaN reaches as far as the taps do, and infinity stays infinity."""
    values = rand(1, 1, 9, 30, dtype=torch.float32)
    values[0, 0, 4, 5], values[0, 0, 4, 25] = float("nan"), float("inf")
    got = gaussian_filter(values.to(device), 1.0).cpu()[0, 0]
    assert got[4, 5].isnan()
    assert got[4, 25] == float("inf")
    assert got[0, 15].isfinite()
    assert got[:, 9:22].isfinite().all()


def test_same_bits_for_every_number_of_threads():
    for shape, sigma in (((1, 21, 60, 70), 3.0), ((1, 1, 300, 400), (3.0, 7.0)), ((2, 2, 20, 30, 40), 1.5)):
        values = randn(*shape, dtype=torch.float32)
        on_each_number_of_threads(lambda values=values, sigma=sigma: [gaussian_filter(values, sigma)])


@pytest.mark.parametrize("shape", [(2, 2, 7), (1, 2, 4, 5), (1, 1, 3, 2, 4)], ids=str)
def test_gradients(device, shape):
    """Of every order: it is linear and its own transpose."""
    values, fast = randn(*shape).to(device).requires_grad_(), device == "cuda"
    for normalize in (True, False):
        assert torch.autograd.gradcheck(lambda v, n=normalize: gaussian_filter(v, 1.2, 3.0, n), values, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda v: gaussian_filter(v, 1.2).square(), values, fast_mode=fast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck(device, dtype):
    values = randn(2, 3, 5, 6, dtype=dtype).to(device).requires_grad_()
    torch.library.opcheck(OP, (values, [1.5, 0.0], 3.0, True))


def test_vmap(device):
    values = randn(4, 2, 3, 5, 6).to(device)
    expected = torch.stack([gaussian_filter(v, 1.5) for v in values])
    torch.testing.assert_close(torch.vmap(lambda v: gaussian_filter(v, 1.5))(values), expected)
    got = torch.vmap(lambda v: gaussian_filter(v, 1.5), in_dims=2)(values.movedim(0, 2))
    torch.testing.assert_close(got, expected)


def test_autocast(device):
    """Changes nothing."""
    values = randn(1, 2, 5, 6, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16):
        assert gaussian_filter(values, 1.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gaussian_filter(x[0, 0], (1.0, 1.0)), r"values must be \[N, C, \*S\] with S of 1 to 3 axes, got"),
        (lambda x: gaussian_filter(x, (1.0,)), "sigma must have an element for each of the 2 axes of values, got"),
        (lambda x: gaussian_filter(x, -1.0), "sigma must be finite and not negative, got -1"),
        (lambda x: gaussian_filter(x, float("nan")), "sigma must be finite and not negative, got nan"),
        (lambda x: gaussian_filter(x, (1.0, float("inf"))), "sigma must be finite and not negative, got inf"),
        (lambda x: gaussian_filter(x, 1.0, 0.0), "truncate must be positive and finite, got 0"),
        (lambda x: gaussian_filter(x, 1e6), "truncate . sigma must be below"),
        (lambda x: gaussian_filter(x.long(), 1.0), "values must be float32, float64, float16 or bfloat16, got"),
    ],
)
def test_errors(device, call, message):
    with pytest.raises(RuntimeError, match=f"gaussian_filter: {message}"):
        call(torch.ones(1, 2, 4, 5, device=device))
