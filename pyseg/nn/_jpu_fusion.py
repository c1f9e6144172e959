"""Eval mode of joint pyramid upsampling: batch norms folded, results written into their channels of one tensor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyseg.nn._folded import BlockFusion, Layer, is_channels_last, layers_of


class JPULayers(NamedTuple):
    """The layers of a JPU block."""

    maps: list[Layer]  # of the coarsest, middle and finest map
    depthwise: list[Layer]
    pointwise: list[Layer]


def jpu_layers(block: nn.Module) -> JPULayers | None:
    """The layers of FastFCN's and our own JPU; None for anything else."""
    names = ("conv5", "conv4", "conv3", "dilation1", "dilation2", "dilation3", "dilation4")
    parts = [getattr(block, name, None) for name in names]
    found = [layers_of(part) if isinstance(part, nn.Module) else None for part in parts]
    if any(layers is None for layers in found):
        return None
    layers = [each for each in found if each is not None]
    if [len(each) for each in layers] != [1, 1, 1, 2, 2, 2, 2]:
        return None
    maps, depthwise, pointwise = [a for (a,) in layers[:3]], [a for a, _ in layers[3:]], [b for _, b in layers[3:]]
    fits = (
        all(_is_3x3(layer.conv) and layer.conv.groups == 1 for layer in maps)
        and all(_is_3x3(layer.conv) and layer.conv.groups == layer.conv.in_channels for layer in depthwise)
        and all(layer.conv.kernel_size == (1, 1) and layer.conv.stride == (1, 1) for layer in pointwise)
        and all(layer.conv.padding in ((0, 0), "same", "valid") for layer in pointwise)
    )
    return JPULayers(maps, depthwise, pointwise) if fits else None


def _is_3x3(conv: nn.Conv2d) -> bool:
    same_size = conv.padding in (conv.dilation, "same")
    return conv.kernel_size == (3, 3) and conv.stride == (1, 1) and same_size


class JPUFusion(BlockFusion):
    """Runs a JPU block from its layers."""

    def run(
        self, block: nn.Module, layers: JPULayers | None, inputs: Sequence[Tensor], align_corners: bool
    ) -> Tensor | None:
        """The upsampled features, from the last three inputs; None where the block must run module by module."""
        finest, *_ = coarse_last = inputs[-3:]
        if layers is None or not self._may_fold(block, *coarse_last):
            return None
        # All kernels work on channels_last: convert the inputs, which are smaller than what is made of them.
        maps = [
            self._layer(f"map {index}")(layer, x.contiguous(memory_format=torch.channels_last))
            for index, (layer, x) in enumerate(zip(layers.maps, reversed(coarse_last), strict=True))
        ]
        size = maps[-1].shape[2:]
        maps[:-1] = [F.interpolate(m, size, mode="bilinear", align_corners=align_corners) for m in maps[:-1]]
        features = torch.cat(maps, 1)
        filtered = [self._layer(f"depthwise {i}")(layer, features) for i, layer in enumerate(layers.depthwise)]
        result = self._side_by_side([([layer], x) for layer, x in zip(layers.pointwise, filtered, strict=True)])
        return result if is_channels_last(finest) else result.contiguous()
