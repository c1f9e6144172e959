"""Multi-view segmentation: projections and labels by hand, the field against dense matrices, and the example."""

import re
import sys
from pathlib import Path

import pytest
import torch

from pyseg import reference
from pyseg.functional import dense_crf, sparse_pairwise, track_links
from pyseg.models import (
    color_agreement,
    label_energies,
    labels_of_points,
    multi_view_crf,
    observe_points,
    project_points,
)
from warm_python import run_example

ROOT = Path(__file__).parents[2]


def two_cameras():
    """One at the origin, one a metre to the right, both looking along z; focal length 4, centre (3, 2)."""
    inner = torch.tensor([[4.0, 0, 3], [0, 4, 2], [0, 0, 1]])
    poses = torch.stack([torch.eye(3, 4), torch.eye(3, 4)])
    poses[1, 0, 3] = -1
    return inner @ poses


def test_projection():
    points = torch.tensor([[0.0, 0, 2], [1, 0.5, 2], [0, 0, -1], [9, 0, 1]])
    pixels, depth = project_points(points, two_cameras())
    assert depth.tolist() == [[2, 2, -1, 1]] * 2
    torch.testing.assert_close(pixels[:, :2], torch.tensor([[[3.0, 2], [5, 3]], [[1, 2], [3, 3]]]))
    tracks = observe_points(points, two_cameras(), (5, 7))
    assert tracks.tolist() == [[0, 0, 2, 3], [1, 0, 3, 5], [0, 1, 2, 1], [1, 1, 3, 3]]
    with pytest.raises(ValueError, match=r"project_points: points must be \[K, 3\] and cameras \[M, 3, 4\], got"):
        project_points(points[:, :2], two_cameras())


def test_hidden_points():
    points = torch.tensor([[0.0, 0, 2], [0, 0, 3]])
    depth = torch.full((2, 5, 7), 10.0)
    depth[0, 2, 3] = 2.01
    assert observe_points(points, two_cameras(), (5, 7), depth).tolist() == [[0, 0, 2, 3], [0, 1, 2, 1], [1, 1, 2, 2]]
    inside = observe_points(points * torch.tensor([1, 1, 0]), two_cameras(), (5, 7), depth)
    assert inside.shape == (0, 4)  # in a camera's own plane


def test_label_energies():
    labels = torch.tensor([[0, 2, -1, 255]])
    got = label_energies(labels, 3, 0.8)
    assert got.shape == (1, 3, 4)
    expected = torch.tensor([0.8, 0.1, 0.1])
    torch.testing.assert_close((-got).softmax(1)[0, :, 0], expected)
    torch.testing.assert_close((-got).softmax(1)[0, :, 1], expected.flip(0))
    assert not got[:, :, 2:].any()
    for classes, confidence in ((1, 0.5), (3, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="label_energies: classes must be at least 2 and confidence between"):
            label_energies(labels, classes, confidence)


def test_labels_of_points():
    tracks = torch.tensor([[0, 0, 1, 1], [2, 0, 1, 1], [1, 1, 0, 2], [2, 1, 0, 0]])
    labels = torch.tensor([5, 6, 7])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        maps = labels_of_points(tracks[order], labels, (2, 2, 3))
        assert maps.tolist() == [[[-1, -1, -1], [-1, 7, -1]], [[7, -1, 6], [-1, -1, -1]]]


def test_color_agreement():
    image = torch.zeros(3, 2, 2, 2)
    image[2, :, 1, 1] = 3
    tracks = torch.tensor([[9, 0, 0, 0], [4, 0, 1, 1], [9, 1, 0, 0], [9, 2, 1, 1]])
    expected = torch.tensor([2.0, 0, 2, 8]).div(-2 * 2**2).exp()
    torch.testing.assert_close(color_agreement(image, tracks, 2.0), expected)


def test_field():
    """All views at once, against dense matrices; labels of one view reach another one that knows nothing."""
    tracks = torch.tensor([[k, view, k // 4, (k + view) % 4] for k in range(12) for view in (0, 1)])
    links = track_links(tracks, (2, 3, 4))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, 3, 4), generator=generator)
    labels[1] = -1
    unary = label_energies(labels, 3).double()
    got = multi_view_crf(unary, None, links, correspondence=2.0, smoothness=None, iterations=4)
    matrix = sparse_pairwise(torch.eye(24, dtype=torch.float64), links)
    costs = -2 * torch.eye(3, dtype=torch.float64)
    expected = reference.multi_view_crf(unary.flatten(2), [matrix], [costs], iterations=4)
    torch.testing.assert_close(got.flatten(2), expected)
    assert torch.equal(got.argmax(1)[1], labels[0].roll(1, 1))
    alone = dense_crf(unary, smoothness=None)
    torch.testing.assert_close(alone[1], torch.full_like(alone[1], 1 / 3))


# ---- the example ----


def test_example(tmp_path):
    """A small street: the program runs through, links help, and its status says what was reached."""
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "street.png"
    arguments = ["--height", 48, "--views", 3, "--points", 3000, "--steps", 4, "--threads", 1, "--least", 0.999]
    done = run_example("multi_view_street.py", *arguments, "-o", out)
    assert done.returncode == 1, done.stderr
    totals = dict(re.findall(r"^(\w+(?: \w+)?)  .* all \d\.\d+ (\d\.\d+)$", done.stdout, re.MULTILINE))
    assert set(totals) == {"classifier", "single views", "linked views"}
    assert float(totals["linked views"]) > float(totals["single views"])
    expected = f"multi_view_street: mean IoU of the linked views must be at least 0.999, got {totals['linked views']}\n"
    assert done.stderr == expected
    with image.open(out) as picture:
        assert picture.width > 1000


def test_example_errors(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import multi_view_street

    for arguments, message in (
        (["--views", "1"], "--views must be 2 to 12 and --height 32 to 1000"),
        (["--steps", "0"], "--points, --steps and --threads must be at least 1"),
        (["-o", "street.jpg"], "-o must end in .png, got street.jpg"),
    ):
        monkeypatch.setattr(sys, "argv", ["multi_view_street.py", *arguments])
        assert multi_view_street.main() == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
