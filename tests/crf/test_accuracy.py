"""How near each level is to brute force on a photograph, beside pydensecrf: benchmarks/dense_crf_accuracy.py."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from crf_cases import PHOTOS, noisy_unary, photo

from pyseg import reference
from pyseg.functional import GaussianKernel, bilateral_features, dense_crf

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def figures():
    sys.path.insert(0, FOLDER)
    try:
        module = importlib.import_module("dense_crf_accuracy")
    finally:
        sys.path.remove(FOLDER)
    return module.figures(("coffee",))["coffee"]


def test_levels(figures):
    """The bilateral filter, marginals and labels: at most what the levels promise."""
    fast, high = figures["pyseg fast"], figures["pyseg high"]
    assert fast["filter"] < 2.5e-3
    assert high["filter"] < 1e-3
    for iterations in (1, 5, 10):
        assert high["marginals"][iterations] < 0.55 * fast["marginals"][iterations]
    assert fast["marginals"][1] < 8e-4
    assert high["labels"][5] > 0.985


def test_beside_pydensecrf(figures):
    """fast is as near (the same lattice, an exact smoothness kernel), high has at most half its errors."""
    pytest.importorskip("pydensecrf.densecrf")
    fast, high, peer = figures["pyseg fast"], figures["pyseg high"], figures["pydensecrf2"]
    assert fast["marginals"][1] < peer["marginals"][1]
    for iterations in (1, 5, 10):
        # After some iterations single pixels flip in either.
        assert fast["marginals"][iterations] < 1.1 * peer["marginals"][iterations]
        assert high["marginals"][iterations] < 0.5 * peer["marginals"][iterations]
        assert fast["labels"][iterations] > peer["labels"][iterations] - 0.005


@pytest.mark.parametrize("name", PHOTOS)
def test_coarse_grid_of_the_smoothness_kernel(name):
    """It moves marginals by a tenth of what the lattice errs by, or less: in the mean, and at the most."""
    image, unary = photo(name), noisy_unary(21, 48, 64)
    matrices = [
        reference.pairwise_matrix(bilateral_features(image.double()).flatten(2)),
        reference.pairwise_matrix(bilateral_features(image[:, :0].double(), 3.0).flatten(2)),
    ]
    costs = [-w * torch.eye(21, dtype=torch.float64) for w in (10.0, 3.0)]
    expected = reference.dense_crf(unary.flatten(2), matrices, costs, iterations=5).reshape(unary.shape)
    unary = unary.float()
    coarse = dense_crf(unary, image)
    fine = dense_crf(unary, image, smoothness=None, kernels=[GaussianKernel(3.0, 3.0, accuracy="high")])
    assert not torch.equal(coarse, fine)
    moved, error = (coarse - fine).abs(), (fine - expected).abs()
    assert moved.mean() < error.mean() / 10
    assert moved.max() < error.max() / 10
    assert moved.max() < 1e-2
    alone = dense_crf(unary), dense_crf(unary, smoothness=None, kernels=[GaussianKernel(3.0, 3.0, accuracy="high")])
    assert torch.equal(*alone)  # without a lattice nothing is as inexact as the grid
