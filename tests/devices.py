"""Where the tests run: on the CPU, and on CUDA whether or not there is a GPU.

A test takes the argument `device` and is run once with "cpu" and once with "cuda":

    def test_relu(device):
        x = torch.randn(3, 5, device=device)
        torch.testing.assert_close(pyseg_relu(x), x.clamp_min(0))

`device` combines with parametrize, fixtures and Hypothesis. On a machine with a GPU the `cuda` half uses it. Elsewhere
it runs in a child process under tests/fakegpu, which interprets the kernels of pyseg._C_cuda and checks every access;
a violation fails the test that caused it. aten operators on CUDA tensors work there too (on the CPU, slowly: keep
shapes small, and make large inputs on the CPU). There are two devices, cuda:0 and cuda:1. PYSEG_FAKEGPU=1 takes the
fake GPU on a machine with a real one too. Where neither is possible the `cuda` half is skipped with the reason.

    pytest tests/conv -k cuda                        the CUDA half of a folder
    pytest --cuda-sm=75,80,90 --cuda-orders=forward,reverse,random      every variant, as `make check-cuda` does

Markers for tests that take `device`; the last three concern the fake GPU only:
    @pytest.mark.cuda_only          what happens inside CUDA kernels: no run on the CPU
    @pytest.mark.sm(75)             the compute capabilities that the test is for (default 80 and 90). A plain run
                                    takes the first one.
    @pytest.mark.block_orders       blocks communicate: `--cuda-orders` runs the test once for each order of the blocks
    @pytest.mark.needs_gpu("why")   skipped on the fake GPU, on cuda only (inductor, graph capture, speed)

cuda_budget.py asserts what a kernel did, so that a slow path cannot pass for a fast one.
"""

import ctypes
import fcntl
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

DEFAULT_SMS = (80, 90)
ORDERS = ("forward", "reverse", "random")

FAKEGPU_FOLDER = Path(__file__).parent / "fakegpu"
FAKEGPU_LIBRARY = Path(__file__).parents[1] / "build" / "fakegpu" / "libfakegpu.so"


class FakeGpu:
    """The functions that libfakegpu.so exports to a process that has it preloaded."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.fakegpu_counters.restype = ctypes.c_char_p
        library.fakegpu_violation_count.restype = ctypes.c_ulonglong

    def counters(self) -> list[dict]:
        """One entry for each kernel and block order: see `make -C tests/fakegpu` and its README."""
        return [json.loads(line) for line in self._library.fakegpu_counters().decode().splitlines()]

    def set_order(self, order: str) -> None:
        if not self._library.fakegpu_set_order(order.encode()):
            raise ValueError(f"unknown block order {order!r}: not one of {ORDERS}")

    def violations(self) -> int:
        return self._library.fakegpu_violation_count()

    def reset_violations(self) -> None:
        self._library.fakegpu_reset_violations()


@functools.cache
def fake_gpu() -> FakeGpu | None:
    """The fake GPU of this process, or None where it is not preloaded."""
    library = ctypes.CDLL(None)
    return FakeGpu(library) if hasattr(library, "fakegpu_counters") else None


@functools.cache
def cuda_mode() -> tuple[str, str]:
    """How the `cuda` tests of this run are executed: ("gpu" | "preloaded" | "fakegpu" | "none", why)."""
    import torch

    package = importlib.util.find_spec("pyseg")  # not imported: a broken module is for its own tests to report
    folders = [] if package is None else package.submodule_search_locations
    if not any(list(Path(folder).glob("_C_cuda*.so")) for folder in folders):
        return "none", "pyseg was built without CUDA"
    if torch.version.cuda is None:
        return "none", "this torch is a CPU build"
    if fake_gpu() is not None:
        return "preloaded", "the fake GPU is preloaded into this process"
    if torch.cuda.is_available() and os.environ.get("PYSEG_FAKEGPU") != "1":
        return "gpu", torch.cuda.get_device_name(0)
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        return "none", "no GPU, and no nvcc to build the fake one"
    if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        return "none", "no GPU, and no make or g++ to build the fake one"
    return "fakegpu", "kernels are interpreted by tests/fakegpu"


def build_fakegpu() -> None:
    """Builds libfakegpu.so where it is missing or older than its sources."""
    command = ["make", "-C", str(FAKEGPU_FOLDER), f"-j{os.cpu_count()}", f"PYTHON={sys.executable}"]
    with (FAKEGPU_FOLDER / "Makefile").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of pytest-xdist's workers builds, the others wait
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")


def fakegpu_environment(sm: int) -> dict[str, str]:
    """The environment of a process whose CUDA device is a fake one of this compute capability."""
    environment = dict(
        os.environ,
        LD_PRELOAD=str(FAKEGPU_LIBRARY),
        FAKEGPU_SM=str(sm),
        FAKEGPU_DEVICES="2",
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # each tensor is an allocation, so its bounds are exact
    )
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment
