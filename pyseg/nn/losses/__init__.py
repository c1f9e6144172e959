"""The losses of pyseg.functional.losses as modules: the same arguments, given once."""

from pyseg.nn.losses._base import SegmentationLoss as SegmentationLoss
from pyseg.nn.losses.boundary import BoundaryLoss as BoundaryLoss
from pyseg.nn.losses.boundary import HausdorffDTLoss as HausdorffDTLoss
from pyseg.nn.losses.boundary import HausdorffERLoss as HausdorffERLoss
from pyseg.nn.losses.boundary import ShapeAwareLoss as ShapeAwareLoss
from pyseg.nn.losses.compound import ComboLoss as ComboLoss
from pyseg.nn.losses.compound import DiceCELoss as DiceCELoss
from pyseg.nn.losses.compound import DiceFocalLoss as DiceFocalLoss
from pyseg.nn.losses.compound import ExponentialLogarithmicLoss as ExponentialLogarithmicLoss
from pyseg.nn.losses.compound import UnifiedFocalLoss as UnifiedFocalLoss
from pyseg.nn.losses.distribution import BalancedCrossEntropyLoss as BalancedCrossEntropyLoss
from pyseg.nn.losses.distribution import CrossEntropyLoss as CrossEntropyLoss
from pyseg.nn.losses.distribution import FocalLoss as FocalLoss
from pyseg.nn.losses.distribution import OHEMCrossEntropyLoss as OHEMCrossEntropyLoss
from pyseg.nn.losses.distribution import TopKCrossEntropyLoss as TopKCrossEntropyLoss
from pyseg.nn.losses.distribution import WeightedBCELoss as WeightedBCELoss
from pyseg.nn.losses.point_supervision import PointSupervisionLoss as PointSupervisionLoss
from pyseg.nn.losses.region import DiceLoss as DiceLoss
from pyseg.nn.losses.region import FocalTverskyLoss as FocalTverskyLoss
from pyseg.nn.losses.region import GeneralizedDiceLoss as GeneralizedDiceLoss
from pyseg.nn.losses.region import JaccardLoss as JaccardLoss
from pyseg.nn.losses.region import LogCoshDiceLoss as LogCoshDiceLoss
from pyseg.nn.losses.region import LovaszHingeLoss as LovaszHingeLoss
from pyseg.nn.losses.region import LovaszSoftmaxLoss as LovaszSoftmaxLoss
from pyseg.nn.losses.region import MCCLoss as MCCLoss
from pyseg.nn.losses.region import SensitivitySpecificityLoss as SensitivitySpecificityLoss
from pyseg.nn.losses.region import TverskyLoss as TverskyLoss

__all__ = [
    "BalancedCrossEntropyLoss",
    "BoundaryLoss",
    "ComboLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "ExponentialLogarithmicLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "HausdorffDTLoss",
    "HausdorffERLoss",
    "JaccardLoss",
    "LogCoshDiceLoss",
    "LovaszHingeLoss",
    "LovaszSoftmaxLoss",
    "MCCLoss",
    "OHEMCrossEntropyLoss",
    "PointSupervisionLoss",
    "SegmentationLoss",
    "SensitivitySpecificityLoss",
    "ShapeAwareLoss",
    "TopKCrossEntropyLoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
    "WeightedBCELoss",
]
