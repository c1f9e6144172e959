"""Hierarchical segmentation: one network finds objects, a second one, told where they are, what is in them.

Eppel 2017 (1710.05126): a network separates vessels from the background; their region is the second network's further
input, which classifies the contents. The region enters through valve filters in the first layer (1708.08711). The two
are trained apart, each on what it is to find, and joined without more training. The papers use FCN-8s on VGG-16; here
both are small U-Nets (Ronneberger et al. 2015, 1505.04597) on pyseg's convolutions and upsampling.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from pyseg.functional import upsample_concat
from pyseg.nn import AtrousConv2d, ValveConv2d

RegionInput = Literal["valve", "valve_add", "concat", "mask", "none"]


class RegionUNet(nn.Module):
    """A U-Net that is told a region of the image.

    Args:
        classes: of the logits.
        region: how the region comes in. "valve": a first layer with valve filters, multiplied; "valve_add": added
            (1812.00291); "concat": one more channel of the image; "mask": the image is blackened outside; "none": not
            at all.
        width: channels at full resolution; they double from level to level.
        levels: resolutions, each half of the one before.
        in_channels: of the image.

    forward(image [N, in_channels, H, W], region [N, 1, H, W] or None for "none") -> logits [N, classes, H, W]. Any H
    and W of at least 2^(levels - 1). `first` is the layer that takes the region.
    """

    def __init__(
        self, classes: int, region: RegionInput = "valve", width: int = 16, levels: int = 3, in_channels: int = 3
    ) -> None:
        super().__init__()
        if region not in ("valve", "valve_add", "concat", "mask", "none"):
            raise ValueError(f"RegionUNet: region must be valve, valve_add, concat, mask or none, got {region!r}")
        if classes < 1 or width < 1 or levels < 1:
            raise ValueError(f"RegionUNet: classes, width, levels must be positive, got {classes}, {width}, {levels}")
        self.region: RegionInput = region
        self.valves = region.startswith("valve")
        if self.valves:
            combine: Literal["multiply", "add"] = "add" if region == "valve_add" else "multiply"
            self.first: nn.Module = ValveConv2d(in_channels, width, 3, padding=1, combine=combine, relu=True)
        else:
            self.first = _block(in_channels + (region == "concat"), width, norm=False)
        widths = [width << level for level in range(levels)]
        self.encoder = nn.ModuleList([_block(widths[max(0, i - 1)], widths[i]) for i in range(levels)])
        self.decoder = nn.ModuleList([_block(widths[i] + widths[i + 1], widths[i]) for i in range(levels - 1)])
        self.pool = nn.MaxPool2d(2)
        self.head = AtrousConv2d(width, classes, 1)

    def forward(self, image: Tensor, region: Tensor | None = None) -> Tensor:
        if self.region == "none":
            x = self.first(image)
        else:
            if region is None:
                raise ValueError(f"RegionUNet: region must be given for region={self.region!r}, got None")
            region = region.to(image.dtype)
            if self.valves:
                x = self.first(image, region)
            elif self.region == "concat":
                x = self.first(torch.cat([image, region], 1))
            else:
                x = self.first(image * region)
        maps = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            maps.append(x)
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](upsample_concat([maps[level], x], align_corners=False))
        logits: Tensor = self.head(x)
        return logits


class HierarchicalSegmenter(nn.Module):
    """Objects, and what is in them.

    Args:
        objects: network from an image to logits [N, 2, H, W] of background and object, such as
            RegionUNet(2, "none").
        contents: network from an image and a region [N, 1, H, W] to logits [N, classes, H, W], class 0 being the
            background, such as RegionUNet(classes, "valve").

    forward(image, region=None) -> (object logits, contents logits), the region by default what `objects` finds.
    `predict` gives labels.
    """

    def __init__(self, objects: nn.Module, contents: nn.Module) -> None:
        super().__init__()
        self.objects = objects
        self.contents = contents

    def forward(self, image: Tensor, region: Tensor | None = None) -> tuple[Tensor, Tensor]:
        of_objects = self.objects(image)
        if region is None:
            region = (of_objects[:, 1:2] > of_objects[:, :1]).to(image.dtype)
        return of_objects, self.contents(image, region)

    @torch.no_grad()
    def predict(self, image: Tensor, region: Tensor | None = None) -> Tensor:
        """Labels [N, H, W]: the contents' inside of the region, 0 outside."""
        of_objects, of_contents = self(image, region)
        inside = of_objects.argmax(1) if region is None else region[:, 0] > 0
        return of_contents.argmax(1) * inside


def _block(in_channels: int, out_channels: int, norm: bool = True) -> nn.Sequential:
    """3x3 convolution, batch norm and ReLU."""
    conv = AtrousConv2d(in_channels, out_channels, 3, padding=1, bias=not norm)
    return nn.Sequential(conv, *([nn.BatchNorm2d(out_channels)] if norm else []), nn.ReLU())
