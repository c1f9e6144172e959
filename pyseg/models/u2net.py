"""U2-Net, a nest of small U-Nets for salient object detection.

Qin, Zhang, Huang, Dehghan, Zaiane and Jagersand, "U2-Net: Going deeper with nested U-structure for salient object
detection", Pattern Recognition 2020. Module names follow the authors' checkpoints, so these load as they are.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _ConvNormReLU(nn.Module):
    """3x3 convolution at a dilation, batch norm, ReLU; without the norm where it is folded into the weights."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv_s1 = nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()
        self.relu_s1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu_s1(self.bn_s1(self.conv_s1(x)))


def _upsample_like(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class RSU(nn.Module):
    """Residual U-block of `height` levels (figure 2c): a U-Net of its own, added to its input features.

    With `dilated` it is RSU-4F, which widens the view by dilation instead of by pooling and keeps the resolution.
    """

    def __init__(
        self, height: int, in_channels: int, mid_channels: int, out_channels: int, dilated: bool, batch_norm: bool
    ) -> None:
        super().__init__()
        self.height = height
        self.dilated = dilated
        # Level i runs at rate 2^(i-1) when dilated; otherwise only the bottom level is dilated.
        rates = [2**i for i in range(height)] if dilated else [1] * (height - 1) + [2]
        self.rebnconvin = _ConvNormReLU(in_channels, out_channels, 1, batch_norm)
        for i, rate in enumerate(rates, start=1):
            channels = out_channels if i == 1 else mid_channels
            self.add_module(f"rebnconv{i}", _ConvNormReLU(channels, mid_channels, rate, batch_norm))
        for i in range(height - 1, 0, -1):
            channels = out_channels if i == 1 else mid_channels
            self.add_module(f"rebnconv{i}d", _ConvNormReLU(2 * mid_channels, channels, rates[i - 1], batch_norm))
        # ceil_mode keeps maps of odd size whole; _upsample_like undoes it.
        self.pool = nn.Identity() if dilated else nn.MaxPool2d(2, stride=2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        entry = self.rebnconvin(x)
        skips = [self.get_submodule("rebnconv1")(entry)]
        for i in range(2, self.height):
            skips.append(self.get_submodule(f"rebnconv{i}")(self.pool(skips[-1])))
        x = self.get_submodule(f"rebnconv{self.height}")(skips[-1])
        for i in range(self.height - 1, 0, -1):
            skip = skips.pop()
            if not self.dilated and i < self.height - 1:
                x = _upsample_like(x, skip)
            x = self.get_submodule(f"rebnconv{i}d")(torch.cat([x, skip], 1))
        return x + entry


class _Stage(NamedTuple):
    """One stage of the outer U: the arguments of its RSU."""

    height: int
    in_channels: int
    mid_channels: int
    out_channels: int
    dilated: bool = False


class U2Net(nn.Module):
    """U2-Net (section 3.2): an outer U-Net of six encoder and five decoder stages, each of them an RSU.

    Args:
        encoder: six stages, full resolution first.
        decoder: five stages, lowest resolution first. Each sees the stage below, upsampled, beside its skip.
        classes: channels of each prediction.
        batch_norm: False leaves the batch norms out, for weights that have them folded in.

    Input: [N, encoder[0].in_channels, H, W], any H and W. Output: 7 tensors [N, classes, H, W] of probabilities: the
    fused prediction, then the side outputs of the decoder stages (full resolution first) and of the bottom stage.
    """

    def __init__(
        self, encoder: Sequence[_Stage], decoder: Sequence[_Stage], classes: int = 1, batch_norm: bool = True
    ) -> None:
        super().__init__()
        for i, stage in enumerate(encoder, start=1):
            self.add_module(f"stage{i}", RSU(*stage, batch_norm=batch_norm))
        for i, stage in zip(range(len(decoder), 0, -1), decoder, strict=True):
            self.add_module(f"stage{i}d", RSU(*stage, batch_norm=batch_norm))
        self.levels = len(encoder)
        predicted = [stage.out_channels for stage in (*reversed(decoder), encoder[-1])]
        for i, channels in enumerate(predicted, start=1):
            self.add_module(f"side{i}", nn.Conv2d(channels, classes, 3, padding=1))
        self.outconv = nn.Conv2d(self.levels * classes, classes, 1)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        skips = [self.get_submodule("stage1")(x)]
        for i in range(2, self.levels + 1):
            skips.append(self.get_submodule(f"stage{i}")(self.pool(skips[-1])))
        features = [skips.pop()]  # of the decoder, lowest resolution first
        for i in range(self.levels - 1, 0, -1):
            skip = skips.pop()
            merged = torch.cat([_upsample_like(features[-1], skip), skip], 1)
            features.append(self.get_submodule(f"stage{i}d")(merged))
        sides = [self.get_submodule(f"side{i}")(f) for i, f in enumerate(reversed(features), start=1)]
        sides = sides[:1] + [_upsample_like(side, sides[0]) for side in sides[1:]]
        fused = self.outconv(torch.cat(sides, 1))
        return tuple(torch.sigmoid(logits) for logits in (fused, *sides))


def u2net(in_channels: int = 3, classes: int = 1, batch_norm: bool = True) -> U2Net:
    """The full U2-Net of table 1: 44 million parameters."""
    encoder = [
        _Stage(7, in_channels, 32, 64),
        _Stage(6, 64, 32, 128),
        _Stage(5, 128, 64, 256),
        _Stage(4, 256, 128, 512),
        _Stage(4, 512, 256, 512, dilated=True),
        _Stage(4, 512, 256, 512, dilated=True),
    ]
    decoder = [
        _Stage(4, 1024, 256, 512, dilated=True),
        _Stage(4, 1024, 128, 256),
        _Stage(5, 512, 64, 128),
        _Stage(6, 256, 32, 64),
        _Stage(7, 128, 16, 64),
    ]
    return U2Net(encoder, decoder, classes, batch_norm)


def u2netp(in_channels: int = 3, classes: int = 1, batch_norm: bool = True) -> U2Net:
    """The small one, U2-Net-p ("U2-Net with a dagger" in the paper): 1.1 million parameters."""
    encoder = [
        _Stage(7, in_channels, 16, 64),
        _Stage(6, 64, 16, 64),
        _Stage(5, 64, 16, 64),
        _Stage(4, 64, 16, 64),
        _Stage(4, 64, 16, 64, dilated=True),
        _Stage(4, 64, 16, 64, dilated=True),
    ]
    decoder = [
        _Stage(4, 128, 16, 64, dilated=True),
        _Stage(4, 128, 16, 64),
        _Stage(5, 128, 16, 64),
        _Stage(6, 128, 16, 64),
        _Stage(7, 128, 16, 64),
    ]
    return U2Net(encoder, decoder, classes, batch_norm)


def load_u2net_onnx(model: U2Net, path: str | os.PathLike[str]) -> U2Net:
    """Fills `model` (built with `batch_norm=False`) with the weights of a U2-Net that was exported to ONNX.

    The exporter folds the batch norms and drops most names, but keeps the order in which the convolutions run, and
    that is the order in which this file defines them. Needs the package onnx.

    Raises:
        ValueError: the file's convolutions are not those of `model`.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if len(nodes) != len(convs):
        raise ValueError(f"load_u2net_onnx: {path} has {len(nodes)} convolutions, the model has {len(convs)}")
    state = {}
    for node, (name, conv) in zip(nodes, convs.items(), strict=True):
        weight, bias = (numpy_helper.to_array(arrays[key]) for key in node.input[1:3])
        if weight.shape != tuple(conv.weight.shape):
            raise ValueError(
                f"load_u2net_onnx: {name}.weight must be {list(conv.weight.shape)}, "
                f"{node.name} of {path} has {list(weight.shape)}"
            )
        state[f"{name}.weight"] = torch.from_numpy(weight.copy())
        state[f"{name}.bias"] = torch.from_numpy(bias.copy())
    model.load_state_dict(state)
    return model
