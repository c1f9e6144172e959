"""Eval mode of atrous spatial pyramid pooling: no concatenation, no broadcast of the pooled branch.

The branches write straight into their channels of one tensor. The image-pooling branch is constant over the map: what
the projection makes of it is a constant, too, which becomes part of the projection's shift, for each image its own. (A
3x3 projection sees zeros outside the map, so there the constant has nine values: corners, edges and the inside.)
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyseg._ops.atrous_conv2d import as_channels_last
from pyseg.nn._folded import BlockFusion, Kinds, Layer, is_channels_last, layers_of


class ASPPLayers(NamedTuple):
    """The layers of an ASPP block. The concatenation has the pooled branch first or last."""

    branches: list[list[Layer]]
    pool: list[Layer] | None
    pool_first: bool
    project: list[Layer]


def aspp_layers(block: nn.Module, pooling: type[nn.Module] | None = None) -> ASPPLayers | None:
    """The layers of torchvision's, segmentation-models-pytorch's and our own ASPP; None for anything else.

    `pooling` is the class of the pooled branch in ours, which is made of nothing but torch's modules otherwise. None:
    another library's block, told by names and structure, so that the result needs a check by numbers.
    """
    convs, project = (getattr(block, name, None) for name in ("convs", "project"))
    separable = None if pooling is None else ()
    if not isinstance(convs, nn.ModuleList) or len(convs) == 0 or not isinstance(project, nn.Sequential):
        return None
    *branches, last = convs
    if not is_image_pool(last) or (pooling is not None and type(last) is not pooling):
        return _checked([*branches, last], None, False, project, separable)
    return _checked(branches, last, False, project, separable)


def mmseg_layers(head: nn.Module) -> ASPPLayers | None:
    """The layers of mmsegmentation's ASPPHead and DepthwiseSeparableASPPHead; None for anything else."""
    parts = [getattr(head, name, None) for name in ("aspp_modules", "image_pool", "bottleneck")]
    branches, pool, bottleneck = parts
    if not isinstance(branches, nn.ModuleList) or not is_image_pool(pool) or not isinstance(bottleneck, nn.Module):
        return None
    return _checked(list(branches), pool, True, bottleneck)


def is_image_pool(module: object) -> bool:
    """Whether it begins with the mean over the map."""
    if not isinstance(module, nn.Sequential) or len(module) == 0:
        return False
    pool = module[0]
    return type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))


def _checked(
    branches: list[nn.Module],
    pool: nn.Module | None,
    pool_first: bool,
    project: nn.Module,
    separable: Kinds | None = None,
) -> ASPPLayers | None:
    found = [layers_of(branch, separable=separable) for branch in branches]
    pooled = None if pool is None else layers_of(*list(pool.children())[1:], separable=separable)
    projected = layers_of(project, separable=separable)
    if projected is None or (pool is not None and pooled is None) or not found:
        return None
    layers = ASPPLayers([branch for branch in found if branch is not None], pooled, pool_first, projected)
    widths = [branch[-1].conv.out_channels for branch in [*layers.branches, *([pooled] if pooled else [])]]
    same_size = all(_keeps_size(layer.conv) for branch in layers.branches for layer in branch)
    *first, last = projected
    projects = (
        last.conv.groups == 1
        and _keeps_size(last.conv)
        and all(_is_depthwise(layer.conv) and _keeps_size(layer.conv) for layer in first)
        and [layer.conv.kernel_size for layer in projected].count((3, 3)) <= 1
        and all(layer.conv.dilation == (1, 1) for layer in projected)
        and projected[0].conv.in_channels == sum(widths)
    )
    return layers if len(layers.branches) == len(found) and same_size and projects else None


def _keeps_size(conv: nn.Conv2d) -> bool:
    if conv.kernel_size == (1, 1):
        return conv.stride == (1, 1) and conv.padding in ((0, 0), "same", "valid")
    return conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding in (conv.dilation, "same")


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels


class ASPPFusion(BlockFusion):
    """Runs an ASPP block from its layers."""

    def run(self, block: nn.Module, layers: ASPPLayers | None, x: Tensor) -> Tensor | None:
        """The block's result; None where it must run module by module."""
        if layers is None or not self.may_fold(block, [x]):
            return None
        return self.compute(layers, x)

    def compute(self, layers: ASPPLayers, x: Tensor) -> Tensor | None:
        """What `run` does after may_fold."""
        three = any(layer.conv.kernel_size == (3, 3) for layer in layers.project)
        if layers.pool is not None and three and min(x.shape[2:]) < 3:
            return None
        memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        # All kernels work on channels_last: convert once, not for each branch.
        x = as_channels_last(x)
        features = self._side_by_side(layers.branches, itertools.repeat(x))
        constant = None if layers.pool is None else self._constant(layers, x, features.shape[1])
        return self._project(layers, features, constant, memory_format)

    def _constant(self, layers: ASPPLayers, x: Tensor, width: int) -> Tensor:
        """What the pooled branch adds to the projection: [N, C, 1, 1], or for a 3x3 projection [N, C, 3, 3]."""
        assert layers.pool is not None
        pooled = x.mean((2, 3), keepdim=True)
        for depth, layer in enumerate(layers.pool):
            pooled = self._layer(f"pool {depth}")(layer, pooled)
        side = max(layer.conv.kernel_size[0] for layer in layers.project)
        pooled = pooled.expand(-1, -1, side, side)
        start = 0 if layers.pool_first else width
        channels = slice(start, start + pooled.shape[1])
        *first, last = layers.project
        for depth, layer in enumerate(first):
            pooled = self._layer(f"pooled projection {depth}", channels)(layer, pooled)
        return self._layer("pooled projection", channels)(last, pooled, linear=True)

    def _project(
        self, layers: ASPPLayers, features: Tensor, constant: Tensor | None, memory_format: torch.memory_format
    ) -> Tensor:
        channels = None
        if constant is not None:
            pool_width = layers.pool[-1].conv.out_channels if layers.pool else 0
            start = pool_width if layers.pool_first else 0
            channels = slice(start, start + features.shape[1])
        *first, last = layers.project
        for depth, layer in enumerate(first):
            features = self._layer(f"projection {depth}", channels)(layer, features)
        run = self._layer("projection", channels)
        if constant is None:
            return run(last, features).contiguous(memory_format=memory_format)
        if constant.shape[2] == 1 and features.is_cpu and not torch.compiler.is_compiling():
            shape = (features.shape[0], last.conv.out_channels, *features.shape[2:])
            result = torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=memory_format)
            for image in range(features.shape[0]):
                part = slice(image, image + 1)
                run(last, features[part], extra_shift=constant[image, :, 0, 0], out=result[part])
            return result
        result = run(last, features, relu=False) + _spread(constant, features.shape[2], features.shape[3])
        return (result.relu_() if last.relu else result).contiguous(memory_format=memory_format)


def _spread(constant: Tensor, height: int, width: int) -> Tensor:
    """The nine values of corners, edges and inside, over the map."""
    if constant.shape[2] == 1:
        return constant

    def nearest(size: int) -> Tensor:
        position = torch.ones(size, dtype=torch.int64, device=constant.device)
        position[0], position[-1] = 0, 2
        return position

    return constant[:, :, nearest(height)[:, None], nearest(width)[None]]
