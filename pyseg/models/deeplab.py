"""DeepLab v3: a dilated backbone, atrous spatial pyramid pooling, and a CRF that is trained with them if asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyseg.functional import bilinear_upsample
from pyseg.models.resnet import ResNetStages
from pyseg.nn import ASPP, CRFasRNN

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DeepLab(nn.Module):
    r"""Logits of every pixel from the last map of a backbone.

        coarse = classifier(aspp(backbone(image)[-1])), classifier 1x1      logits = upsampled to the image's size
        with a CRF: crf(logits, 255 * (image * std + mean)), 10 mean field iterations (5 in training mode)

    Args:
        backbone: takes images [N, 3, H, W], returns a map or several, of which the last counts.
        channels: of that map.
        num_classes: channels of the result.
        atrous_rates, width, dropout: of `pyseg.nn.ASPP`.
        crf: takes logits and images of 0 to 255, as `pyseg.nn.CRFasRNN` does; or None.
        mean, std: by which the images were normalised.

    Input [N, 3, H, W], result [N, num_classes, H, W]: logits, for a cross-entropy. `unary` gives those before the CRF.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        num_classes: int,
        *,
        atrous_rates: Sequence[int] = (6, 12, 18),
        width: int = 256,
        dropout: float = 0.5,
        crf: nn.Module | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.aspp = ASPP(channels, atrous_rates, width, dropout=dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.crf = crf
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    def unary(self, image: Tensor) -> Tensor:
        """The logits before the CRF, [N, num_classes, H, W]."""
        features = self.backbone(image)
        last = features if isinstance(features, Tensor) else features[-1]
        return bilinear_upsample(self.classifier(self.aspp(last)), image.shape[2:])

    def forward(self, image: Tensor) -> Tensor:
        logits = self.unary(image)
        if self.crf is None:
            return logits
        refined: Tensor = self.crf(logits, 255 * (image * self.std + self.mean))
        return refined


def deeplab(
    backbone: nn.Module | str,
    num_classes: int,
    output_stride: int = 16,
    crf: bool | nn.Module = False,
    *,
    atrous_rates: Sequence[int] | None = None,
    width: int = 256,
    dropout: float = 0.5,
    weights: Any = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> DeepLab:
    r"""DeepLab v3 (Chen et al. 2017, 1706.05587, section 3), with CRF as RNN (Zheng et al. 2015, 1502.03240) at will.

        model = pyseg.models.deeplab("resnet50", num_classes=21, output_stride=8, crf=True)

    Args:
        backbone: the name of one of torchvision's ResNets, or a module that takes images [N, 3, H, W] and returns a
            map (or several, the last of which counts). Of a module the channels are found by one image of zeros.
        num_classes: channels of the result.
        output_stride: size of the image over that of the last map: 8, 16 or 32. Of a module it only sets the rates.
        crf: True for `pyseg.nn.CRFasRNN` with its defaults, or a module of one's own in its place.
        atrous_rates: None: (6, 12, 18) at stride 16, twice that at 8 (section 3.3), half of it at 32.
        width, dropout: of the ASPP block.
        weights: of a named backbone, as for torchvision.models.get_model.
        mean, std: of the images' normalisation; the CRF undoes it.

    Raises:
        ValueError: an output stride that is not 8, 16 or 32. ImportError: a name, without torchvision.
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"deeplab: output_stride must be 8, 16 or 32, got {output_stride}")
    if isinstance(backbone, str):
        backbone = ResNetStages(backbone, output_stride, weights)
        channels = backbone.channels[-1]
    else:
        channels = _channels(backbone)
    rates = [rate * 16 // output_stride for rate in (6, 12, 18)] if atrous_rates is None else atrous_rates
    layer = CRFasRNN(num_classes) if crf is True else crf or None
    return DeepLab(
        backbone,
        channels,
        num_classes,
        atrous_rates=rates,
        width=width,
        dropout=dropout,
        crf=layer,
        mean=mean,
        std=std,
    )


def _channels(backbone: nn.Module) -> int:
    """Of the last map that a backbone returns."""
    training = [(module, module.training) for module in backbone.modules()]  # frozen batch norms may differ
    like = next(backbone.parameters(), torch.empty(0))
    with torch.no_grad():
        features = backbone.eval()(like.new_zeros(1, 3, 64, 64))
    for module, mode in training:
        module.training = mode
    last: Tensor = features if isinstance(features, Tensor) else features[-1]
    return last.shape[1]
