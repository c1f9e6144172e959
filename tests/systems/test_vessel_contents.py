"""Hierarchical segmentation: the networks, and its example as a user runs it."""

from pathlib import Path

import pytest
import torch

from pyseg.models import HierarchicalSegmenter, RegionUNet
from warm_python import run_example

EXAMPLE = Path(__file__).parents[2] / "examples" / "vessel_contents.py"


@pytest.mark.parametrize("kind", ["valve", "valve_add", "concat", "mask", "none"])
def test_networks(kind):
    """Each way of taking the region: shapes of odd sizes, gradients of all parameters."""
    torch.manual_seed(0)
    model = RegionUNet(3, kind, width=4, levels=2)
    image, region = torch.randn(2, 3, 11, 14), torch.zeros(2, 1, 11, 14, dtype=torch.bool)
    region[..., 3:9, 2:10] = True
    logits = model(image, region)
    assert logits.shape == (2, 3, 11, 14)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    if kind == "none":
        assert torch.equal(model.eval()(image), model(image, region))
    else:
        with pytest.raises(ValueError, match="RegionUNet: region must be given"):
            model(image)


def test_new_valves_are_open():
    """Before training the region changes nothing: a network without region is where it starts from."""
    model = RegionUNet(3, "valve", width=4, levels=2).eval()
    image = torch.randn(1, 3, 8, 8)
    everywhere, nowhere = model(image, torch.ones(1, 1, 8, 8)), model(image, torch.zeros(1, 1, 8, 8))
    assert torch.equal(everywhere, nowhere)


def test_two_stages():
    """The second network sees what the first finds, or the region that is given; outside there are no contents."""

    class Objects(torch.nn.Module):
        def forward(self, image):
            return torch.cat([-image[:, :1], image[:, :1]], 1)

    class Contents(torch.nn.Module):
        def forward(self, image, region):
            return torch.cat([torch.zeros_like(region), 1 + region, 2 * region], 1)

    system = HierarchicalSegmenter(Objects(), Contents())
    image = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    found = image[:, 0] > 0
    assert torch.equal(system.predict(image), found.long())
    given = torch.ones(2, 1, 5, 6)
    assert torch.equal(system.predict(image, given), torch.ones(2, 5, 6, dtype=torch.int64))
    assert [each.shape[1] for each in system(image)] == [2, 3]


def test_arguments():
    with pytest.raises(ValueError, match="region must be valve, valve_add, concat, mask or none, got 'gate'"):
        RegionUNet(3, "gate")
    with pytest.raises(ValueError, match="classes, width, levels must be positive, got 0, 16, 3"):
        RegionUNet(0)


def run(*arguments):
    return run_example("vessel_contents.py", *arguments)


def test_example(tmp_path):
    """A few steps: too few to learn, so that its status says that the threshold was missed."""
    pytest.importorskip("PIL")
    short = ("--steps", 2, "--images", 8, "--held-out", 8, "--threads", 1)
    done = run(*short, "--least", 1.1, "-o", tmp_path / "vessels.png")
    assert done.returncode == 1, done.stderr
    assert "valve filters must reach 1.1" in done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("without region", "valve filters", "both"))]
    assert len(rows) == 3
    assert all(0 <= float(row[24:32]) <= 1 for row in rows)
    assert (tmp_path / "vessels.png").stat().st_size > 10_000


def test_example_errors(tmp_path):
    done = run("-o", tmp_path / "vessels.gif")
    assert done.returncode == 2
    assert done.stderr.startswith("vessel_contents: -o must end in .png")
    assert done.stderr.count("\n") == 1
