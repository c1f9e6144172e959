"""Slow, obvious implementations written from the definitions: what the tests compare the kernels with."""

from pyseg.reference.atrous_conv2d import atrous_conv2d as atrous_conv2d

__all__ = ["atrous_conv2d"]
