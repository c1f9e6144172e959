"""Losses on the overlap of regions. Formulas and arguments: pyseg.functional.losses.region."""

from pyseg.functional.losses import region as F
from pyseg.nn.losses._base import SegmentationLoss


class DiceLoss(SegmentationLoss, function=F.dice_loss):
    """Dice, with plain or squared denominators. See pyseg.functional.dice_loss."""


class LogCoshDiceLoss(SegmentationLoss, function=F.log_cosh_dice_loss):
    """log(cosh(Dice loss)). See pyseg.functional.log_cosh_dice_loss."""


class GeneralizedDiceLoss(SegmentationLoss, function=F.generalized_dice_loss):
    """Dice over all classes at once, weighted by their inverse sizes. See pyseg.functional.generalized_dice_loss."""


class JaccardLoss(SegmentationLoss, function=F.jaccard_loss):
    """Jaccard index (intersection over union). See pyseg.functional.jaccard_loss."""


class TverskyLoss(SegmentationLoss, function=F.tversky_loss):
    """Tversky index: alpha weighs false positives, beta false negatives. See pyseg.functional.tversky_loss."""


class FocalTverskyLoss(SegmentationLoss, function=F.focal_tversky_loss):
    """Tversky loss to the power 1/gamma or gamma. See pyseg.functional.focal_tversky_loss."""


class SensitivitySpecificityLoss(SegmentationLoss, function=F.sensitivity_specificity_loss):
    """Weighted mean squared errors of foreground and background. See pyseg.functional.sensitivity_specificity_loss."""


class MCCLoss(SegmentationLoss, function=F.mcc_loss):
    """Matthews correlation coefficient. See pyseg.functional.mcc_loss."""


class LovaszSoftmaxLoss(SegmentationLoss, function=F.lovasz_softmax_loss):
    """Lovasz extension of the Jaccard loss over probabilities. See pyseg.functional.lovasz_softmax_loss."""


class LovaszHingeLoss(SegmentationLoss, function=F.lovasz_hinge_loss):
    """Lovasz extension of the Jaccard loss over hinge margins. See pyseg.functional.lovasz_hinge_loss."""
