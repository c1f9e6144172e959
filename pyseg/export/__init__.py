"""pyseg's operators for other runtimes: ONNX files of standard operators, and programs of ATen operators alone."""

from pyseg.export import boxes as _boxes  # noqa: F401  these fill the table
from pyseg.export import crf as _crf  # noqa: F401
from pyseg.export import labels as _labels  # noqa: F401
from pyseg.export import maps as _maps  # noqa: F401
from pyseg.export import warps as _warps  # noqa: F401
from pyseg.export.onnx import decompositions as decompositions
from pyseg.export.onnx import export_onnx as export_onnx
from pyseg.export.onnx import onnx_decompositions as onnx_decompositions
from pyseg.export.onnx import onnx_translations as onnx_translations

__all__ = ["decompositions", "export_onnx", "onnx_decompositions", "onnx_translations"]
