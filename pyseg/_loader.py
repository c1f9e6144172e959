"""Loads the extension modules: the only file that imports `_C` and `_C_cuda`."""

import torch  # libtorch must be in the process before the extension

from pyseg import _C


def _same_cuda_major() -> bool:
    """Whether `_C_cuda` was built, for the CUDA major version that torch was built for."""
    built, running = _C.cuda_version, torch.version.cuda
    return bool(built and running) and built.split(".")[0] == running.split(".")[0]


if _same_cuda_major():
    from pyseg import _C_cuda  # noqa: F401
