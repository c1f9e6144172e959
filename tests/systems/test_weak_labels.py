"""DeepLab-EM: training steps, masks of boxes, and the example as a user runs it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyseg import reference
from pyseg.models import EMAdapt, EMFixed, box_crf_labels, box_labels, em_step, image_labels
from warm_python import run_example

EXAMPLES = Path(__file__).parents[2] / "examples"


def batch():
    torch.manual_seed(0)
    images = torch.randn(3, 2, 9, 8)
    present = torch.tensor([[True, True, False, False], [True, False, True, True], [True, True, False, True]])
    return nn.Conv2d(2, 4, 3, padding=1), images, present


@pytest.mark.parametrize("method", [EMFixed(), EMFixed(0.5, 1.0, exclude_absent=True), EMAdapt(), None], ids=str)
def test_em_step(method):
    """The loss is the cross-entropy to the reference's labels, which are a constant."""
    model, images, present = batch()
    step = em_step(model, images, present, method=method)
    arguments = (method or EMAdapt())._asdict()
    targets, _ = reference.expectation_labels(model(images).detach(), present, **arguments)
    assert torch.equal(step.targets, targets)
    expected = F.cross_entropy(model(images), targets)
    torch.testing.assert_close(step.loss, expected)
    (step.loss - expected).backward()
    assert all(p.grad.abs().max() < 1e-6 for p in model.parameters())
    assert set(targets[0].unique().tolist()) <= {0, 1} or method == EMFixed()


def test_strong_and_weak_images():
    """Masks where they are given, estimates elsewhere, nothing learnt of pixels that are not valid."""
    model, images, present = batch()
    masks = torch.randint(0, 4, (3, 9, 8), dtype=torch.uint8)
    masks[1, 0] = 255
    strong = torch.tensor([False, True, False])
    valid = torch.ones(3, 9, 8, dtype=torch.bool)
    valid[:, :, 6:] = False
    mixed = em_step(model, images, present, masks=masks, strong=strong, valid=valid, ignore_index=255)
    weak = em_step(model, images, present, valid=valid, ignore_index=255)
    assert torch.equal(mixed.targets[::2], weak.targets[::2])
    assert torch.equal(mixed.targets[1][:, :6], masks[1][:, :6].long())
    assert (mixed.targets[:, :, 6:] == 255).all()
    torch.testing.assert_close(mixed.loss, F.cross_entropy(model(images), mixed.targets, ignore_index=255))
    full = em_step(lambda x: {"out": model(x)}, images, present, masks=masks, ignore_index=255)
    assert torch.equal(full.targets, masks.long())
    assert torch.equal(image_labels(masks, 4)[0], torch.tensor([bool((masks[0] == c).any()) for c in range(4)]))


