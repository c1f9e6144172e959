"""The kernels of every other instruction set that this machine has: right, and the same bits."""

from pathlib import Path

import pytest
import torch
from warp_cases import make_image, make_labels, make_warp

from cpu_targets import OTHER_TARGETS, run_on_cpu_target
from pyseg.functional import joint_warp

SCRIPT = """
import torch
import test_joint_warp as tests
import test_joint_warp_cpu_targets as targets
for dtype in tests.DTYPES:
    tests.test_dtypes_and_layouts("cpu", dtype, 2)
    tests.test_dtypes_and_layouts("cpu", dtype, 3)
tests.test_gradients("cpu", 2, torch.float32)
expected = torch.load({path!r})
assert all(torch.equal(a, b) for a, b in zip(targets.results(), expected, strict=True))
"""


def results():
    """Of both sampling loops and their tails, with the gradient."""
    outputs = []
    for dtype in (torch.float32, torch.uint8):
        image, labels = make_image((2, 3, 40, 50), dtype), make_labels((2, 40, 50))
        affine, displacement = make_warp(2, (40, 50))
        arguments = {"gain": 1.3, "bias": -0.2, "size": (30, 301), "border": "constant", "fill": 0.3}
        outputs += joint_warp(image, labels, affine, displacement, **arguments)
    leaf = make_image((2, 3, 40, 50)).requires_grad_()
    return *outputs, *torch.autograd.grad(joint_warp(leaf, None, affine, displacement)[0].square().sum(), leaf)


@pytest.mark.parametrize("capability", OTHER_TARGETS)
def test_cpu_capability(capability, tmp_path):
    torch.save(results(), tmp_path / "results.pt")
    script = SCRIPT.format(path=str(tmp_path / "results.pt"))
    run_on_cpu_target(capability, script, Path(__file__).parent)
