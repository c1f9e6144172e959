"""torchvision's ResNets as backbones: the maps of their stages, at a stride that dilation keeps small."""

from typing import Any

from torch import Tensor, nn

OUTPUT_STRIDES = (8, 16, 32)


class ResNetStages(nn.Module):
    """The four stages of one of torchvision's ResNets, under its names, so that its checkpoints load.

    Takes images [N, 3, H, W] and returns the stages' maps, finest first; `channels` are theirs.

    Args:
        name: of a ResNet in torchvision: "resnet18", "resnet50", "resnext50_32x4d", ...
        output_stride: of the last map, 8, 16 or 32. Below 32 the last stages take no stride, and their 3x3
            convolutions are dilated instead, each from the second block on (DeepLab v3, 1706.05587, section 3.1).
        weights: as for torchvision.models.get_model; None: random ones.

    Raises:
        ImportError: without torchvision. ValueError: another output stride, or a network that is no ResNet.
    """

    def __init__(self, name: str, output_stride: int = 32, weights: Any = None) -> None:
        super().__init__()
        from torchvision.models import get_model  # type: ignore[import-untyped]
        from torchvision.models.resnet import ResNet  # type: ignore[import-untyped]

        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"ResNetStages: output_stride must be 8, 16 or 32, got {output_stride}")
        network = get_model(name, weights=weights)
        if not isinstance(network, ResNet):
            raise ValueError(f"ResNetStages: name must be that of a ResNet, got {name}")
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(part, getattr(network, part))
        dilation = 1
        for stride, stage in ((16, network.layer3), (32, network.layer4)):
            if stride > output_stride:
                dilation = _dilated(stage, dilation)
        self.channels = tuple(_channels(stage) for stage in self._stages())

    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{i}") for i in range(1, 5)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = image
        for part in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(part)(x)
        maps = []
        for stage in self._stages():
            x = stage(x)
            maps.append(x)
        return tuple(maps)


def _dilated(stage: nn.Sequential, dilation: int) -> int:
    """Takes the stride out of a stage; the first block sees what came before it at the dilation up to there."""
    for number, block in enumerate(stage):
        rate = dilation if number == 0 else 2 * dilation
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (rate, rate)
    return 2 * dilation


def _channels(stage: nn.Module) -> int:
    return [m.num_features for m in stage.modules() if isinstance(m, nn.BatchNorm2d)][-1]
