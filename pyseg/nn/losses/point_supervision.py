"""Point supervision. Formula and arguments: pyseg.functional.losses.point_supervision."""

from pyseg.functional.losses import point_supervision as F
from pyseg.nn.losses._base import SegmentationLoss


class PointSupervisionLoss(SegmentationLoss, function=F.point_supervision_loss):
    """Image-level labels, points and an objectness prior: `loss(input, target, objectness=p, image_labels=l)`.

    See pyseg.functional.point_supervision_loss, of which forward takes input, target, image_labels, point_weight and
    objectness.
    """
