"""The RoI kernels of every other instruction set that this machine has, each in a process of its own."""

from pathlib import Path

import pytest

import pyseg
from cpu_targets import run_on_cpu_target

SCRIPT = """
import torch
import pyseg._loader
import test_nms, test_paste_masks, test_roi_align
assert pyseg._loader._C.cpu_capability() == {capability!r}
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


@pytest.mark.parametrize("capability", sorted({"baseline", "avx2", "avx512"} - {pyseg.build_info().cpu_capability}))
def test_cpu_capability(capability):
    run_on_cpu_target(capability, SCRIPT.format(capability=capability), Path(__file__).parent)
