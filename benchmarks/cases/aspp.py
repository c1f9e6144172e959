"""Atrous spatial pyramid pooling: DeepLab v3's ASPP 2048 -> 256 at rates 12, 24, 36, and v3+'s separable one, beside
torchvision's and segmentation-models-pytorch's modules in both layouts and compiled."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness import Case, Contender, Prepared, Workload
from peers import channels_last, compiled_for_inference, convolution_flops

BASELINE = "torch NCHW"
CHANNELS, RATES = 2048, (12, 24, 36)
FAMILY_NOTES = {  # measured reasons, by the summary's row
    "ASPP separable, forward": "the five 1x1 products, at the speed of a matrix product, take over three quarters of "
    "our time: 3x over peers would need them for nothing",
}


@dataclass(frozen=True)
class Shape:
    size: int  # height and width
    batch: int
    separable: bool
    training: bool
    quick: tuple[int, ...] = ()

    @property
    def family(self) -> str:
        kind = "ASPP separable" if self.separable else "ASPP"
        return f"{kind}, {'forward+backward' if self.training else 'forward'}"

    @property
    def name(self) -> str:
        kind = "separable" if self.separable else "dense"
        direction = "training" if self.training else "forward"
        return f"aspp/{kind}/{direction}/{CHANNELS}-256/{self.size}x{self.size}/batch{self.batch}"


SHAPES = (
    Shape(33, 1, separable=False, training=False, quick=(1, 2)),
    Shape(65, 1, separable=False, training=False, quick=(1,)),
    Shape(33, 4, separable=False, training=False),
    Shape(33, 2, separable=False, training=True),
    Shape(33, 1, separable=True, training=False, quick=(1,)),
    Shape(65, 1, separable=True, training=False),
    Shape(33, 2, separable=True, training=True),
)


def cases() -> list[Case]:
    return [_case(shape) for shape in SHAPES]


def _case(shape: Shape) -> Case:
    def build() -> Workload:
        theirs, ours, x = _modules(shape)
        last, x_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last), channels_last(x)
        run = _training if shape.training else _forward
        compiled = _compiled_training if shape.training else _compiled
        contenders = [
            Contender(BASELINE, lambda: run(theirs, x)),
            Contender("torch channels_last", lambda: run(last, x_last)),
            Contender("torch.compile NCHW", lambda: compiled(theirs, x)),
            Contender("torch.compile channels_last", lambda: compiled(last, x_last)),
            Contender("pyseg NCHW", lambda: _ours(run, ours, x), ours=True),
            Contender("pyseg channels_last", lambda: _ours(run, ours, x_last), ours=True),
        ]
        return Workload(contenders, lambda: _as_list(run(copy.deepcopy(theirs).double(), x.double()).call()))

    return Case(
        name=shape.name,
        groups=(shape.family,),
        build=build,
        params={"input": [shape.batch, CHANNELS, shape.size, shape.size], "rates": list(RATES), "dtype": "float32"},
        baseline=BASELINE,
        # Batch statistics of few pixels (the pooled branch has one an image) enlarge rounding errors in gradients.
        tolerance=2e-4 if shape.training else 2e-5,
        least=lambda: _least(shape),
        inference=not shape.training,
        quick=shape.quick,
    )


def _modules(shape: Shape, device: str = "cpu") -> tuple[nn.Module, nn.Module, Tensor]:
    """Theirs, ours with the same parameters, and an input."""
    from pyseg.nn import ASPP

    torch.manual_seed(0)
    with torch.device(device):
        theirs = _separable() if shape.separable else _dense()
        ours = ASPP(CHANNELS, RATES, separable=shape.separable, dropout=0.0)
        # Images differ in brightness and colour: with equal means the pooled branch would normalise rounding errors.
        x = torch.randn(shape.batch, CHANNELS, shape.size, shape.size).relu() * torch.rand(shape.batch, CHANNELS, 1, 1)
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(shape.training), ours.train(shape.training), x


def _dense() -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import ASPP

    module = ASPP(CHANNELS, RATES)
    module.project[3].p = 0.0  # so that training steps can be compared
    return module


def _separable() -> nn.Module:
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP

    return ASPP(CHANNELS, 256, RATES, separable=True, dropout=0.0)


def _forward(module: nn.Module, x: Tensor) -> Prepared:
    return Prepared(lambda: module(x))


def _compiled(module: nn.Module, x: Tensor) -> Prepared:
    call = compiled_for_inference(copy.deepcopy(module), x)
    return Prepared(lambda: call(x), sum(parameter.nbytes for parameter in module.parameters()))


def _training(module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Prepared:
    """Output, and the gradients of input and parameters."""
    leaf, parameters = x.detach().requires_grad_(), list(module.parameters())
    generator = torch.Generator().manual_seed(1)

    run = module if call is None else call
    gradient = torch.randn(run(leaf).shape, generator=generator)

    def step() -> list[Tensor]:
        y = run(leaf)
        return [y, *torch.autograd.grad(y, [leaf, *parameters], gradient.to(y))]

    return Prepared(step)


def _compiled_training(module: nn.Module, x: Tensor) -> Prepared:
    prepared = _training(module, x, torch.compile(module, dynamic=False))
    prepared.call()
    return prepared


def _ours(run: Callable[..., Prepared], module: nn.Module, x: Tensor) -> Prepared:
    prepared = run(copy.deepcopy(module), x)
    packed = 0 if module.training else sum(p.nbytes for p in module.parameters() if p.dim() == 4)
    return Prepared(prepared.call, packed, "fused" if not module.training else "by modules")


def _as_list(result: Tensor | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else result


def _least(shape: Shape) -> tuple[int, int]:
    module, _, x = _modules(shape, "meta")
    y = module(x)
    flops, weights = convolution_flops(module, x), sum(parameter.nbytes for parameter in module.parameters())
    if shape.training:  # as for a convolution: three times the products; x and weights thrice, y twice
        return 3 * flops, 3 * x.nbytes + 3 * weights + 2 * y.nbytes
    return flops, x.nbytes + weights + y.nbytes
