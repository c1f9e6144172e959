"""Losses on the distance between boundaries. Formulas and arguments: pyseg.functional.losses.boundary."""

from pyseg.functional.losses import boundary as F
from pyseg.nn.losses._base import SegmentationLoss


class HausdorffDTLoss(SegmentationLoss, function=F.hausdorff_dt_loss):
    """Hausdorff distance by distance transforms. See pyseg.functional.hausdorff_dt_loss."""


class HausdorffERLoss(SegmentationLoss, function=F.hausdorff_er_loss):
    """Hausdorff distance by erosions. See pyseg.functional.hausdorff_er_loss."""


class BoundaryLoss(SegmentationLoss, function=F.boundary_loss):
    """Probabilities weighted by the signed distance to the true boundary. See pyseg.functional.boundary_loss."""


class ShapeAwareLoss(SegmentationLoss, function=F.shape_aware_loss):
    """Cross-entropy, raised at wrong pixels by the distance between predicted and true curves.

    See pyseg.functional.shape_aware_loss.
    """
