"""Hand-written C++ and CUDA kernels for semantic segmentation in PyTorch."""

import sys as _sys

# `python -m pyseg.collect_env` imports this package first and must work where the lines below fail.
if "pyseg.collect_env" not in _sys.orig_argv:
    from pyseg import _loader as _loader  # first: it says what is wrong with an installation
    from pyseg import compat, export, functional, models, nn, reference
    from pyseg._accelerate import accelerate, report, restore
    from pyseg._build import BuildInfo, build_info, has_cuda
    from pyseg.export import export_onnx

    __version__ = build_info().version
    __all__ = [
        "BuildInfo",
        "accelerate",
        "build_info",
        "compat",
        "export",
        "export_onnx",
        "functional",
        "has_cuda",
        "models",
        "nn",
        "reference",
        "report",
        "restore",
    ]
