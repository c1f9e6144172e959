"""The kernels of every other instruction set that this machine has, each in a process of its own."""

from pathlib import Path

import pytest

from cpu_targets import OTHER_TARGETS, run_on_cpu_target

SCRIPT = """
import torch
import test_bilinear_upsample as bilinear
import test_upsample_concat_depthwise as depthwise
for dtype in bilinear.DTYPES:
    for layout in ("contiguous", "channels_last", "strided"):
        bilinear.test_dtypes_and_layouts("cpu", dtype, layout)
        bilinear.test_concat("cpu", dtype, layout)
        depthwise.test_dtypes_and_layouts("cpu", dtype, layout)
for layout in ("contiguous", "channels_last"):
    bilinear.test_torch_on_large_maps(torch.float32, layout)
    depthwise.test_torch_on_large_maps(layout)
    depthwise.test_dilations("cpu", (7, 1, 30), True, layout)
"""


@pytest.mark.parametrize("capability", OTHER_TARGETS)
def test_cpu_capability(capability):
    run_on_cpu_target(capability, SCRIPT, Path(__file__).parent)
