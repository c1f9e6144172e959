"""Hand-written C++ and CUDA kernels for semantic segmentation in PyTorch."""

from pyseg import _loader as _loader
