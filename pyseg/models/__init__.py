"""Assembled networks and systems."""

from pyseg.models.deeplab import DeepLab, deeplab
from pyseg.models.deeplab_em import EMAdapt, EMFixed, EMStep, box_crf_labels, box_labels, em_step, image_labels
from pyseg.models.fastfcn import FastFCN, fastfcn, segmentation_head
from pyseg.models.fusenet import FuseNet
from pyseg.models.hierarchical import HierarchicalSegmenter, RegionUNet
from pyseg.models.multi_view import (
    color_agreement,
    label_energies,
    labels_of_points,
    multi_view_crf,
    observe_points,
    project_points,
)
from pyseg.models.referring import ReferringSegmenter, SentenceEncoder
from pyseg.models.resnet import ResNetStages
from pyseg.models.u2net import U2Net, load_u2net_onnx, u2net, u2netp

__all__ = [
    "DeepLab",
    "EMAdapt",
    "EMFixed",
    "EMStep",
    "FastFCN",
    "FuseNet",
    "HierarchicalSegmenter",
    "ReferringSegmenter",
    "RegionUNet",
    "ResNetStages",
    "SentenceEncoder",
    "U2Net",
    "box_crf_labels",
    "box_labels",
    "color_agreement",
    "deeplab",
    "em_step",
    "fastfcn",
    "image_labels",
    "label_energies",
    "labels_of_points",
    "load_u2net_onnx",
    "multi_view_crf",
    "observe_points",
    "project_points",
    "segmentation_head",
    "u2net",
    "u2netp",
]
