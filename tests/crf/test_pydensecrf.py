"""pyseg.compat.pydensecrf beside pydensecrf: the same scripts, and what ours takes besides."""

import importlib
import types

import numpy as np
import pytest
import torch
from crf_cases import noisy_unary, photo

from pyseg.compat.pydensecrf import densecrf as our_densecrf
from pyseg.compat.pydensecrf import utils as our_utils

NORMALIZATIONS = ["NO_NORMALIZATION", "NORMALIZE_BEFORE", "NORMALIZE_AFTER", "NORMALIZE_SYMMETRIC"]
W, H, L = 48, 36, 5


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("pydensecrf.densecrf")
    return types.SimpleNamespace(
        dcrf=importlib.import_module("pydensecrf.densecrf"), utils=importlib.import_module("pydensecrf.utils")
    )


OURS = types.SimpleNamespace(dcrf=our_densecrf, utils=our_utils)


def image():
    return np.ascontiguousarray(photo("coffee", W, H)[0].permute(1, 2, 0).numpy())


def probabilities():
    return noisy_unary(L, H, W, smooth=2.0)[0].neg().exp().numpy().astype(np.float32)


def closeness(ours, theirs):
    """Mean difference of marginals, and share of equal labels."""
    ours, theirs = np.array(ours), np.array(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).mean(), (ours.argmax(0) == theirs.argmax(0)).mean()


# ---- scripts, as their users write them ----


def rgb_script(library, normalization="NORMALIZE_SYMMETRIC", compat=(3, 10), niter=5):
    dcrf, utils = library.dcrf, library.utils
    d = dcrf.DenseCRF2D(W, H, L)
    d.setUnaryEnergy(utils.unary_from_softmax(probabilities()))
    kinds = {"kernel": dcrf.DIAG_KERNEL, "normalization": getattr(dcrf, normalization)}
    d.addPairwiseGaussian(sxy=(3, 3), compat=compat[0], **kinds)
    d.addPairwiseBilateral(sxy=(80, 80), srgb=(13, 13, 13), rgbim=image(), compat=compat[1], **kinds)
    return np.array(d.inference(niter))


def features_script(library, normalization="NORMALIZE_SYMMETRIC", compat=(3, 10), niter=5):
    """All kernels by their features, so that both use lattices of the same vertices."""
    dcrf, utils = library.dcrf, library.utils
    d = dcrf.DenseCRF(W * H, L)
    d.setUnaryEnergy(utils.unary_from_softmax(probabilities()))
    kinds = {"normalization": getattr(dcrf, normalization)}
    d.addPairwiseEnergy(utils.create_pairwise_gaussian((3, 3), (H, W)), compat=compat[0], **kinds)
    features = utils.create_pairwise_bilateral((40, 40), (13, 20, 13), image(), chdim=2)
    d.addPairwiseEnergy(features, compat=compat[1], **kinds)
    return np.array(d.inference(niter))


def labels_script(library):
    dcrf, utils = library.dcrf, library.utils
    labels = (probabilities().argmax(0) + 1) * (np.arange(W) % 7 > 0)  # 0: unknown
    d = dcrf.DenseCRF2D(W, H, L)
    d.setUnaryEnergy(utils.unary_from_labels(labels, L, gt_prob=0.7, zero_unsure=True))
    d.addPairwiseGaussian(sxy=2, compat=1)
    d.addPairwiseBilateral(sxy=20, srgb=10, rgbim=image(), compat=4)
    return np.array(d.inference(3))


def grey_script(library):
    """The example for other images than RGB ones."""
    dcrf, utils = library.dcrf, library.utils
    grey = image()[:, :, 0]
    d = dcrf.DenseCRF2D(W, H, L)
    d.setUnaryEnergy(utils.unary_from_softmax(probabilities(), scale=0.9))
    d.addPairwiseEnergy(utils.create_pairwise_gaussian(sdims=(4, 4), shape=(H, W)), compat=2)
    d.addPairwiseEnergy(utils.create_pairwise_bilateral(sdims=(10, 10), schan=(9,), img=grey, chdim=-1), compat=5)
    return np.array(d.inference(4))


def steps_script(library):
    dcrf, utils = library.dcrf, library.utils
    d = dcrf.DenseCRF(W * H, L)
    d.setUnaryEnergy(utils.unary_from_softmax(probabilities()))
    features = utils.create_pairwise_bilateral((40, 40), (13, 13, 13), image(), chdim=2)
    d.addPairwiseEnergy(features, compat=10)
    Q, tmp1, tmp2 = d.startInference()
    divergences = []
    for _ in range(4):
        divergences.append(d.klDivergence(Q))
        d.stepInference(Q, tmp1, tmp2)
    return np.array(Q), divergences


