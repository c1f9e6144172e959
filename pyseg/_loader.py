"""Loads the extension modules: the only file that imports `_C` and `_C_cuda`."""

import torch  # noqa: F401  libtorch must be in the process before the extension

from pyseg import _C  # noqa: F401
