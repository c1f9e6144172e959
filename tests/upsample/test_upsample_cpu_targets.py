"""The kernels of every other instruction set that this machine has, each in a process of its own."""

from pathlib import Path

import pytest

import pyseg
from cpu_targets import run_on_cpu_target

SCRIPT = """
import torch
import pyseg._loader
import test_bilinear_upsample as bilinear
import test_upsample_concat_depthwise as depthwise
assert pyseg._loader._C.cpu_capability() == {capability!r}
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


@pytest.mark.parametrize("capability", sorted({"baseline", "avx2", "avx512"} - {pyseg.build_info().cpu_capability}))
def test_cpu_capability(capability):
    run_on_cpu_target(capability, SCRIPT.format(capability=capability), Path(__file__).parent)
