"""Slow, obvious implementations written from the definitions: what the tests compare the kernels with."""

from pyseg.reference.atrous_conv2d import atrous_conv2d as atrous_conv2d
from pyseg.reference.confusion_matrix import confusion_matrix as confusion_matrix
from pyseg.reference.dense_crf import dense_crf as dense_crf
from pyseg.reference.dense_crf import dense_crf_energy as dense_crf_energy
from pyseg.reference.dense_crf import pairwise_matrix as pairwise_matrix
from pyseg.reference.distance_transform import distance_to_two_nearest_objects as distance_to_two_nearest_objects
from pyseg.reference.distance_transform import distance_transform as distance_transform
from pyseg.reference.expectation_labels import expectation_labels as expectation_labels
from pyseg.reference.fuse_query import fuse_query as fuse_query
from pyseg.reference.gaussian_filter import gaussian_filter as gaussian_filter
from pyseg.reference.joint_warp import displacement_field as displacement_field
from pyseg.reference.joint_warp import joint_warp as joint_warp
from pyseg.reference.joint_warp import warp_places as warp_places
from pyseg.reference.jpu import JPU as JPU
from pyseg.reference.lovasz import lovasz_statistics as lovasz_statistics
from pyseg.reference.paste_masks import nms as nms
from pyseg.reference.paste_masks import paste_masks as paste_masks
from pyseg.reference.permutohedral import permutohedral_filter as permutohedral_filter
from pyseg.reference.permutohedral import permutohedral_simplices as permutohedral_simplices
from pyseg.reference.pixel_cross_entropy import pixel_cross_entropy as pixel_cross_entropy
from pyseg.reference.point_supervision import point_supervision_loss as point_supervision_loss
from pyseg.reference.roi_align import multiscale_roi_align as multiscale_roi_align
from pyseg.reference.roi_align import roi_align as roi_align
from pyseg.reference.segmentation_statistics import segmentation_statistics as segmentation_statistics
from pyseg.reference.sparse_pairwise import link_matrix as link_matrix
from pyseg.reference.sparse_pairwise import multi_view_crf as multi_view_crf
from pyseg.reference.sparse_pairwise import sparse_pairwise as sparse_pairwise
from pyseg.reference.surface_distance import average_surface_distance as average_surface_distance
from pyseg.reference.surface_distance import hausdorff_distance as hausdorff_distance
from pyseg.reference.surface_distance import surface_dice as surface_dice
from pyseg.reference.upsample import bilinear_upsample as bilinear_upsample
from pyseg.reference.upsample import upsample_concat as upsample_concat
from pyseg.reference.upsample import upsample_concat_depthwise as upsample_concat_depthwise
from pyseg.reference.valve_conv2d import region_gate as region_gate
from pyseg.reference.valve_conv2d import valve_conv2d as valve_conv2d
from pyseg.reference.warp_to_view import fuse_views as fuse_views
from pyseg.reference.warp_to_view import warp_to_view as warp_to_view

__all__ = [
    "JPU",
    "atrous_conv2d",
    "average_surface_distance",
    "bilinear_upsample",
    "confusion_matrix",
    "dense_crf",
    "dense_crf_energy",
    "displacement_field",
    "distance_to_two_nearest_objects",
    "distance_transform",
    "expectation_labels",
    "fuse_query",
    "fuse_views",
    "gaussian_filter",
    "hausdorff_distance",
    "joint_warp",
    "link_matrix",
    "lovasz_statistics",
    "multi_view_crf",
    "multiscale_roi_align",
    "nms",
    "pairwise_matrix",
    "paste_masks",
    "permutohedral_filter",
    "permutohedral_simplices",
    "pixel_cross_entropy",
    "point_supervision_loss",
    "region_gate",
    "roi_align",
    "segmentation_statistics",
    "sparse_pairwise",
    "surface_dice",
    "upsample_concat",
    "upsample_concat_depthwise",
    "valve_conv2d",
    "warp_places",
    "warp_to_view",
]
