"""The operators as functions."""

from pyseg.functional.atrous_conv2d import atrous_conv2d as atrous_conv2d
from pyseg.functional.distance_transform import distance_to_two_nearest_objects as distance_to_two_nearest_objects
from pyseg.functional.distance_transform import distance_transform as distance_transform
from pyseg.functional.losses import *  # noqa: F403
from pyseg.functional.losses import __all__ as _losses

__all__ = ["atrous_conv2d", "distance_to_two_nearest_objects", "distance_transform", *_losses]
