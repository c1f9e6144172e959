"""What the machine itself can do (matrix products and memory streams), and what it is, without saying whose it is."""

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SGEMM_SIZES = (512, 1024, 1536)
STREAM_MIB = (1, 4, 16, 64, 256)  # footprints, from inside the caches to far outside
PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "onnxruntime", "monai", "kornia",
            "segmentation-models-pytorch", "scipy", "edt", "opencv-python-headless", "pydensecrf2",
            "pyseg-kernels")  # fmt: skip


def measure_rates(seconds: float = 0.15) -> dict[str, Any]:
    """sgemm in GFLOP/s and streams in GB/s, per footprint in MiB, with the current number of threads.

    Each figure is the best of repetitions that take `seconds`: a limit, not an average. Bytes are those that the
    operation asks for; what a cache loads in order to write is not counted.
    """
    with torch.inference_mode():
        return {
            "sgemm_gflops": max(_sgemm(size, seconds) for size in SGEMM_SIZES),
            "stream_gbs": {str(mib): _stream(mib << 20, seconds) for mib in STREAM_MIB},
        }


def better_of(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The better rates of two measurements, before and after the cases: limits that another process may have hidden."""
    return {
        "sgemm_gflops": max(first["sgemm_gflops"], second["sgemm_gflops"]),
        "stream_gbs": {mib: max(rate, second["stream_gbs"][mib]) for mib, rate in first["stream_gbs"].items()},
    }


def floor_ms(flops: int, bytes_: int, rates: dict[str, Any]) -> float:
    """The least time for this many operations and bytes: the slower of both. Streams are taken at the footprint."""
    streams = sorted((int(mib) << 20, rate) for mib, rate in rates["stream_gbs"].items())
    stream = next((rate for footprint, rate in streams if footprint >= bytes_), streams[-1][1])
    return max(flops / rates["sgemm_gflops"], bytes_ / stream) / 1e6


def _sgemm(size: int, seconds: float) -> float:
    a, b = torch.rand(size, size), torch.rand(size, size)
    c = torch.empty(size, size)
    return 2 * size**3 / _best_ns(lambda: torch.mm(a, b, out=c), seconds)


def _stream(footprint: int, seconds: float) -> float:
    """The fastest of reading, copying and adding."""
    values = footprint // 4
    two = torch.ones(2, values // 2)
    three = torch.ones(3, values // 3)
    one = torch.ones(values)
    operations: list[Callable[[], Any]] = [
        lambda: one.sum(),
        lambda: two[1].copy_(two[0]),
        lambda: torch.add(three[0], three[1], out=three[2]),
    ]
    return footprint / min(_best_ns(operation, seconds / len(operations)) for operation in operations)


def _best_ns(call: Callable[[], Any], seconds: float) -> int:
    call()
    best, end = 1 << 62, time.perf_counter() + seconds
    while True:
        start = time.perf_counter_ns()
        call()
        best = min(best, time.perf_counter_ns() - start)
        if time.perf_counter() > end:
            return max(best, 1)


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
    }


def describe_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["oneDNN"] = _config_field("Intel(R) MKL-DNN v")
    return {name: version for name, version in versions.items() if version}


def capability() -> str:
    """The instruction set that pyseg's CPU kernels run with."""
    import pyseg  # not before a case needs it: the rates can be had without

    return pyseg.build_info().cpu_capability


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _config_field(prefix: str) -> str:
    """The version behind `prefix` in torch's own description of its build."""
    _, found, rest = torch.__config__.show().partition(prefix)
    return rest.split()[0] if found else ""
