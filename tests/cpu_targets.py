"""Programs that need another instruction set than this process has chosen."""

from pathlib import Path

import pytest

import pyseg
from warm_python import run_code

TARGETS = ("baseline", "avx2", "avx512")
OTHER_TARGETS = [target for target in TARGETS if target != pyseg.build_info().cpu_capability]  # the tests run that one


def run_on_cpu_target(capability: str, script: str, folder: Path) -> None:
    """Runs `script`, which may import what the tests of `folder` can; skips where the machine lacks the target."""
    chosen = f"import pyseg._loader\nassert pyseg._loader._C.cpu_capability() == {capability!r}\n"
    result = run_code(chosen + script, folder, capability)
    if "the best that this machine has" in result.stderr:
        pytest.skip(f"cpu target: this machine cannot run {capability}")
    assert result.returncode == 0, result.stderr[-3000:]