def volume_script(library):
    dcrf, utils = library.dcrf, library.utils
    shape, rng = (5, 8, 7), np.random.default_rng(0)
    d = dcrf.DenseCRF(280, 3)
    softmax = np.ascontiguousarray(rng.dirichlet(np.ones(3), shape).transpose(3, 0, 1, 2), np.float32)
    d.setUnaryEnergy(utils.unary_from_softmax(softmax))
    d.addPairwiseEnergy(utils.create_pairwise_gaussian((2, 2, 2), shape), compat=np.array([-1, -2, -3], np.float32))
    volume = rng.random(shape).astype(np.float32) * 50
    d.addPairwiseEnergy(utils.create_pairwise_bilateral((3, 3, 3), (20,), volume), compat=3, kernel=dcrf.FULL_KERNEL)
    return np.array(d.inference(3))


# ---- beside pydensecrf ----


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_same_lattices(theirs, normalization):
    """Rounding alone is different: the sign and order of everything else must be the same."""
    weights = (0.02, 0.05) if normalization == "NO_NORMALIZATION" else (3, 10)
    rng = np.random.default_rng(1)
    scale = weights[1]
    for compat in (
        weights,
        (-weights[0] * rng.random(L).astype(np.float32), weights[1]),
        (weights[0], scale * rng.standard_normal((L, L)).astype(np.float32)),
    ):
        scripts = [features_script(library, normalization, compat, niter=3) for library in (OURS, theirs)]
        difference, equal = closeness(*scripts)
        assert difference < 2e-4
        assert equal > 0.995


@pytest.mark.parametrize("script", [labels_script, grey_script, volume_script, steps_script], ids=lambda s: s.__name__)
def test_scripts(theirs, script):
    ours, other = script(OURS), script(theirs)
    if script is steps_script:
        np.testing.assert_allclose(ours[1], other[1], rtol=1e-3)
        ours, other = ours[0], other[0]
    difference, equal = closeness(ours, other)
    assert difference < 1e-2
    assert equal > 0.98


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_rgb(theirs, normalization):
    weights = (0.02, 0.05) if normalization == "NO_NORMALIZATION" else (3, 10)
    scripts = [rgb_script(library, normalization, weights, niter=1) for library in (OURS, theirs)]
    difference, equal = closeness(*scripts)
    assert difference < 2e-3
    assert equal > 0.98


def test_utils(theirs):
    rng = np.random.default_rng(0)
    softmax = rng.dirichlet(np.ones(4), (6, 7)).transpose(2, 0, 1)
    softmax[0, 0, 0] = 0
    labels = rng.integers(0, 5, (6, 7))
    picture = rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)
    volume = rng.random((2, 5, 6, 7)).astype(np.float32)
    calls = [
        ("unary_from_softmax", (softmax,), {}),
        ("unary_from_softmax", (softmax, 0.7), {"clip": 1e-3}),
        ("unary_from_softmax", (softmax + 0.1,), {"clip": None}),
        ("unary_from_labels", (labels, 4, 0.8), {}),
        ("unary_from_labels", (labels, 5, 0.8), {"zero_unsure": False}),
        ("compute_unary", (labels, 4), {}),
        ("softmax_to_unary", (softmax + 0.1, 0.9), {}),
        ("create_pairwise_gaussian", ((2, 3), (6, 7)), {}),
        ("create_pairwise_gaussian", ((2, 3, 4), (5, 6, 7)), {}),
        ("create_pairwise_bilateral", ((2, 3), (5, 6, 7), picture), {"chdim": 2}),
        ("create_pairwise_bilateral", ((2, 3), 5, picture[:, :, 0]), {}),
        ("create_pairwise_bilateral", ((2, 3, 4), (5, 6), volume), {"chdim": 0}),
    ]
    for name, arguments, keywords in calls:
        ours = getattr(our_utils, name)(*arguments, **keywords)
        expected = getattr(theirs.utils, name)(*arguments, **keywords)
        assert ours.dtype == expected.dtype == np.float32, name
        assert ours.flags.c_contiguous
        np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=name)


def test_constants(theirs):
    for name in (*NORMALIZATIONS, "CONST_KERNEL", "DIAG_KERNEL", "FULL_KERNEL"):
        assert int(getattr(our_densecrf, name)) == int(getattr(theirs.dcrf, name))
    names = {name for name in dir(theirs.dcrf) if not name.startswith("_")} - {"Number", "Unary", "eigen"}
    assert names <= set(dir(our_densecrf))
    for kind in ("DenseCRF", "DenseCRF2D"):
        methods = {name for name in dir(getattr(theirs.dcrf, kind)) if not name.startswith("_")}
        assert methods <= set(dir(getattr(our_densecrf, kind)))


def test_logistic_unary(theirs):
    rng = np.random.default_rng(0)
    weights, features = rng.random((3, 2)).astype(np.float32), rng.random((2, 20)).astype(np.float32)
    results = []
    for library in (OURS, theirs):
        d = library.dcrf.DenseCRF(20, 3)
        d.setUnaryEnergy(weights, features) if library is OURS else d.setUnary(
            library.dcrf.LogisticUnary(weights, features)
        )
        results.append(np.array(d.inference(0)))
    np.testing.assert_allclose(*results, rtol=1e-5)
    d = our_densecrf.DenseCRF(20, 3)
    d.setUnary(our_densecrf.ConstUnary(weights @ features))
    np.testing.assert_allclose(d.inference(0), results[0], rtol=1e-6)


