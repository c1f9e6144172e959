"""FastFCN: an ordinary ResNet and joint pyramid upsampling instead of a dilated one."""

from typing import Any, Literal

from torch import Tensor, nn

from pyseg.functional import bilinear_upsample
from pyseg.models.resnet import ResNetStages
from pyseg.nn import ASPP, JPU, AtrousConv2d

Head = Literal["fcn", "aspp"]


class FastFCN(nn.Module):
    r"""Logits of every pixel from a pyramid of maps: head(JPU(stages 2 to 4)), upsampled to the image's size.

    Args:
        backbone: takes images [N, 3, H, W] and returns maps, finest first. The last three count, which have strides 8,
            16 and 32.
        channels: of the maps.
        width: of the JPU, whose result has four times as many channels.
        head: takes these to classes, as `segmentation_head` does.
    """

    def __init__(self, backbone: nn.Module, channels: tuple[int, ...], width: int, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.jpu = JPU(channels[-3:], width)
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        *_, c3, c4, c5 = self.backbone(image)
        *_, features = self.jpu(c3, c4, c5)
        return bilinear_upsample(self.head(features), image.shape[2:])


def segmentation_head(
    kind: Head, channels: int, num_classes: int, width: int = 256, *, dropout: float = 0.1
) -> nn.Sequential:
    """From features at stride 8 to classes: ASPP of rates 12, 24, 36, or one 3x3 convolution as in FCN, and a 1x1."""
    if kind == "aspp":
        return nn.Sequential(ASPP(channels, (12, 24, 36), width, dropout=dropout), nn.Conv2d(width, num_classes, 1))
    if kind != "fcn":
        raise ValueError(f"segmentation_head: kind must be fcn or aspp, got {kind}")
    conv = AtrousConv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, num_classes, 1))


def fastfcn(
    backbone: str,
    num_classes: int,
    head: Head = "fcn",
    *,
    width: int = 512,
    head_width: int = 256,
    weights: Any = None,
) -> FastFCN:
    r"""FastFCN (Wu et al. 2019, 1903.11816): strides 4 to 32, joint pyramid upsampling to stride 8, and a head.

        model = pyseg.models.fastfcn("resnet50", num_classes=21)

    Args:
        backbone: the name of one of torchvision's ResNets.
        num_classes: channels of the result.
        head: "fcn", one 3x3 convolution, or "aspp".
        width: of the JPU; head_width: of the head.
        weights: of the backbone, as for torchvision.models.get_model.

    Takes images [N, 3, H, W], returns logits [N, num_classes, H, W].

    Raises:
        ValueError: another head or a network that is no ResNet. ImportError: without torchvision.
    """
    stages = ResNetStages(backbone, weights=weights)
    return FastFCN(stages, stages.channels, width, segmentation_head(head, 4 * width, num_classes, head_width))
