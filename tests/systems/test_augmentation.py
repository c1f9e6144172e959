"""pyseg.nn.JointAugmentation, and its example as a user runs it."""

from pathlib import Path

import pytest
import torch

from pyseg import reference
from pyseg.nn import JointAugmentation
from warm_python import run_example

ROOT = Path(__file__).parents[2]


def seeded(seed=0, **options):
    return JointAugmentation(generator=torch.Generator().manual_seed(seed), **options)


def test_reproducible(device):
    """A seed gives the same batch on every device, another seed another one; images differ among themselves."""
    images = torch.rand(2, 3, 20, 24).expand(2, -1, -1, -1)
    labels = torch.randint(5, (2, 20, 24))
    first, second = (seeded(sigma=2)(images.to(where), labels.to(where)) for where in ("cpu", device))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], seeded(1, sigma=2)(images)[0])
    twice = images[:1].expand(2, -1, -1, -1)
    assert not torch.equal(*seeded(sigma=2)(twice)[0])


def test_reference():
    """What is drawn is what is done."""
    images, labels = torch.rand(3, 2, 20, 24), torch.randint(5, (3, 20, 24))
    augment = seeded(size=(16, 18), sigma=2, ignore_index=-1, scale=(0.5, 1.5), rotation=90)
    y, warped = augment(images, labels)
    drawn = seeded(size=(16, 18), sigma=2, ignore_index=-1, scale=(0.5, 1.5), rotation=90).draw(3, (20, 24))
    factors = [f[:, None].expand(-1, 2) for f in (drawn.gain, drawn.bias)]
    expected, expected_labels = reference.joint_warp(
        images, labels, *drawn[:2], *factors, (16, 18), label_border="constant", ignore_index=-1
    )
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5)
    assert (warped != expected_labels).double().mean() < 0.01
    assert (warped == -1).any()


def test_ranges():
    """Every drawn number within what was asked for, and the whole range used."""
    drawn = seeded(rotation=10, scale=(0.8, 1.25), contrast=0.3, brightness=0.2, flip=(0.0, 1.0)).draw(500, (30, 40))
    linear = drawn.affine[:, :, :2]
    scale = linear.det().abs().rsqrt()
    assert 0.8 <= scale.min() < 0.82
    assert 1.22 < scale.max() <= 1.25
    assert (linear.det() < 0).all()  # one axis of two is always mirrored
    angles = torch.atan2(-linear[:, 1, 0], linear[:, 0, 0]).rad2deg()
    assert 9.5 < angles.abs().max() <= 10 + 1e-9
    assert 0.7 <= drawn.gain.min() < 0.72
    assert 1.28 < drawn.gain.max() <= 1.3
    brightness = drawn.bias - 0.5 * (1 - drawn.gain)
    assert 0.19 < brightness.abs().max() <= 0.2
    assert drawn.displacement.std().item() == pytest.approx(10, rel=0.05)


def test_crop_copies():
    """With nothing else to do, a random crop is one: somewhere inside, everywhere possible."""
    still = {"sigma": 0, "flip": 0, "rotation": 0, "scale": (1.0, 1.0), "brightness": 0, "contrast": 0}
    image = torch.arange(42, dtype=torch.uint8).reshape(1, 1, 6, 7).expand(200, -1, -1, -1)
    crops, _ = seeded(size=4, **still)(image)
    assert crops.dtype == torch.uint8
    assert crops.shape == (200, 1, 4, 4)
    first = crops[:, 0, 0, 0].long()
    rows, columns = first // 7, first % 7
    assert torch.equal(crops[:, 0, 3, 3].long(), first + 3 * 7 + 3)
    assert (rows.unique().tolist(), columns.unique().tolist()) == ([0, 1, 2], [0, 1, 2, 3])
    centred, _ = seeded(size=4, crop="center", **still)(image[..., :6])
    assert torch.equal(centred[0, 0], image[0, 0, 1:5, 1:5])


def test_volume():
    """Three axes, each with its own deviation and turn."""
    volume, labels = torch.rand(1, 1, 6, 8, 9), torch.randint(3, (1, 6, 8, 9))
    y, warped = seeded(sigma=(0.5, 2, 2), grid=(2, 3, 3), rotation=(30, 5, 5))(volume, labels)
    assert (y.shape, warped.shape) == (volume.shape, labels.shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0, 1)}, "scale must be two positive numbers that increase, got"),
        ({"crop": "left"}, "crop must be random or center, got left"),
        ({"contrast": -1}, "contrast must not be negative, got -1"),
        ({"flip": (0.5, 0.5, 0.5)}, "size, flip and rotation must fit images of 2 axes, got"),
    ],
)
def test_errors(options, message):
    with pytest.raises(RuntimeError, match="JointAugmentation: " + message):
        JointAugmentation(**options)(torch.ones(1, 1, 4, 4))


def test_example(tmp_path):
    pytest.importorskip("skimage")
    path = tmp_path / "augmented.png"
    done = run_example("augment_cells.py", "--count", 1, "--threads", 1, "-o", path)
    assert done.returncode == 0, done.stderr
    assert "labels agree in" in done.stdout
    assert path.read_bytes()[:4] == b"\x89PNG"
    wrong = run_example("augment_cells.py", "-o", "x.jpg")
    assert (wrong.returncode, wrong.stderr) == (2, "augment_cells: -o must end in .png, got x.jpg\n")
