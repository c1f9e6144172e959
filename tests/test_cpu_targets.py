"""The sets of CPU kernels and the choice among them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyseg

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("baseline", "avx2", "avx512")

# Convolutions through each kernel (dense with and without Winograd, depthwise, their gradients), against torch's.
PROGRAM = """
import torch, pyseg
from torch.nn.functional import conv2d
torch.manual_seed(0)
for dtype, tolerance in (torch.float32, 1e-4), (torch.float64, 1e-11), (torch.bfloat16, 3e-2):
    for groups, c_in, c_out in (1, 19, 21), (24, 24, 24):
        for dilation in 1, 4:
            for layout in torch.contiguous_format, torch.channels_last:
                x = torch.randn(2, c_in, 23, 17).to(dtype, memory_format=layout).requires_grad_()
                w = torch.randn(c_out, c_in // groups, 3, 3).to(dtype).requires_grad_()
                ours = pyseg.functional.atrous_conv2d(x, w, padding=dilation, dilation=dilation, groups=groups)
                theirs = conv2d(x.double(), w.double(), padding=dilation, dilation=dilation, groups=groups)
                seed = torch.randn_like(theirs)
                pairs = [(ours, theirs)]
                pairs += zip(torch.autograd.grad(ours, (x, w), seed.to(dtype)),
                             torch.autograd.grad(theirs, (x, w), seed))
                for a, b in pairs:
                    assert (a - b).abs().max() <= tolerance * b.abs().max(), (dtype, groups, dilation, layout)
print(pyseg.build_info().cpu_capability)
"""


def run(target: str, program: str) -> subprocess.CompletedProcess:
    environment = dict(os.environ, PYSEG_CPU_CAPABILITY=target)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def best() -> str:
    result = run("", "import pyseg; print(pyseg.build_info().cpu_capability)")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_that_the_machine_has_is_right(target):
    if TARGETS.index(target) > TARGETS.index(best()):
        pytest.skip(f"cpu target: this machine cannot run {target}; tests/test_symbols.py looks at its code")
    result = run(target, PROGRAM)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == target


def test_the_best_target_is_chosen():
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability)
    if expected is None:
        pytest.skip(f"cpu target: torch calls this machine {capability}")
    assert best() == expected


@pytest.mark.parametrize("wrong", ["avx1024", "AVX2"])
def test_unknown_target_is_named(wrong):
    result = run(wrong, "import pyseg")
    assert result.returncode != 0
    assert f"PYSEG_CPU_CAPABILITY must be baseline, avx2 or avx512, got {wrong}" in result.stderr


def test_target_that_the_machine_lacks_is_named():
    if best() == "avx512":
        pytest.skip("cpu target: this machine lacks none")
    result = run("avx512", "import pyseg")
    assert result.returncode != 0
    assert f"PYSEG_CPU_CAPABILITY=avx512: the best that this machine has is {best()}" in result.stderr


def test_build_info():
    info = pyseg.build_info()
    assert info.version == pyseg.__version__
    assert info.cpu_capability in TARGETS
    assert info.torch_version.split(".")[0] == torch.__version__.split(".")[0]
    assert (info.cuda_status == "loaded") == bool(info.cuda_architectures)
