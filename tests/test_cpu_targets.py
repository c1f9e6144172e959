"""The choice among the sets of CPU kernels. The operators' own tests run each set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyseg

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("baseline", "avx2", "avx512")


def run(target: str, program: str) -> subprocess.CompletedProcess:
    environment = dict(os.environ, PYSEG_CPU_CAPABILITY=target)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def best() -> str:
    result = run("", "import pyseg; print(pyseg.build_info().cpu_capability)")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


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
