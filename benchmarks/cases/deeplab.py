"""DeepLab v3 as a whole: torchvision's ResNet-18 at output stride 8, ASPP, upsampling; one inference of a small image.

The peers are the same network of torch's modules alone: torchvision's ASPP and torch's interpolate.
"""

import copy

import torch
from torch import Tensor, nn

from harness import Case, Contender, Prepared, Workload
from peers import channels_last, compiled_for_inference, convolution_flops

BASELINE = "torch NCHW"
FAMILY = "systems, DeepLab"
CLASSES, SIDE = 21, 256


class PlainDeepLab(nn.Module):
    """The parts of pyseg's, with torch's modules in the places of pyseg's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import ASPP

        self.backbone, self.classifier = model.backbone, model.classifier
        rates = [branch[0].dilation[0] for branch in list(model.aspp.convs)[1:-1]]
        self.aspp = ASPP(model.backbone.channels[-1], rates)
        self.aspp.load_state_dict(model.aspp.state_dict())

    def forward(self, image: Tensor) -> Tensor:
        logits = self.classifier(self.aspp(self.backbone(image)[-1]))
        return nn.functional.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)


def cases() -> list[Case]:
    return [
        Case(
            name=f"systems/deeplab/resnet18/forward/{SIDE}x{SIDE}",
            groups=(FAMILY,),
            build=_build,
            params={"input": [1, 3, SIDE, SIDE], "classes": CLASSES, "output_stride": 8, "dtype": "float32"},
            baseline=BASELINE,
            tolerance=1e-4,
            least=_least,
            quick=(1, 2),
        )
    ]


def _build() -> Workload:
    ours = _model()
    plain, image = PlainDeepLab(ours).eval().requires_grad_(False), _image()
    last, image_last = copy.deepcopy(plain).to(memory_format=torch.channels_last), channels_last(image)

    def expected() -> list[Tensor]:
        with torch.inference_mode():
            return [copy.deepcopy(plain).double()(image.double())]

    contenders = [
        Contender(BASELINE, lambda: Prepared(lambda: plain(image))),
        Contender("torch channels_last", lambda: Prepared(lambda: last(image_last))),
        Contender("torch.compile NCHW", lambda: _compiled(plain, image)),
        Contender("torch.compile channels_last", lambda: _compiled(last, image_last)),
        Contender("pyseg.models.deeplab", lambda: Prepared(lambda: ours(image)), ours=True),
        Contender("pyseg.models.deeplab, accelerated", lambda: _accelerated(ours, image), ours=True),
    ]
    return Workload(contenders, expected)


def _model() -> nn.Module:
    from pyseg.models import deeplab

    torch.manual_seed(0)
    return deeplab("resnet18", CLASSES, 8).eval().requires_grad_(False)


def _image() -> Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def _compiled(module: nn.Module, image: Tensor) -> Prepared:
    call = compiled_for_inference(copy.deepcopy(module), image)
    return Prepared(lambda: call(image), sum(parameter.nbytes for parameter in module.parameters()))


def _accelerated(model: nn.Module, image: Tensor) -> Prepared:
    import pyseg

    accelerated = pyseg.accelerate(copy.deepcopy(model), image)
    packed = sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 4)
    return Prepared(lambda: accelerated(image), packed, "accelerated")


def _least() -> tuple[int, int]:
    model = PlainDeepLab(_model()).eval().to("meta")
    image = torch.empty(1, 3, SIDE, SIDE, device="meta")
    result = model(image)
    bytes_ = image.nbytes + sum(parameter.nbytes for parameter in model.parameters()) + result.nbytes
    return convolution_flops(model, image), bytes_
