"""Models with pyseg's operators as ONNX files of standard operators."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from pyseg.export.table import TABLE, Decomposition

_BOXES_ONLY = ("roi_align", "multiscale_roi_align")  # decomposed where RoiAlign cannot do it


def export_onnx(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    file: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    r"""Exports a model that uses pyseg's operators to ONNX, made of standard operators alone.

        model = pyseg.accelerate(model.eval(), image)
        pyseg.export_onnx(model, (image,), "model.onnx")

    torch.export traces the model, without gradients, so that accelerated blocks run fused; pyseg's operators are
    decomposed into ATen's or, where ONNX has operators of its own, translated to these; torch.onnx.export does the
    rest. docs/export.md lists what becomes of each operator, how far results agree, and what has no form in ONNX.

    Args:
        model: a module, in the mode (train or eval) that the file should have; or a program of torch.export.
        args, kwargs: example inputs of a module.
        file: the file to write; None returns the program alone.
        dynamic_shapes: as for torch.export.export: which sizes vary, e.g. {"x": {0: Dim("n")}}.
        options: further ones for torch.onnx.export: input_names, output_names, opset_version, external_data, ...

    Returns:
        torch's ONNXProgram, whose `model_proto` is the model, and which can be called.

    Raises:
        ImportError: onnx or onnxscript is not installed. RuntimeError: an operator that has no form in ONNX. What
        torch.export and torch.onnx.export raise.
    """
    translations = onnx_translations()
    with torch.no_grad():
        program = model
        if isinstance(program, nn.Module):
            program = torch.export.export(program, tuple(args), kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        program = program.run_decompositions(onnx_decompositions())
        written = torch.onnx.export(
            program, (), file, dynamo=True, custom_translation_table=translations, verbose=False, **options
        )
    assert written is not None
    return written


def decompositions() -> dict[torch._ops.OpOverload, Decomposition]:
    """pyseg's operators in terms of ATen's, for `ExportedProgram.run_decompositions`: other runtimes than ONNX.

    program = torch.export.export(model, args).run_decompositions(pyseg.export.decompositions())

    nms and permutohedral_lattice have none, since their results' sizes are data. Those of what is for training alone
    raise, such as point_supervision_loss.
    """
    return dict(TABLE)


def onnx_decompositions() -> dict[torch._ops.OpOverload, Decomposition]:
    """`decompositions` without what `onnx_translations` does: what a program passes before torch.onnx.export."""
    table = decompositions()
    for name in _BOXES_ONLY:
        operator = getattr(torch.ops.pyseg, name).default
        table[operator] = _unless_aligned(table[operator])
    return table


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of torch.onnx.export: operators that ONNX has its own form of."""
    try:
        from pyseg.export import onnx_boxes, onnx_lattice
    except ImportError as error:
        raise ImportError(f"{error}; ONNX export needs: pip install onnx onnxscript") from error
    return {
        torch.ops.pyseg.roi_align.default: onnx_boxes.roi_align,
        torch.ops.pyseg.multiscale_roi_align.default: onnx_boxes.multiscale_roi_align,
        torch.ops.pyseg.nms.default: onnx_boxes.nms,
        torch.ops.pyseg.nms_padded.default: onnx_boxes.nms_padded,
        torch.ops.pyseg.permutohedral_lattice.default: onnx_lattice.permutohedral_lattice,
    }


def _unless_aligned(decomposition: Decomposition) -> Decomposition:
    """Boxes [K, 5] stay for RoiAlign; rotated ones and those of volumes are decomposed."""

    def decompose(maps: Any, boxes: torch.Tensor, *arguments: Any) -> Any:
        return NotImplemented if boxes.shape[1] == 5 else decomposition(maps, boxes, *arguments)

    return decompose
