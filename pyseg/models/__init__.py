"""Assembled networks."""

from pyseg.models.hierarchical import HierarchicalSegmenter, RegionUNet
from pyseg.models.u2net import U2Net, load_u2net_onnx, u2net, u2netp

__all__ = ["HierarchicalSegmenter", "RegionUNet", "U2Net", "load_u2net_onnx", "u2net", "u2netp"]
