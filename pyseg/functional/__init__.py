"""The operators as functions."""

from pyseg.functional.atrous_conv2d import atrous_conv2d as atrous_conv2d

__all__ = ["atrous_conv2d"]
