"""Joint pyramid upsampling: what dilated backbones compute, from the maps of an ordinary one."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyseg.nn._folded import FusedBlock
from pyseg.nn._jpu_fusion import JPUFusion, jpu_layers
from pyseg.nn.atrous_conv2d import AtrousConv2d


class SeparableConv2d(nn.Module):
    """Depthwise 3x3 at a rate, norm, 1x1: under FastFCN's names."""

    def __init__(
        self, in_channels: int, out_channels: int, rate: int, norm_layer: Callable[[int], nn.Module], exact: bool
    ) -> None:
        super().__init__()
        self.conv1 = AtrousConv2d(
            in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False, exact=exact
        )
        self.bn = norm_layer(in_channels)
        self.pointwise = AtrousConv2d(in_channels, out_channels, 1, bias=False, exact=exact)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.pointwise(self.bn(self.conv1(x)))
        return result


class JPU(FusedBlock):
    r"""Joint pyramid upsampling (FastFCN, Wu et al. 2019, 1903.11816, section 3.3).

        f_l = relu(bn(w_l * x_l)), 3x3, for the last three maps     f = [up(f_5), up(f_4), f_3]
        y = [relu(bn(p_d * bn(s_d *_d f))) for d in (1, 2, 4, 8)], s_d depthwise 3x3 at rate d, p_d 1x1

    where up is bilinear upsampling to the size of f_3 and the brackets concatenate. Submodules have FastFCN's names, so
    its checkpoints load (`pyseg.nn.checkpoints`).

    In eval mode without gradients all batch norms are folded and the four results are written into their channels of
    one tensor. In all other cases (training, gradients, hooks on submodules, a replaced `forward` of one, torch.fx,
    torch.jit and torch.func) the submodules run one by one.

    What is computed from the parameters is kept as by AtrousConv2d and forgotten as there: `clear_cache`.

    Args:
        in_channels: channels of the backbone's maps; the last three count.
        width: channels between, and of each of the four results.
        norm_layer: makes a norm from a number of channels. Only nn.BatchNorm2d and nn.SyncBatchNorm are folded.
        align_corners: of the upsampling, as in torch.nn.functional.interpolate.
        exact: as in pyseg.functional.atrous_conv2d.

    Takes the maps as arguments, finest first (of a ResNet: 4 of strides 4, 8, 16 and 32), at least three. Returns the
    first three as they are, and [N, 4 * width, H, W] at the resolution of the third last, channels_last if that one is:
    with four maps what FastFCN's module returns. dtypes, determinism and errors are those of
    pyseg.functional.atrous_conv2d.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        width: int = 512,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        align_corners: bool = True,
        *,
        exact: bool = False,
    ) -> None:
        super().__init__()
        if len(in_channels) < 3:
            raise ValueError(f"JPU: in_channels must be at least three, got {list(in_channels)}")
        self.align_corners = align_corners

        def conv(channels: int) -> nn.Sequential:
            first = AtrousConv2d(channels, width, 3, padding=1, bias=False, exact=exact)
            return nn.Sequential(first, norm_layer(width), nn.ReLU())

        def dilation(rate: int) -> nn.Sequential:
            first = SeparableConv2d(3 * width, width, rate, norm_layer, exact)
            return nn.Sequential(first, norm_layer(width), nn.ReLU())

        self.conv5, self.conv4, self.conv3 = conv(in_channels[-1]), conv(in_channels[-2]), conv(in_channels[-3])
        self.dilation1, self.dilation2, self.dilation3, self.dilation4 = map(dilation, (1, 2, 4, 8))
        self._pyseg_fusion: JPUFusion = JPUFusion(exact)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if isinstance(inputs, tuple) and len(inputs) < 3:  # torch.fx has a stand-in for all of them
            raise ValueError(f"JPU: inputs must be at least three maps, got {len(inputs)}")
        x3, x4, x5 = inputs[-3], inputs[-2], inputs[-1]
        result = self._pyseg_fusion.run(self, jpu_layers(self, (SeparableConv2d,)), (x3, x4, x5), self.align_corners)
        if result is None:
            result = self._by_modules(x3, x4, x5)
        return inputs[0], inputs[1], inputs[2], result

    def _by_modules(self, x3: Tensor, x4: Tensor, x5: Tensor) -> Tensor:
        f3 = self.conv3(x3)
        size, corners = f3.shape[2:], self.align_corners
        coarse = (self.conv5(x5), self.conv4(x4))
        maps = [F.interpolate(f, size, mode="bilinear", align_corners=corners) for f in coarse]
        features = torch.cat([*maps, f3], 1)
        dilations = (self.dilation1, self.dilation2, self.dilation3, self.dilation4)
        return torch.cat([dilation(features) for dilation in dilations], 1)
