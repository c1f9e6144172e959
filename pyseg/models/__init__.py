"""Assembled networks."""

from pyseg.models.deeplab import DeepLab, deeplab
from pyseg.models.fastfcn import FastFCN, fastfcn, segmentation_head
from pyseg.models.resnet import ResNetStages
from pyseg.models.u2net import U2Net, load_u2net_onnx, u2net, u2netp

__all__ = [
    "DeepLab",
    "FastFCN",
    "ResNetStages",
    "U2Net",
    "deeplab",
    "fastfcn",
    "load_u2net_onnx",
    "segmentation_head",
    "u2net",
    "u2netp",
]
