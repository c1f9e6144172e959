"""Atrous spatial pyramid pooling: convolutions at several rates side by side, with the mean over the image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyseg.nn._aspp_fusion import ASPPFusion, aspp_layers
from pyseg.nn._folded import FusedBlock
from pyseg.nn.atrous_conv2d import AtrousConv2d


class ASPP(FusedBlock):
    r"""Atrous spatial pyramid pooling of DeepLab v3 (Chen et al. 2017, 1706.05587) and v3+ (1802.02611).

        y = dropout(relu(bn(project * [b_0, b_1, ..., b_R, pool])))
        b_0 = relu(bn(w_0 * x)), 1x1     b_r = relu(bn(w_r *_{d_r} x)), 3x3 at rate d_r     pool = relu(bn(w_p mean(x)))

    The state_dict is that of torchvision.models.segmentation.deeplabv3.ASPP and of segmentation-models-pytorch's ASPP;
    other libraries' checkpoints come in by `pyseg.nn.checkpoints`.

    In eval mode without gradients the batch norms are folded into the convolutions, the branches write into their
    channels of one tensor, the input changes its layout once, and the pooled branch becomes part of the projection's
    shift: it is never broadcast. In all other cases (training, gradients, hooks on submodules, a replaced `forward` of
    one, torch.fx, torch.jit and torch.func) the submodules run one by one, as in torch.

    What is computed from the parameters is kept as by AtrousConv2d and forgotten as there: `clear_cache`.

    Args:
        in_channels: channels of the input.
        atrous_rates: dilations of the 3x3 branches, any number.
        out_channels: of each branch, and of the result.
        separable: 3x3 branches are a depthwise 3x3 and a 1x1 convolution, as in segmentation-models-pytorch.
        separable_norm: with a batch norm and ReLU between the two, as in the authors' code and mmsegmentation.
        project_kernel_size: 1, or 3 as in mmsegmentation; then separable if the branches are.
        image_pooling: whether there is the pooled branch.
        dropout: probability, behind the projection.
        norm_layer: makes a norm from a number of channels. Only nn.BatchNorm2d and nn.SyncBatchNorm are folded.
        exact: as in pyseg.functional.atrous_conv2d.

    Input [N, in_channels, H, W], result [N, out_channels, H, W]. As a whole the block returns channels_last where
    the input is, and submodules that run one by one where the input or their weights are. dtypes, determinism and
    errors are those of pyseg.functional.atrous_conv2d.

    Raises:
        ValueError: project_kernel_size is neither 1 nor 3, or separable_norm without separable.
    """

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[int],
        out_channels: int = 256,
        *,
        separable: bool = False,
        separable_norm: bool = False,
        project_kernel_size: int = 1,
        image_pooling: bool = True,
        dropout: float = 0.5,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        exact: bool = False,
    ) -> None:
        super().__init__()
        if project_kernel_size not in (1, 3):
            raise ValueError(f"ASPP: project_kernel_size must be 1 or 3, got {project_kernel_size}")
        if separable_norm and not separable:
            raise ValueError("ASPP: separable_norm must be False where separable is, got True")

        def conv(c_in: int, c_out: int, kernel_size: int, rate: int = 1) -> nn.Module:
            if kernel_size == 1:
                return AtrousConv2d(c_in, c_out, 1, bias=False, exact=exact)
            c_first, groups = (c_in, c_in) if separable else (c_out, 1)
            first = AtrousConv2d(c_in, c_first, 3, padding=rate, dilation=rate, groups=groups, bias=False, exact=exact)
            if not separable:
                return first
            norm = [norm_layer(c_in), nn.ReLU()] if separable_norm else []
            return nn.Sequential(first, *norm, AtrousConv2d(c_in, c_out, 1, bias=False, exact=exact))

        def block(*first: nn.Module) -> list[nn.Module]:
            return [*first, norm_layer(out_channels), nn.ReLU()]

        branches: list[nn.Module] = [nn.Sequential(*block(conv(in_channels, out_channels, 1)))]
        branches += [nn.Sequential(*block(conv(in_channels, out_channels, 3, rate))) for rate in atrous_rates]
        if image_pooling:
            branches.append(ImagePooling(*block(nn.AdaptiveAvgPool2d(1), conv(in_channels, out_channels, 1))))
        self.convs = nn.ModuleList(branches)
        projection = conv(len(branches) * out_channels, out_channels, project_kernel_size)
        self.project = nn.Sequential(*block(projection), nn.Dropout(dropout))
        self._pyseg_fusion: ASPPFusion = ASPPFusion(exact)

    def forward(self, x: Tensor) -> Tensor:
        result = self._pyseg_fusion.run(self, aspp_layers(self, ImagePooling), x)
        if result is None:
            result = self.project(torch.cat([branch(x) for branch in self.convs], 1))
        return result


class ImagePooling(nn.Sequential):
    """The mean over the map, what the layers make of it, and that at every pixel."""

    def forward(self, input: Tensor) -> Tensor:
        pooled: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return pooled.expand(-1, -1, input.shape[2], input.shape[3])


class ASPPSum(nn.Module):
    r"""Atrous spatial pyramid pooling of DeepLab v2 (Chen et al. 2016, 1606.00915, section 3.2): a sum of branches.

        y = sum_r (w_r *_{d_r} x + bias_r), 3x3 at rate d_r

    The last layer of the network: `out_channels` are the classes. Weights are drawn with a standard deviation of 0.01
    and biases are zero, as in the authors' training.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result, the number of classes.
        atrous_rates: dilations of the branches.
        exact: as in pyseg.functional.atrous_conv2d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        atrous_rates: Sequence[int] = (6, 12, 18, 24),
        *,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for rate in atrous_rates:
            conv = AtrousConv2d(in_channels, out_channels, 3, padding=rate, dilation=rate, exact=exact)
            nn.init.normal_(conv.weight, std=0.01)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            self.convs.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.convs
        result: Tensor = first(x)
        for conv in others:
            result = result + conv(x)
        return result
