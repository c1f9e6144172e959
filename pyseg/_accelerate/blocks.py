"""Blocks of segmentation models that run as a whole in eval mode: ASPP and joint pyramid upsampling.

They are recognised by name and structure, so nothing here imports torchvision, segmentation-models-pytorch or
mmsegmentation.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyseg.nn._aspp_fusion import ASPPFusion, aspp_layers, mmseg_layers
from pyseg.nn._jpu_fusion import JPUFusion, jpu_layers

Methods = dict[str, Callable[..., Any]]


def block_methods(kind: type[nn.Module]) -> tuple[str, Methods]:
    """What a class of this name is, and the methods that change; nothing for other classes."""
    make = _BLOCKS.get(kind.__name__)
    return ("", {}) if make is None or kind.__module__.startswith(("pyseg.nn", "pyseg._accelerate")) else make(kind)


def fits_block(module: nn.Module) -> bool:
    """Whether a module with a block's name has its structure."""
    name = type(module).__name__
    if name == "ASPP":
        return aspp_layers(module) is not None
    if name == "JPU":
        return jpu_layers(module) is not None and _is_bilinear(module)
    names = ["_transform_inputs", "align_corners", "cls_seg"]
    names += ["c1_bottleneck", "sep_bottleneck"] if name == "DepthwiseSeparableASPPHead" else []
    return all(hasattr(module, each) for each in names) and mmseg_layers(module) is not None


def _is_bilinear(jpu: nn.Module) -> bool:
    options = getattr(jpu, "up_kwargs", None)
    return (
        isinstance(options, dict) and options.get("mode") == "bilinear" and options.keys() <= {"mode", "align_corners"}
    )


def is_block(kind: type[nn.Module]) -> bool:
    """Whether a class has a block's name."""
    return bool(block_methods(kind)[1])


def new_fusion(kind: type[nn.Module], exact: bool) -> ASPPFusion | JPUFusion:
    """What a block of the class `kind` keeps between calls, its `_pyseg_fusion`."""
    return JPUFusion(exact) if kind.__name__ == "JPU" else ASPPFusion(exact)


def _aspp(original: type[nn.Module]) -> tuple[str, Methods]:
    def forward(self: Any, x: Tensor) -> Any:
        result = self._pyseg_fusion.run(self, aspp_layers(self), x)
        return original.forward(self, x) if result is None else result

    return "ASPP", {"forward": forward}


def _mmseg_features(head: Any, inputs: Any) -> Tensor | None:
    layers, fusion = mmseg_layers(head), head._pyseg_fusion
    if layers is None or not fusion.may_fold(head, inputs):  # before the inputs are resized and concatenated
        return None
    result: Tensor | None = fusion.compute(layers, head._transform_inputs(inputs))
    return result


def _mmseg_head(original: Any) -> tuple[str, Methods]:
    def forward_feature(self: Any, inputs: Any) -> Any:
        result = _mmseg_features(self, inputs)
        return original._forward_feature(self, inputs) if result is None else result

    def forward(self: Any, inputs: Any) -> Any:
        result = _mmseg_features(self, inputs)
        return original.forward(self, inputs) if result is None else self.cls_seg(result)

    if hasattr(original, "_forward_feature"):
        return "ASPP", {"_forward_feature": forward_feature}
    return "ASPP", {"forward": forward}


def _mmseg_separable_head(original: type[nn.Module]) -> tuple[str, Methods]:
    def forward(self: Any, inputs: Any) -> Any:
        result = _mmseg_features(self, inputs)
        if result is None:
            return original.forward(self, inputs)
        if self.c1_bottleneck is not None:
            fine = self.c1_bottleneck(inputs[0])
            result = F.interpolate(result, fine.shape[2:], mode="bilinear", align_corners=self.align_corners)
            result = torch.cat([result, fine], 1)
        return self.cls_seg(self.sep_bottleneck(result))

    return "ASPP", {"forward": forward}


def _jpu(original: type[nn.Module]) -> tuple[str, Methods]:
    def forward(self: Any, *inputs: Tensor) -> Any:
        layers = jpu_layers(self) if _is_bilinear(self) else None
        corners = bool(self.up_kwargs.get("align_corners"))
        result = self._pyseg_fusion.run(self, layers, (inputs[-3], inputs[-2], inputs[-1]), corners)
        if result is None:
            return original.forward(self, *inputs)
        return inputs[0], inputs[1], inputs[2], result

    return "JPU", {"forward": forward}


# By the class's name. torchvision and segmentation-models-pytorch; mmsegmentation; FastFCN.
_BLOCKS: dict[str, Callable[[Any], tuple[str, Methods]]] = {
    "ASPP": _aspp,
    "ASPPHead": _mmseg_head,
    "DepthwiseSeparableASPPHead": _mmseg_separable_head,
    "JPU": _jpu,
}
