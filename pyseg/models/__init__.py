"""Assembled networks and systems."""

from pyseg.models.multi_view import (
    color_agreement,
    label_energies,
    labels_of_points,
    multi_view_crf,
    observe_points,
    project_points,
)
from pyseg.models.u2net import U2Net, load_u2net_onnx, u2net, u2netp

__all__ = [
    "U2Net",
    "color_agreement",
    "label_energies",
    "labels_of_points",
    "load_u2net_onnx",
    "multi_view_crf",
    "observe_points",
    "project_points",
    "u2net",
    "u2netp",
]
