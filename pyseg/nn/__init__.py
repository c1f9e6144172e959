"""The operators as modules."""

from pyseg.nn.aspp import ASPP as ASPP
from pyseg.nn.aspp import ASPPSum as ASPPSum
from pyseg.nn.atrous_conv2d import AtrousConv2d as AtrousConv2d
from pyseg.nn.atrous_conv2d import AtrousConv2dPlan as AtrousConv2dPlan
from pyseg.nn.dense_crf import CRFasRNN as CRFasRNN
from pyseg.nn.dense_crf import DenseCRF as DenseCRF
from pyseg.nn.fuse_query import FuseQuery as FuseQuery
from pyseg.nn.joint_augmentation import JointAugmentation as JointAugmentation
from pyseg.nn.joint_augmentation import WarpParameters as WarpParameters
from pyseg.nn.jpu import JPU as JPU
from pyseg.nn.losses import *  # noqa: F403
from pyseg.nn.losses import __all__ as _losses
from pyseg.nn.metrics import ConfusionMatrix as ConfusionMatrix
from pyseg.nn.metrics import SegmentationMetrics as SegmentationMetrics
from pyseg.nn.roi_align import MultiScaleRoIAlign as MultiScaleRoIAlign
from pyseg.nn.valve_conv2d import RegionGate as RegionGate
from pyseg.nn.valve_conv2d import ValveConv2d as ValveConv2d

__all__ = [
    "ASPP",
    "ASPPSum",
    "AtrousConv2d",
    "AtrousConv2dPlan",
    "ConfusionMatrix",
    "MultiScaleRoIAlign",
    "CRFasRNN",
    "DenseCRF",
    "FuseQuery",
    "JPU",
    "RegionGate",
    "SegmentationMetrics",
    "ValveConv2d",
    "JointAugmentation",
    "WarpParameters",
    *_losses,
]
