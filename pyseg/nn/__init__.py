"""The operators as modules."""

from pyseg.nn.atrous_conv2d import AtrousConv2d as AtrousConv2d
from pyseg.nn.atrous_conv2d import AtrousConv2dPlan as AtrousConv2dPlan

__all__ = ["AtrousConv2d", "AtrousConv2dPlan"]
