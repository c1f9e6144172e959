"""The RoI kernels of every other instruction set that this machine has, each in a process of its own."""

from pathlib import Path

import pytest

from cpu_targets import OTHER_TARGETS, run_on_cpu_target

SCRIPT = """
import torch
import test_nms, test_paste_masks, test_roi_align
for dtype in test_roi_align.DTYPES:
    for layout in ("contiguous", "channels_last", "strided"):
        test_roi_align.test_dtypes_and_layouts("cpu", dtype, layout, "avg")
        test_roi_align.test_dtypes_and_layouts("cpu", dtype, layout, "max")
    test_roi_align.test_pyramid("cpu", dtype, "mixed")
    test_paste_masks.test_reference("cpu", dtype)
test_roi_align.test_gradient_of_boxes("cpu", "contiguous")
test_paste_masks.test_torchvision("cpu", 28)
test_paste_masks.test_crop_of_special_boxes("cpu")
test_paste_masks.test_large_output_is_written_whole()
for dtype in (torch.float32, torch.float64):
    test_nms.test_torchvision("cpu", dtype, 0.5)
"""


@pytest.mark.parametrize("capability", OTHER_TARGETS)
def test_cpu_capability(capability):
    run_on_cpu_target(capability, SCRIPT, Path(__file__).parent)
