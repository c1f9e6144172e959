"""Hand-written C++ and CUDA kernels for semantic segmentation in PyTorch."""

from pyseg import _loader as _loader
from pyseg import functional as functional
from pyseg import nn as nn
from pyseg import reference as reference
