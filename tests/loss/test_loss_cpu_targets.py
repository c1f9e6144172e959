"""The losses' kernels of every instruction set that this machine has, each in a process of its own."""

from pathlib import Path

import pytest

from cpu_targets import OTHER_TARGETS, run_on_cpu_target

SCRIPT = """
import torch
from segmentation_cases import DTYPES, make_dense, make_labels, make_logits
import test_hausdorff_dt, test_lovasz_statistics, test_pixel_cross_entropy, test_point_supervision_loss
import test_segmentation_statistics
test_segmentation_statistics.test_vectorised_logarithm()
test_segmentation_statistics.test_vectorised_exponential()
test_segmentation_statistics.test_large_gradient()
test_hausdorff_dt.test_many_pixels()
test_segmentation_statistics.test_binary_labels_out_of_range()
for gamma, flags in zip((0.0, 2.0, 0.5), test_segmentation_statistics.FLAGS):
    test_segmentation_statistics.test_binary_labels_of_many_pixels(gamma, flags)
for dtype in DTYPES:
    for layout in ("contiguous", "channels_last"):
        test_point_supervision_loss.test_layouts_and_dtypes("cpu", layout, dtype)
    for activation in ("softmax", "sigmoid", "none"):
        for layout in ("contiguous", "channels_last"):
            logits = make_logits((2, 5, 9, 61), dtype, activation, layout)
            labels, dense = make_labels(logits.shape, ignore=9), make_dense(logits.shape)
            for gamma in (0.0, 1.5):
                test_segmentation_statistics.check(logits, labels, None, activation, 9, gamma, True, True, True)
                test_pixel_cross_entropy.check(logits, dense, None, activation, None, gamma, 0.0)
    for label_dtype in (torch.uint8, torch.int64):
        test_segmentation_statistics.test_binary_labels("cpu", dtype, label_dtype)
    logits = test_lovasz_statistics.distinct_logits((2, 3, 5, 8), dtype)
    test_lovasz_statistics.check(logits, make_labels(logits.shape), "hinge", None, False)
"""


@pytest.mark.parametrize("capability", OTHER_TARGETS)
def test_cpu_capability(capability):
    run_on_cpu_target(capability, SCRIPT, Path(__file__).parent)
