"""Compiles planted.cu for test_check_cuda.py and test_cuda_runner.py."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".cu")
LIBRARY = Path(__file__).parents[1] / "build" / "planted.so"


def nvcc() -> str:
    path = shutil.which(os.environ.get("NVCC", "nvcc"))
    if path is None:
        pytest.skip("cuda: no nvcc on PATH")
    return path


@functools.cache
def planted_library() -> Path:
    """Machine code and PTX for 80 and 90, PTX for 75."""
    compiler = nvcc()
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(exist_ok=True)
        architectures = [f"-gencode=arch=compute_{sm},code=[sm_{sm},compute_{sm}]" for sm in (80, 90)]
        command = [compiler, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "shared", *architectures]
        command += ["-gencode=arch=compute_75,code=compute_75", str(SOURCE), "-o", str(LIBRARY)]
        subprocess.run(command, check=True)
    return LIBRARY
