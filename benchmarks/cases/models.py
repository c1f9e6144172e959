"""Whole networks, as they are and after pyseg.accelerate: torchvision's DeepLabV3, FCN and LR-ASPP, and U2-Net-p.

torchvision's with random weights at 520x520, the size that they are evaluated at; U2-Net-p with its own, which
examples/segment_photo.py downloads, at 320x320. One inference each.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from harness import Case, Contender, Prepared, Workload
from peers import channels_last, compiled_for_inference, convolution_flops

BASELINE = "torch NCHW"
FAMILY = "models"
FAMILY_NOTES = {  # measured reasons, by the summary's row
    "models": "accelerate keeps the model eager and its 1x1 and strided convolutions in torch; a compiled and frozen "
    "model folds and fuses those too, which is most of a ResNet or MobileNet",
}
PHOTO_EXAMPLE = Path(__file__).parents[2] / "examples" / "segment_photo.py"


@dataclass(frozen=True)
class Network:
    name: str
    load: Callable[[], nn.Module]  # from an image to the one result that users look at
    side: int
    tolerance: float
    onnx_file: Callable[[], Path] | None = None


class OneOutput(nn.Module):
    """The network with only the result that its users look at."""

    def __init__(self, network: nn.Module, key: str | int) -> None:
        super().__init__()
        self.network = network
        self.key = key

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)[self.key]


def cases() -> list[Case]:
    torchvision_names = ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
    networks = [Network(name, functools.partial(_torchvision, name), 520, 1e-4) for name in torchvision_names]
    # Looser: in float32 this network amplifies rounding, torch's own outputs are 1.2e-4 from those in float64.
    networks.append(Network("u2netp", _u2netp, 320, 2e-3, lambda: _photo_example().model_file()))
    return [_case(network) for network in networks]


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    torch.manual_seed(0)
    return OneOutput(get_model(name, weights=None, weights_backbone=None), "out").eval()


def _u2netp() -> nn.Module:
    from pyseg.models import load_u2net_onnx, u2netp

    return OneOutput(load_u2net_onnx(u2netp(batch_norm=False), _photo_example().model_file()), 0).eval()


@functools.cache
def _photo_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location(PHOTO_EXAMPLE.stem, PHOTO_EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _case(network: Network) -> Case:
    def build() -> Workload:
        model, image = network.load().requires_grad_(False), _image(network.side)

        def expected() -> list[Tensor]:
            with torch.inference_mode():
                return [copy.deepcopy(model).double()(image.double())]

        contenders = [
            Contender(BASELINE, lambda: _eager(model, image)),
            Contender("torch channels_last", lambda: _eager(_to_channels_last(model), channels_last(image))),
            Contender("torch.compile NCHW", lambda: _compiled(model, image)),
            Contender("torch.compile channels_last", lambda: _compiled(model, channels_last(image))),
        ]
        if network.onnx_file:
            contenders.append(Contender("onnxruntime", lambda: _onnxruntime(network.onnx_file(), image)))
        contenders.append(Contender("pyseg.accelerate", lambda: _accelerated(model, image), ours=True))
        return Workload(contenders, expected)

    return Case(
        name=f"models/{network.name}/forward/{network.side}x{network.side}",
        groups=(FAMILY, f"{FAMILY}, {network.name}"),
        build=build,
        params={"input": [1, 3, network.side, network.side], "dtype": "float32"},
        baseline=BASELINE,
        tolerance=network.tolerance,
        least=lambda: _least(network),
    )


def _image(side: int) -> Tensor:
    """A bright disc before a slope, with some noise, normalised as photographs are."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    disc = ((x - 0.1) ** 2 + y**2 < 0.25).float()
    noise = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))
    colours = torch.tensor([2.0, 1.0, -1.0]).view(3, 1, 1)
    return (0.5 * (x + y) - 0.5 + disc * colours + 0.1 * noise).unsqueeze(0)


def _to_channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def _eager(model: nn.Module, image: Tensor) -> Prepared:
    return Prepared(lambda: model(image))


def _compiled(model: nn.Module, image: Tensor) -> Prepared:
    call = compiled_for_inference(copy.deepcopy(model), image)
    return Prepared(lambda: call(image), sum(parameter.nbytes for parameter in model.parameters()))


def _onnxruntime(file: Path, image: Tensor) -> Prepared:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image.numpy()}
    first = [session.get_outputs()[0].name]
    return Prepared(lambda: torch.from_numpy(session.run(first, feed)[0]), file.stat().st_size)


def _accelerated(model: nn.Module, image: Tensor) -> Prepared:
    import pyseg

    accelerated = pyseg.accelerate(copy.deepcopy(model), image)
    changed = any(row.became for row in pyseg.report(accelerated).rows)
    packed = sum(
        torch.ops.pyseg._atrous_conv2d_pack(module.weight).nbytes
        for module in accelerated.modules()
        if isinstance(module, pyseg.nn.AtrousConv2d) and module.groups == 1 and module.kernel_size == (3, 3)
    )
    return Prepared(lambda: accelerated(image), packed, "accelerated" if changed else "torch")


def _least(network: Network) -> tuple[int, int]:
    """Operations of the convolutions, without the taps outside their maps; bytes of image, weights and result."""
    model = network.load().to("meta")
    image = torch.empty(1, 3, network.side, network.side, device="meta")
    result = model(image)
    bytes_ = image.nbytes + sum(parameter.nbytes for parameter in model.parameters()) + result.nbytes
    return convolution_flops(model, image), bytes_
