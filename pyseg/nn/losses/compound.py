"""Losses made of several, in one pass over the logits. Formulas and arguments: pyseg.functional.losses.compound."""

from pyseg.functional.losses import compound as F
from pyseg.nn.losses._base import SegmentationLoss


class DiceCELoss(SegmentationLoss, function=F.dice_ce_loss):
    """Dice and cross-entropy. See pyseg.functional.dice_ce_loss."""


class DiceFocalLoss(SegmentationLoss, function=F.dice_focal_loss):
    """Dice and focal loss. See pyseg.functional.dice_focal_loss."""


class ComboLoss(SegmentationLoss, function=F.combo_loss):
    """Weighted cross-entropy minus Dice. See pyseg.functional.combo_loss."""


class ExponentialLogarithmicLoss(SegmentationLoss, function=F.exponential_logarithmic_loss):
    """Powers of the logarithms of Dice and of the probabilities. See pyseg.functional.exponential_logarithmic_loss."""


class UnifiedFocalLoss(SegmentationLoss, function=F.unified_focal_loss):
    """Focal cross-entropy and focal Tversky, symmetric or asymmetric. See pyseg.functional.unified_focal_loss."""
