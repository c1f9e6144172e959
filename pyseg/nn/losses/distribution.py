"""Cross-entropies. Formulas and arguments: pyseg.functional.losses.distribution."""

from pyseg.functional.losses import distribution as F
from pyseg.nn.losses._base import SegmentationLoss


class CrossEntropyLoss(SegmentationLoss, function=F.cross_entropy):
    """torch.nn.CrossEntropyLoss with a map of pixel weights: `loss(input, target, pixel_weight=w)`.

    See pyseg.functional.cross_entropy.
    """


class WeightedBCELoss(SegmentationLoss, function=F.weighted_binary_cross_entropy):
    """Binary cross-entropy with a factor beta on the positives; forward takes a `pixel_weight` too.

    See pyseg.functional.weighted_binary_cross_entropy.
    """


class BalancedCrossEntropyLoss(SegmentationLoss, function=F.balanced_cross_entropy):
    """Binary cross-entropy whose two halves are weighed by the share of the other.

    See pyseg.functional.balanced_cross_entropy.
    """


class FocalLoss(SegmentationLoss, function=F.focal_loss):
    """Focal loss over a softmax or over sigmoids. See pyseg.functional.focal_loss."""


class TopKCrossEntropyLoss(SegmentationLoss, function=F.topk_cross_entropy):
    """Cross-entropy of the k hardest pixels. See pyseg.functional.topk_cross_entropy."""


class OHEMCrossEntropyLoss(SegmentationLoss, function=F.ohem_cross_entropy):
    """Cross-entropy of the pixels below a probability: online hard example mining.

    See pyseg.functional.ohem_cross_entropy.
    """
