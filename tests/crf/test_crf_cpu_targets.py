"""The family's CPU kernels for every instruction set that this machine has, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyseg

SCRIPT = """
import torch
import test_gaussian_filter, test_mean_field, test_permutohedral_filter, test_permutohedral_lattice
import pyseg._loader
assert pyseg._loader._C.cpu_capability() == {capability!r}
for d in (2, 5):
    for dtype in (torch.float32, torch.float64):
        test_permutohedral_lattice.test_definition("cpu", d, dtype)
    for accuracy in ("fast", "high"):
        test_permutohedral_filter.test_definition("cpu", d, accuracy, True)
test_permutohedral_lattice.test_gradient_of_the_reference("cpu")
test_permutohedral_lattice.test_vertex_kernel(3)
for channels in (1, 3, 8, 21):
    test_permutohedral_filter.test_channels("cpu", channels)
    test_mean_field.test_classes("cpu", channels)
test_permutohedral_filter.test_gradients_of_the_reference("cpu", "fast")
for case in test_gaussian_filter.CASES:
    test_gaussian_filter.test_definition("cpu", case, False)
test_mean_field.test_coarse_grid(21, (64, 101), (3.0, 3.0))
test_mean_field.test_energies_out_of_the_ordinary("cpu")
test_mean_field.test_same_bits_for_every_number_of_threads()
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_cpu_capability(capability):
    here = Path(__file__).parent
    folders = [str(here), str(here.parent), str(Path(pyseg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYSEG_CPU_CAPABILITY=capability, PYTHONPATH=os.pathsep.join(folders))
    script = SCRIPT.format(capability=capability)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    if "the best that this machine has" in result.stderr:
        pytest.skip(f"cpu target: this machine cannot run {capability}")
    assert result.returncode == 0, result.stderr[-3000:]
