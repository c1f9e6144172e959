"""Eval mode of joint pyramid upsampling: batch norms folded, results written into their channels of one tensor."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyseg._ops.atrous_conv2d import as_channels_last
from pyseg.functional.upsample_concat_depthwise import upsample_concat_depthwise
from pyseg.nn._cache import Cached
from pyseg.nn._folded import BlockFusion, Kinds, Layer, is_channels_last, layers_of

# Devices whose kernels are in this installation.
_FUSED_ON = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("pyseg::upsample_concat_depthwise", key)
)


class JPULayers(NamedTuple):
    """The layers of a JPU block."""

    maps: list[Layer]  # of the coarsest, middle and finest map
    depthwise: list[Layer]
    pointwise: list[Layer]


def jpu_layers(block: nn.Module, separable: Kinds | None = None) -> JPULayers | None:
    """The layers of FastFCN's and our own JPU; None for anything else. `separable` as in layers_of."""
    names = ("conv5", "conv4", "conv3", "dilation1", "dilation2", "dilation3", "dilation4")
    parts = [getattr(block, name, None) for name in names]
    found = [layers_of(part, separable=separable) if isinstance(part, nn.Module) else None for part in parts]
    if any(layers is None for layers in found):
        return None
    layers = [each for each in found if each is not None]
    if [len(each) for each in layers] != [1, 1, 1, 2, 2, 2, 2]:
        return None
    maps, depthwise, pointwise = [a for (a,) in layers[:3]], [a for a, _ in layers[3:]], [b for _, b in layers[3:]]
    fits = (
        all(_is_3x3(layer.conv) and layer.conv.groups == 1 for layer in maps)
        and all(_is_3x3(layer.conv) and layer.conv.groups == layer.conv.in_channels for layer in depthwise)
        and all(layer.bn is not None and layer.conv.bias is None and not layer.relu for layer in depthwise)
        and all(layer.conv.out_channels == layer.conv.in_channels for layer in depthwise)
        and all(len(set(layer.conv.dilation)) == 1 for layer in depthwise)
        and all(layer.conv.kernel_size == (1, 1) and layer.conv.stride == (1, 1) for layer in pointwise)
        and all(layer.conv.padding in ((0, 0), "same", "valid") for layer in pointwise)
    )
    return JPULayers(maps, depthwise, pointwise) if fits else None


def _is_3x3(conv: nn.Conv2d) -> bool:
    same_size = conv.padding in (conv.dilation, "same")
    return conv.kernel_size == (3, 3) and conv.stride == (1, 1) and same_size


class JPUFusion(BlockFusion):
    """Runs a JPU block from its layers."""

    def _forget(self) -> None:
        super()._forget()
        self._stacked = Cached()

    def run(
        self, block: nn.Module, layers: JPULayers | None, coarse_last: Sequence[Tensor], align_corners: bool
    ) -> Tensor | None:
        """The upsampled features from three maps; None where the block must run module by module."""
        if layers is None or not self.may_fold(block, coarse_last):
            return None
        finest = coarse_last[0]
        # All kernels work on channels_last: convert the inputs, which are smaller than what is made of them.
        maps = [
            self._layer(f"map {index}")(layer, as_channels_last(x))
            for index, (layer, x) in enumerate(zip(layers.maps, reversed(coarse_last), strict=True))
        ]
        filtered = self._filtered(layers.depthwise, maps, align_corners)
        memory_format = torch.channels_last if is_channels_last(finest) else torch.contiguous_format
        result = self._side_by_side([[layer] for layer in layers.pointwise], filtered, memory_format)
        return result.contiguous(memory_format=memory_format)

    def _filtered(self, layers: list[Layer], maps: list[Tensor], align_corners: bool) -> Iterator[Tensor]:
        """The depthwise layers' results on the maps, interpolated to the last one's size and concatenated."""
        height, width = maps[-1].shape[2:]
        if maps[0].device.type not in _FUSED_ON:
            resized = [
                F.interpolate(m, (height, width), mode="bilinear", align_corners=align_corners) for m in maps[:-1]
            ]
            features = torch.cat([*resized, maps[-1]], 1)
            for index, layer in enumerate(layers):
                yield self._layer(f"depthwise {index}")(layer, features)
            return
        weight, scale, shift = self._filters(layers)
        dilations = [layer.conv.dilation[0] for layer in layers]
        # On the CPU one rate at a time: its result is still in the cache when the product reads it, and fresh memory
        # for all four would cost more time than the filters.
        step = 1 if maps[0].is_cpu else len(layers)
        for start in range(0, len(layers), step):
            part = slice(start, start + step)
            results = upsample_concat_depthwise(
                maps,
                weight[part],
                dilations[part],
                scale=scale[part],
                shift=shift[part],
                size=(height, width),
                align_corners=align_corners,
            )
            for index in range(results.shape[0]):
                yield results[index]
            del results  # its memory is the next one's

    def _filters(self, layers: list[Layer]) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [R, C, 3, 3], scales and shifts [R, C] of all rates."""
        weights = [layer.conv.weight for layer in layers]
        affine = [self._layer(f"depthwise {i}").affine(layer) for i, layer in enumerate(layers)]
        scales = [scale for scale, _ in affine if scale is not None]
        shifts = [shift for _, shift in affine if shift is not None]

        def stacked() -> tuple[Tensor, ...]:
            return torch.stack(weights)[:, :, 0], torch.stack(scales), torch.stack(shifts)

        cache = self._stacked if self._keeps else Cached()
        result: tuple[Tensor, Tensor, Tensor] = cache.get((*weights, *scales, *shifts), None, stacked)
        return result
