"""mmsegmentation's heads with mmcv's convolutions, which are not installed here: by their names, structure and keys."""

import torch
import torch.nn.functional as F
from torch import nn


class ConvModule(nn.Module):
    """mmcv: convolution, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel_size, padding=0, dilation=1, groups=1):
        super().__init__()
        self.with_norm = self.with_activation = True
        self.with_explicit_padding = self.with_spectral_norm = False
        self.order = ("conv", "norm", "act")
        self.conv = nn.Conv2d(c_in, c_out, kernel_size, padding=padding, dilation=dilation, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return self.bn

    def forward(self, x):
        return self.activate(self.norm(self.conv(x)))


class DepthwiseSeparableConvModule(nn.Module):
    """mmcv: a ConvModule each, depthwise and pointwise."""

    def __init__(self, c_in, c_out, padding=1, dilation=1):
        super().__init__()
        self.depthwise_conv = ConvModule(c_in, c_in, 3, padding, dilation, groups=c_in)
        self.pointwise_conv = ConvModule(c_in, c_out, 1)

    def forward(self, x):
        return self.pointwise_conv(self.depthwise_conv(x))


class ASPPModule(nn.ModuleList):
    """mmsegmentation: the branches."""

    def __init__(self, dilations, c_in, channels, separable):
        super().__init__()
        for rate in dilations:
            if rate == 1:
                self.append(ConvModule(c_in, channels, 1))
            elif separable:
                self.append(DepthwiseSeparableConvModule(c_in, channels, rate, rate))
            else:
                self.append(ConvModule(c_in, channels, 3, rate, rate))

    def forward(self, x):
        return [branch(x) for branch in self]


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class _Head(nn.Module):
    """mmsegmentation: what its two heads have in common."""

    separable = False

    def __init__(self, c_in, channels, classes, dilations=(1, 12, 24, 36)):
        super().__init__()
        self.align_corners = False
        self.in_index = -1
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(c_in, channels, 1))
        self.aspp_modules = ASPPModule(dilations, c_in, channels, self.separable)
        joined = (len(dilations) + 1) * channels
        separable = DepthwiseSeparableConvModule
        self.bottleneck = separable(joined, channels) if self.separable else ConvModule(joined, channels, 3, 1)

    def _transform_inputs(self, inputs):
        return inputs[self.in_index]

    def cls_seg(self, feat):
        return self.conv_seg(self.dropout(feat))


class ASPPHead(_Head):
    """mmsegmentation: DeepLab v3's head, down to the classes."""

    def _forward_feature(self, inputs):
        x = self._transform_inputs(inputs)
        outs = [resize(self.image_pool(x), x.shape[2:]), *self.aspp_modules(x)]
        return self.bottleneck(torch.cat(outs, 1))

    def forward(self, inputs):
        return self.cls_seg(self._forward_feature(inputs))


class OldASPPHead(_Head):
    """mmsegmentation before 0.27: ASPPHead, with the features as a part of forward."""

    def forward(self, inputs):
        x = self._transform_inputs(inputs)
        outs = [resize(self.image_pool(x), x.shape[2:]), *self.aspp_modules(x)]
        return self.cls_seg(self.bottleneck(torch.cat(outs, 1)))


OldASPPHead.__name__ = "ASPPHead"  # by which accelerate knows it


class DepthwiseSeparableASPPHead(ASPPHead):
    """mmsegmentation: DepthwiseSeparableASPPHead, DeepLab v3+'s."""

    separable = True

    def __init__(self, c_in, channels, classes, dilations=(1, 12, 24, 36), c1_in_channels=0, c1_channels=0):
        super().__init__(c_in, channels, classes, dilations)
        self.c1_bottleneck = ConvModule(c1_in_channels, c1_channels, 1) if c1_in_channels else None
        self.sep_bottleneck = nn.Sequential(
            DepthwiseSeparableConvModule(channels + c1_channels, channels),
            DepthwiseSeparableConvModule(channels, channels),
        )

    def forward(self, inputs):
        x = self._transform_inputs(inputs)
        outs = [resize(self.image_pool(x), x.shape[2:])]
        outs.extend(self.aspp_modules(x))
        output = self.bottleneck(torch.cat(outs, 1))
        if self.c1_bottleneck is not None:
            fine = self.c1_bottleneck(inputs[0])
            output = torch.cat([resize(output, fine.shape[2:]), fine], 1)
        return self.cls_seg(self.sep_bottleneck(output))
