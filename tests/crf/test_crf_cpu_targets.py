"""The family's CPU kernels for every other instruction set that this machine has, each in a process of its own."""

from pathlib import Path

import pytest

from cpu_targets import OTHER_TARGETS, run_on_cpu_target

SCRIPT = """
import torch
import test_gaussian_filter, test_mean_field, test_permutohedral_filter, test_permutohedral_lattice
import test_sparse_pairwise
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
for channels in (1, 3, 5, 8, 11, 21):
    test_sparse_pairwise.test_definition("cpu", channels)
test_sparse_pairwise.test_gradients_of_the_reference("cpu")
test_mean_field.test_same_bits_for_every_number_of_threads()
"""


@pytest.mark.parametrize("capability", OTHER_TARGETS)
def test_cpu_capability(capability):
    run_on_cpu_target(capability, SCRIPT, Path(__file__).parent)
