"""Python halves of the operators: fake kernels, autograd, autocast, batching. One file an operator."""

from pyseg._ops import activation_vjp as activation_vjp
from pyseg._ops import atrous_conv2d as atrous_conv2d
from pyseg._ops import confusion_matrix as confusion_matrix
from pyseg._ops import distance_transform as distance_transform
from pyseg._ops import expectation_labels as expectation_labels
from pyseg._ops import fuse_query as fuse_query
from pyseg._ops import gaussian_filter as gaussian_filter
from pyseg._ops import hausdorff_dt as hausdorff_dt
from pyseg._ops import joint_warp as joint_warp
from pyseg._ops import lovasz_statistics as lovasz_statistics
from pyseg._ops import mean_field as mean_field
from pyseg._ops import nms as nms
from pyseg._ops import paste_masks as paste_masks
from pyseg._ops import permutohedral_filter as permutohedral_filter
from pyseg._ops import permutohedral_lattice as permutohedral_lattice
from pyseg._ops import pixel_cross_entropy as pixel_cross_entropy
from pyseg._ops import point_supervision_loss as point_supervision_loss
from pyseg._ops import roi_align as roi_align
from pyseg._ops import segmentation_statistics as segmentation_statistics
from pyseg._ops import sparse_pairwise as sparse_pairwise
from pyseg._ops import upsample as upsample
from pyseg._ops import upsample_concat_depthwise as upsample_concat_depthwise
from pyseg._ops import valve_conv2d as valve_conv2d
from pyseg._ops import warp_to_view as warp_to_view
