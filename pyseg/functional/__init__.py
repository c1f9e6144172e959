"""The operators as functions."""

from pyseg.functional.atrous_conv2d import atrous_conv2d as atrous_conv2d
from pyseg.functional.bilinear_upsample import bilinear_upsample as bilinear_upsample
from pyseg.functional.bilinear_upsample import upsample_concat as upsample_concat
from pyseg.functional.confusion_matrix import confusion_matrix as confusion_matrix
from pyseg.functional.dense_crf import dense_crf as dense_crf
from pyseg.functional.dense_crf import dense_crf_energy as dense_crf_energy
from pyseg.functional.dense_crf import dense_crf_kernels as dense_crf_kernels
from pyseg.functional.distance_transform import distance_to_two_nearest_objects as distance_to_two_nearest_objects
from pyseg.functional.distance_transform import distance_transform as distance_transform
from pyseg.functional.expectation_labels import expectation_labels as expectation_labels
from pyseg.functional.fuse_query import fuse_query as fuse_query
from pyseg.functional.fuse_views import fuse_views as fuse_views
from pyseg.functional.fuse_views import warp_and_fuse as warp_and_fuse
from pyseg.functional.gaussian_filter import gaussian_filter as gaussian_filter
from pyseg.functional.joint_warp import elastic_deform as elastic_deform
from pyseg.functional.joint_warp import joint_warp as joint_warp
from pyseg.functional.joint_warp import warp_matrix as warp_matrix
from pyseg.functional.losses import *  # noqa: F403
from pyseg.functional.losses import __all__ as _losses
from pyseg.functional.nms import batched_nms as batched_nms
from pyseg.functional.nms import nms as nms
from pyseg.functional.nms import nms_padded as nms_padded
from pyseg.functional.pairwise_kernels import FeatureKernel as FeatureKernel
from pyseg.functional.pairwise_kernels import GaussianKernel as GaussianKernel
from pyseg.functional.pairwise_kernels import LinkKernel as LinkKernel
from pyseg.functional.pairwise_kernels import bilateral_features as bilateral_features
from pyseg.functional.paste_masks import crop_masks as crop_masks
from pyseg.functional.paste_masks import paste_masks as paste_masks
from pyseg.functional.permutohedral_lattice import PermutohedralLattice as PermutohedralLattice
from pyseg.functional.permutohedral_lattice import permutohedral_filter as permutohedral_filter
from pyseg.functional.permutohedral_lattice import permutohedral_lattice as permutohedral_lattice
from pyseg.functional.roi_align import multiscale_roi_align as multiscale_roi_align
from pyseg.functional.roi_align import roi_align as roi_align
from pyseg.functional.segmentation_metrics import dice as dice
from pyseg.functional.segmentation_metrics import frequency_weighted_iou as frequency_weighted_iou
from pyseg.functional.segmentation_metrics import iou as iou
from pyseg.functional.segmentation_metrics import pixel_accuracy as pixel_accuracy
from pyseg.functional.segmentation_metrics import precision as precision
from pyseg.functional.segmentation_metrics import recall as recall
from pyseg.functional.segmentation_metrics import specificity as specificity
from pyseg.functional.sparse_pairwise import PixelLinks as PixelLinks
from pyseg.functional.sparse_pairwise import correspondence_links as correspondence_links
from pyseg.functional.sparse_pairwise import pixel_links as pixel_links
from pyseg.functional.sparse_pairwise import sparse_pairwise as sparse_pairwise
from pyseg.functional.sparse_pairwise import track_links as track_links
from pyseg.functional.surface_distance import average_surface_distance as average_surface_distance
from pyseg.functional.surface_distance import hausdorff_distance as hausdorff_distance
from pyseg.functional.surface_distance import surface_dice as surface_dice
from pyseg.functional.upsample_concat_depthwise import upsample_concat_depthwise as upsample_concat_depthwise
from pyseg.functional.valve_conv2d import region_gate as region_gate
from pyseg.functional.valve_conv2d import valve_conv2d as valve_conv2d
from pyseg.functional.warp_to_view import warp_to_view as warp_to_view

__all__ = [
    "FeatureKernel",
    "GaussianKernel",
    "LinkKernel",
    "PermutohedralLattice",
    "PixelLinks",
    "atrous_conv2d",
    "average_surface_distance",
    "batched_nms",
    "bilinear_upsample",
    "confusion_matrix",
    "correspondence_links",
    "crop_masks",
    "bilateral_features",
    "dense_crf",
    "dense_crf_energy",
    "dense_crf_kernels",
    "dice",
    "distance_to_two_nearest_objects",
    "distance_transform",
    "expectation_labels",
    "elastic_deform",
    "frequency_weighted_iou",
    "fuse_query",
    "fuse_views",
    "gaussian_filter",
    "hausdorff_distance",
    "iou",
    "joint_warp",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "paste_masks",
    "permutohedral_filter",
    "permutohedral_lattice",
    "pixel_links",
    "pixel_accuracy",
    "precision",
    "recall",
    "region_gate",
    "roi_align",
    "specificity",
    "sparse_pairwise",
    "surface_dice",
    "track_links",
    "upsample_concat",
    "upsample_concat_depthwise",
    "warp_and_fuse",
    "warp_to_view",
    "valve_conv2d",
    "warp_matrix",
    *_losses,
]
