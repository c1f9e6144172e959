"""Joint pyramid upsampling as FastFCN's authors have it: in torch's modules, under their names."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeparableConv2d(nn.Module):
    """Depthwise 3x3 at a rate, batch norm, 1x1."""

    def __init__(self, in_channels: int, out_channels: int, rate: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 1, rate, rate, groups=in_channels, bias=False)
        self.bn = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.pointwise(self.bn(self.conv1(x)))
        return result


class JPU(nn.Module):
    """Wu et al. 2019 (1903.11816), section 3.3; parameters, state_dict and results of FastFCN's JPU."""

    def __init__(self, in_channels: Sequence[int], width: int = 512) -> None:
        super().__init__()
        self.up_kwargs: dict[str, Any] = {"mode": "bilinear", "align_corners": True}
        for name, channels in zip(("conv5", "conv4", "conv3"), reversed(in_channels[-3:]), strict=True):
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
        for index, rate in enumerate((1, 2, 4, 8), start=1):
            separable = SeparableConv2d(3 * width, width, rate)
            self.add_module(f"dilation{index}", nn.Sequential(separable, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        conv5, conv4, conv3 = (self.get_submodule(name) for name in ("conv5", "conv4", "conv3"))
        x5, x4, x3 = conv5(inputs[-1]), conv4(inputs[-2]), conv3(inputs[-3])
        x5, x4 = (F.interpolate(x, x3.shape[2:], **self.up_kwargs) for x in (x5, x4))
        features = torch.cat([x5, x4, x3], 1)
        results = [self.get_submodule(f"dilation{index}")(features) for index in range(1, 5)]
        return inputs[0], inputs[1], inputs[2], torch.cat(results, 1)
