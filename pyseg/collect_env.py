"""Prints what a bug report needs: `python -m pyseg.collect_env`. Works where importing pyseg or torch fails."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_CPU_FLAGS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")


def _attempt(read: Callable[[], object]) -> str:
    """The value as a string, or the error that reading it raised: a report is most useful where things are broken."""
    try:
        return str(read())
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _command(*words: str) -> str:
    if shutil.which(words[0]) is None:
        return "not found"
    return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in _CPU_FLAGS if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', 'unknown')}, {os.cpu_count()} threads, {' '.join(flags) or 'no known flags'}"


def _extension_modules() -> str:
    folder = Path(__file__).parent
    files = sorted(path for path in folder.glob("_C*") if path.suffix in (".so", ".pyd", ".dylib"))
    return ", ".join(f"{path.name} ({path.stat().st_size} bytes)" for path in files) or f"none in {folder}"


def _torch() -> str:
    import torch

    threads = torch.get_num_threads()
    return f"{torch.__version__}, CUDA {torch.version.cuda}, {threads} threads, in {Path(torch.__file__).parent}"


def _torch_devices() -> str:
    import torch

    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"


def _pyseg() -> str:
    from pyseg._build import build_info

    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(build_info()).items())


def collect_env() -> dict[str, str]:
    """Returns the report as names and values; a part that cannot be read says why."""
    return {
        "pyseg": _attempt(_pyseg),
        "extension modules": _attempt(_extension_modules),
        "torch": _attempt(_torch),
        "CUDA devices": _attempt(_torch_devices),
        "driver": _attempt(lambda: _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")),
        "Python": f"{sys.version.split()[0]} in {sys.executable}",
        "platform": platform.platform(),
        "CPU": _attempt(_cpu),
        "c++": _attempt(lambda: _command("c++", "--version").splitlines()[0]),
        "nvcc": _attempt(lambda: _command("nvcc", "--version").splitlines()[-1]),
        "environment": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("PYSEG_", "OMP_")))
        or "no PYSEG_ or OMP_ variables",
    }


if __name__ == "__main__":
    for name, value in collect_env().items():
        print(f"{name + ':':<19}{value}")
