"""What the loaded extension modules were built with and what they can do here."""

from dataclasses import dataclass

import torch

from pyseg._loader import _C, _C_cuda, why_no_cuda


@dataclass(frozen=True)
class BuildInfo:
    """Facts about the build of pyseg; see `build_info`."""

    version: str
    """pyseg's version."""
    torch_version: str
    """The torch that pyseg was compiled against; every later one serves, and so does every earlier one from 2.11 on."""
    cxx_compiler: str
    """Name and version of the C++ compiler."""
    cpu_capability: str
    """The set of CPU kernels in use: `baseline` (x86-64-v2), `avx2` or `avx512`."""
    cuda_version: str | None
    """Version of the CUDA compiler, None where the CUDA kernels were not built."""
    cuda_architectures: tuple[str, ...]
    """What the CUDA kernels were compiled for, in CMake's notation; empty where they are not loaded."""
    cuda_status: str
    """`loaded`, or why the CUDA kernels are not."""


def build_info() -> BuildInfo:
    """Returns what pyseg was built with, which CPU kernels it chose, and whether its CUDA kernels are loaded.

    Does not initialise CUDA.
    """
    return BuildInfo(
        version=_C.version,
        torch_version=_C.torch_version,
        cxx_compiler=_C.cxx_compiler,
        cpu_capability=_C.cpu_capability(),
        cuda_version=_C.cuda_version or None,
        cuda_architectures=tuple(_C_cuda.architectures.split()) if _C_cuda else (),
        cuda_status=why_no_cuda or "loaded",
    )


def has_cuda() -> bool:
    """Returns whether pyseg's operators run on CUDA tensors here: its CUDA kernels are loaded and torch sees a device.

    `build_info().cuda_status` says why the kernels are not loaded. Asks torch for the number of devices, which does not
    initialise CUDA.
    """
    return _C_cuda is not None and torch.cuda.is_available()
