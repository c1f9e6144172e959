"""The operators as functions."""

from pyseg.functional.atrous_conv2d import atrous_conv2d as atrous_conv2d
from pyseg.functional.losses import *  # noqa: F403
from pyseg.functional.losses import __all__ as _losses

__all__ = ["atrous_conv2d", *_losses]
