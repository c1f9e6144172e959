"""pyseg.accelerate on whole detectors of torchvision, and how their outputs are compared."""

import importlib
from pathlib import Path

import pytest
import torch

import pyseg
from pyseg._accelerate.measure import difference, tensors_in


@pytest.fixture
def whole(monkeypatch):
    """benchmarks/cases/detectors.py, which has them at the size of photographs."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module("cases.detectors")


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_whole_detector(whole, name):
    """With its convolutions, too, which round in another way: detections agree one by one, and are as many."""
    size, count = (256, 320), 20
    model, image = whole.detector(name, *size, box_detections_per_img=count), whole.image(*size)
    with torch.inference_mode():
        (expected,) = model([image])
        pyseg.accelerate(model)
        (got,) = model([image])
    pools = [row for row in pyseg.report(model).rows if row.original == "MultiScaleRoIAlign"]
    assert pools
    assert all(row.became == "multiscale_roi_align" for row in pools)
    assert got.keys() == expected.keys()
    assert len(got["boxes"]) == count
    for key, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            got[key], value, rtol=0, atol=1e-4 * scale, msg=lambda text, key=key: f"{key}: {text}"
        )


# ---- comparing detections ----


def detections():
    generator = torch.Generator().manual_seed(0)
    boxes, masks = 100 * torch.rand(6, 4, generator=generator), torch.rand(6, 1, 8, 9, generator=generator)
    scores = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.3, 0.2])
    return {"boxes": boxes, "labels": torch.tensor([1, 2, 1, 1, 3, 2]), "scores": scores, "masks": masks}


def far(one, other):
    return difference(list(tensors_in([one])), list(tensors_in([other])))[0]


def test_order_of_detections_with_equal_scores():
    """Rounding decides it, so another order is no difference; another detection is one."""
    expected = detections()
    for order in ([0, 2, 3, 1, 4, 5], [0, 3, 2, 1, 4, 5]):
        got = {name: value[order] for name, value in detections().items()}
        got["scores"] = got["scores"] + torch.linspace(1e-7, 0, 6)
        assert far(expected, got) < 1e-6
        got["masks"][2] = 0
        assert far(expected, got) > 0.1
    got = detections()
    got["labels"][1] = 1
    assert far(expected, got) > 0.1
    twice = {name: value[[0, 1, 2, 2, 4, 5]] for name, value in detections().items()}
    assert far(expected, twice) > 0.1
    assert far(expected, {name: value[:5] for name, value in detections().items()}) == float("inf")
    none = {name: value[:0] for name, value in detections().items()}
    assert far(none, none) == 0
