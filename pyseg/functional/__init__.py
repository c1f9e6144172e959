"""The operators as functions."""

from pyseg.functional.atrous_conv2d import atrous_conv2d as atrous_conv2d
from pyseg.functional.confusion_matrix import confusion_matrix as confusion_matrix
from pyseg.functional.distance_transform import distance_to_two_nearest_objects as distance_to_two_nearest_objects
from pyseg.functional.distance_transform import distance_transform as distance_transform
from pyseg.functional.losses import *  # noqa: F403
from pyseg.functional.losses import __all__ as _losses
from pyseg.functional.nms import batched_nms as batched_nms
from pyseg.functional.nms import nms as nms
from pyseg.functional.nms import nms_padded as nms_padded
from pyseg.functional.paste_masks import crop_masks as crop_masks
from pyseg.functional.paste_masks import paste_masks as paste_masks
from pyseg.functional.roi_align import multiscale_roi_align as multiscale_roi_align
from pyseg.functional.roi_align import roi_align as roi_align
from pyseg.functional.segmentation_metrics import dice as dice
from pyseg.functional.segmentation_metrics import frequency_weighted_iou as frequency_weighted_iou
from pyseg.functional.segmentation_metrics import iou as iou
from pyseg.functional.segmentation_metrics import pixel_accuracy as pixel_accuracy
from pyseg.functional.segmentation_metrics import precision as precision
from pyseg.functional.segmentation_metrics import recall as recall
from pyseg.functional.segmentation_metrics import specificity as specificity
from pyseg.functional.surface_distance import average_surface_distance as average_surface_distance
from pyseg.functional.surface_distance import hausdorff_distance as hausdorff_distance
from pyseg.functional.surface_distance import surface_dice as surface_dice

__all__ = [
    "atrous_conv2d",
    "average_surface_distance",
    "batched_nms",
    "confusion_matrix",
    "crop_masks",
    "dice",
    "distance_to_two_nearest_objects",
    "distance_transform",
    "frequency_weighted_iou",
    "hausdorff_distance",
    "iou",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "paste_masks",
    "pixel_accuracy",
    "precision",
    "recall",
    "roi_align",
    "specificity",
    "surface_dice",
    *_losses,
]
