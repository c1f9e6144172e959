"""Programs that need another instruction set than this process has chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyseg


def run_on_cpu_target(capability: str, script: str, folder: Path) -> None:
    """Runs `script`, which may import what the tests of `folder` can; skips where the machine lacks the target."""
    folders = [str(folder), str(Path(__file__).parent), str(Path(pyseg.__file__).parents[1])]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ, PYSEG_CPU_CAPABILITY=capability, PYTHONPATH=path)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    if "the best that this machine has" in result.stderr:
        pytest.skip(f"cpu target: this machine cannot run {capability}")
    assert result.returncode == 0, result.stderr[-3000:]
