"""How near each level is to brute force on a photograph, beside pydensecrf: benchmarks/dense_crf_accuracy.py."""

import importlib
import sys
from pathlib import Path

import pytest

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
