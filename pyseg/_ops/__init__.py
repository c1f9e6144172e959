"""Python halves of the operators: fake kernels, autograd, autocast, batching. One file an operator."""

from pyseg._ops import atrous_conv2d as atrous_conv2d
from pyseg._ops import segmentation_statistics as segmentation_statistics