# ---- what ours does beyond ----


def test_steps_are_inference():
    d = our_densecrf.DenseCRF2D(W, H, L)
    d.setUnaryEnergy(our_utils.unary_from_softmax(probabilities()))
    d.addPairwiseGaussian(3, 3)
    d.addPairwiseBilateral(80, 13, image(), 10)
    Q, tmp1, tmp2 = d.startInference()
    for _ in range(3):
        d.stepInference(Q, tmp1, tmp2)
    np.testing.assert_allclose(Q, d.inference(3), atol=1e-5)
    assert np.array_equal(d.map(3), d.inference(3).argmax(0))


def test_what_pydensecrf_is_pedantic_about():
    """Types, strides, shapes, read-only arrays, tensors."""
    expected = rgb_script(OURS)
    energy = our_utils.unary_from_softmax(probabilities())
    frozen = image()
    frozen.flags.writeable = False
    for unary, rgb in (
        (energy.astype(np.float64), frozen),
        (np.asfortranarray(energy), image()[::-1].copy()[::-1]),
        (energy.reshape(L, H, W), image().astype(np.float64)),
        (torch.from_numpy(energy), torch.from_numpy(image())),
        (energy.tolist(), image().tolist()),
    ):
        d = our_densecrf.DenseCRF2D(W, H, L)
        d.addPairwiseGaussian(sxy=3, compat=np.float64(3))
        d.addPairwiseBilateral(80, 13, rgb, np.array(10))
        d.setUnaryEnergy(unary)  # in any order
        np.testing.assert_allclose(d.inference(5), expected, atol=1e-5)


def test_accuracy_is_an_option():
    results = {}
    for accuracy in ("fast", "high", "exact"):
        d = our_densecrf.DenseCRF2D(W, H, L, accuracy=accuracy)
        d.setUnaryEnergy(our_utils.unary_from_softmax(probabilities()))
        d.addPairwiseGaussian(3, 3)
        d.addPairwiseBilateral(80, 13, image(), 10)
        results[accuracy] = d.inference(2)
        assert np.isfinite(d.klDivergence(results[accuracy]))
    errors = {name: closeness(results[name], results["exact"])[0] for name in ("fast", "high")}
    assert errors["high"] < errors["fast"]


def test_divergence_with_infinite_energies():
    """Of labels that are excluded: 0 times infinity is no energy."""
    energy = our_utils.unary_from_softmax(probabilities())
    energy[2, :50] = np.inf
    d = our_densecrf.DenseCRF2D(W, H, L)
    d.setUnaryEnergy(energy)
    d.addPairwiseGaussian(3, 3)
    Q = d.inference(3)
    assert (Q[2, :50] == 0).all()
    assert np.isfinite(d.klDivergence(Q))
    expected = d.klDivergence(Q)
    energy[2, :50] = 7.0
    d.setUnaryEnergy(energy)
    np.testing.assert_allclose(expected, d.klDivergence(Q))


def test_errors():
    d = our_densecrf.DenseCRF2D(W, H, L)
    with pytest.raises(ValueError, match=r"Bad shape for unary energy \(Need \(5, 1728\), got \(5, 7\)\)"):
        d.setUnaryEnergy(np.zeros((L, 7)))
    with pytest.raises(ValueError, match="Bad shape for pairwise energy"):
        d.addPairwiseEnergy(np.zeros((2, 7)), 3)
    with pytest.raises(ValueError, match="Bad shape for pairwise bilateral"):
        d.addPairwiseBilateral(80, 13, np.zeros((W, H, 3)), 10)
    with pytest.raises(ValueError, match="only works for RGB images"):
        d.addPairwiseBilateral(80, 13, np.zeros((H, W, 4)), 10)
    with pytest.raises(ValueError, match="standard deviations must be one or 2 positive numbers, got -1"):
        d.addPairwiseGaussian(-1, 3)
    with pytest.raises(ValueError, match="LabelCompatibility of dimension >2"):
        d.addPairwiseGaussian(3, np.zeros((5, 5, 5)))
    with pytest.raises(ValueError, match=r"Bad shape for compatibility \(Need \(5, 5\), got \(5, 4\)\)"):
        d.addPairwiseGaussian(3, np.zeros((5, 4)))
    with pytest.raises(ValueError, match="7 is not a valid NormalizationType"):
        d.addPairwiseGaussian(3, 3, normalization=7)
    with pytest.raises(AssertionError, match="gt_prob must be in"):
        our_utils.unary_from_labels(np.zeros((3, 3), int), 2, 1.0)
    with pytest.raises(AssertionError, match="`scale` needs to be in"):
        our_utils.unary_from_softmax(np.ones((2, 3)), scale=1.5)
    with pytest.raises(ValueError, match="sdims must have an element for each of the 2 axes"):
        our_utils.create_pairwise_gaussian((1,), (3, 4))
