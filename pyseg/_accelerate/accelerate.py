"""accelerate(), report() and restore()."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx, nn

from pyseg._accelerate.layout import restore_strides
from pyseg._accelerate.measure import Example
from pyseg._accelerate.modules import unswap
from pyseg._accelerate.report import Report
from pyseg._accelerate.session import Session

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model,
    example_inputs: Any = None,
    *,
    channels_last: bool | None = None,
    exact: bool = False,
    tolerance: float | None = None,
    rounds: int = 3,
    progress: Callable[[str], None] | None = None,
) -> Model:
    """Makes a model faster in place, and returns it.

    Convolutions that pyseg has kernels for (3x3 with stride 1, dense or depthwise, any dilation; dense 1x1 on the CPU)
    run on them, in eval mode together with the batch norm and ReLU that follow; in eval mode other convolutions have
    their batch norms multiplied into the weights. What follows what is read off the forwards of the model's modules by
    torch.fx; a module whose forward cannot be followed keeps its batch norms. In training mode nothing is folded.

    Blocks that are recognised by name and structure run as a whole in eval mode: ASPP (torchvision,
    segmentation-models-pytorch, mmsegmentation's heads) and JPU (FastFCN), see pyseg.nn.ASPP and pyseg.nn.JPU. Each is
    first compared with its own modules, on random inputs, and stays as it is where it computes something else.

    Of detectors also changes, where they are faster: RoIAlign and its pyramids (torchvision's MultiScaleRoIAlign and
    RoIAlign, detectron2's ROIPooler and ROIAlign, mmcv's RoIAlign), the non-maximum suppression, mask pasting and mask
    targets in the methods of torchvision's detectors, and detectron2's suppression. They are recognised by name and
    structure.

    The modules stay the same objects, with the same parameters, buffers, hooks and state_dict keys; only their classes
    change, and the strides of their weights where channels_last is chosen. `restore` undoes all of it, `report` tells
    what was done. A model that is accelerated already is returned as it is. Copies, pickles, torch.compile and
    torch.export work on an accelerated model; restore it before you script, quantize or otherwise rebuild it.

    Args:
        model: any nn.Module, also a torch.fx.GraphModule; in the mode, dtype and on the device that it will run in.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them every convolution is
            timed in each form and becomes the fastest one, in the memory format that suits the model better; then the
            model is timed as a whole, and where it is not faster than before it is left as it was. In training mode
            with the backward pass. Without them everything is changed that has a kernel, and nothing is measured.
        channels_last: whether the weights, and by them the activations, change to channels_last; None: if that is
            faster (without example inputs: no).
        exact: forbid Winograd's algorithm, see pyseg.functional.atrous_conv2d.
        tolerance: how far the outputs may be from the original's, relative to each output's largest magnitude; of
            integer outputs, the share of elements. None: 1e-4, for 16-bit outputs 1e-2 (float16) and 5e-2 (bfloat16).
        rounds: calls of the whole model per measurement.
        progress: called with a line of text now and then.

    Raises:
        RuntimeError: the accelerated model fails, or its outputs differ, also without the blocks that are off by more
            than the tolerance; the model is restored before.
    """
    if _stored_report(model) is not None:
        return model
    session = Session(model, exact, progress or (lambda line: None))
    if example_inputs is None:
        outcome = session.apply_unmeasured(channels_last is True)
    else:
        outcome = session.measure(Example(model, example_inputs), channels_last, tolerance, rounds)
    _store(model)["_pyseg_report"] = outcome
    return model


def report(model: nn.Module) -> Report:
    """What accelerate() did to `model` and why: `print(pyseg.report(model))`, or see Report for the data.

    Raises ValueError for a model that was not accelerated.
    """
    stored = _stored_report(model)
    if stored is None:
        raise ValueError("report: model must have been accelerated, got one that was not (or that has been restored)")
    return stored


def restore(model: Model) -> Model:
    """Undoes accelerate() in place, and returns the model: same modules, classes, strides; values as they are now.

    Also undoes what was done to parts of the model, and does nothing to a model that was not accelerated.
    """
    for module in model.modules():
        unswap(module)
        restore_strides(module)
        _store(module).pop("_pyseg_report", None)
    return model


def _store(model: nn.Module) -> dict[str, Any]:
    """Where a model keeps its report. Of GraphModules only `meta` survives a deepcopy."""
    return model.meta if isinstance(model, fx.GraphModule) else model.__dict__


def _stored_report(model: nn.Module) -> Report | None:
    return _store(model).get("_pyseg_report")