def test_em_step_errors():
    model, images, present = batch()
    masks = torch.zeros(3, 9, 8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"^em_step: masks must be \[3, 9, 8\] like the logits, got \[3, 9, 7\]$"):
        em_step(model, images, present, masks=masks[..., :7])
    with pytest.raises(
        RuntimeError, match=r"^em_step: strong must be bool \[3\] and come with masks, got .*int64 \[3\]"
    ):
        em_step(model, images, present, masks=masks, strong=torch.ones(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"^em_step: masks must be of integers, got torch.float32$"):
        em_step(model, images, present, masks=masks.float())
    for valid, got in ((masks, r"torch.int64 \[3, 9, 8\]"), (masks[0] == 0, r"torch.bool \[9, 8\]")):
        with pytest.raises(RuntimeError, match=rf"^em_step: valid must be bool \[3, 9, 8\], got {got}$"):
            em_step(model, images, present, valid=valid)
    with pytest.raises(RuntimeError, match=r"^em_step: strong must be bool \[3\] .* \[3\] without$"):
        em_step(model, images, present, strong=torch.ones(3).bool())


def test_boxes():
    """The smallest box on top, pixel by pixel; centres within, right and lower edges without."""
    torch.manual_seed(1)
    corner, size = torch.rand(6, 2) * 8, torch.rand(6, 2) * 8
    boxes = torch.cat([corner, corner + size], 1)
    boxes = torch.cat([boxes, torch.tensor([[0.5, 1.0, 2.5, 3.0]])])
    classes = torch.tensor([1, 2, 3, 1, 2, 3, 4])
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes.tolist()]
    expected = torch.zeros(12, 13, dtype=torch.int64)
    for row in range(12):
        for column in range(13):
            holding = [
                k
                for k, (x1, y1, x2, y2) in enumerate(boxes.tolist())
                if x1 <= column + 0.5 < x2 and y1 <= row + 0.5 < y2
            ]
            if holding:
                expected[row, column] = classes[min(holding, key=lambda k: areas[k])]
    got = box_labels(boxes, classes, (12, 13))
    assert torch.equal(got, expected)
    assert got[1:3, :2].eq(4).any()
    assert not box_labels(boxes[:0], classes[:0], (4, 5)).any()
    with pytest.raises(RuntimeError, match=r"^box_labels: boxes must be \[K, 4\], got \[7, 3\]$"):
        box_labels(boxes[:, :3], classes, (4, 5))
    with pytest.raises(RuntimeError, match=r"^box_labels: classes must be integers \[7\], got torch.float32 \[7\]$"):
        box_labels(boxes, classes.float(), (4, 5))


def test_boxes_with_crf():
    """Objects are cut out of their boxes; middles and surroundings are fixed whatever the CRF would say."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    drawn = torch.zeros(40, 50, dtype=torch.int64)
    drawn[(y - 20) ** 2 + (x - 20) ** 2 < 100] = 1
    drawn[(y > 25) & (x > 30) & (y < 37) & (x < 46)] = 3
    image = torch.tensor([[60.0, 60, 60], [180, 60, 60], [0, 0, 0], [60, 60, 200]])[drawn].movedim(2, 0)
    image = image + 10 * torch.randn(image.shape)
    boxes, classes = torch.tensor([[10.0, 10, 31, 31], [31, 26, 46, 37]]), torch.tensor([1, 3])
    filled = (box_labels(boxes, classes, (40, 50)) == drawn).float().mean()
    cut = (box_crf_labels(image, boxes, classes, spatial_sigma=30.0) == drawn).float().mean()
    assert filled < 0.96
    assert cut > 0.99
    # Of a box over nothing: all of it (alpha = 1), or its middle at least.
    empty, two = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([2])
    assert torch.equal(box_crf_labels(image, empty, two, alpha=1), box_labels(empty, two, (40, 50)))
    middle = box_crf_labels(image, empty, two, alpha=0.25)
    assert middle[2:6, 2:6].eq(2).all()
    assert not middle[8:].any()
    assert not box_crf_labels(image, empty[:0], two[:0]).any()
    with pytest.raises(RuntimeError, match=r"^box_crf_labels: alpha must be from 0 to 1, got 2$"):
        box_crf_labels(image, empty, two, alpha=2)


def test_example(tmp_path):
    """Two steps reach no mark: the program says so and how far it came."""
    out = tmp_path / "weak.png"
    done = run_example("weak_labels.py", "--steps", 2, "--threads", 1, "-o", out)
    assert done.returncode == 1, done.stderr
    assert "boxes, dense CRF" in done.stdout
    assert "EM-Adapt 0." in done.stdout.splitlines()[-1]
    assert "MISSED" in done.stdout.splitlines()[-1]
    assert out.stat().st_size > 10_000


def test_example_errors(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    weak_labels = importlib.import_module("weak_labels")
    for arguments, message in (
        (["--steps", "0"], "--steps and --threads must be at least 1"),
        (["-o", "weak.jpg"], "-o must end in .png, got weak.jpg"),
    ):
        monkeypatch.setattr(sys, "argv", ["weak_labels.py", *arguments])
        assert weak_labels.main() == 2
        assert capsys.readouterr().err == f"weak_labels: {message}\n"
