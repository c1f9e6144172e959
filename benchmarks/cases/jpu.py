"""Joint pyramid upsampling at the maps of a 480x480 image, beside FastFCN's module in both layouts and compiled."""

import copy

import torch
from torch import Tensor, nn

from harness import Case, Contender, Prepared, Workload
from peers import channels_last, compiled_for_inference, convolution_flops

BASELINE = "torch NCHW"
MAPS = ((512, 60), (1024, 30), (2048, 15))  # channels, height and width
FAMILY = "JPU, forward"


def cases() -> list[Case]:
    return [
        Case(
            name="jpu/forward/512-512/60x60/batch1",
            groups=(FAMILY,),
            build=_build,
            params={"inputs": [[1, channels, size, size] for channels, size in MAPS], "width": 512},
            baseline=BASELINE,
            tolerance=2e-5,
            least=_least,
            quick=(1, 2),
        )
    ]


def _build() -> Workload:
    theirs, ours, maps = _modules("cpu")
    last, maps_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last), [channels_last(x) for x in maps]

    def expected() -> list[Tensor]:
        with torch.inference_mode():
            return [copy.deepcopy(theirs).double()(*[x.double() for x in maps])[-1]]

    contenders = [
        Contender(BASELINE, lambda: _eager(theirs, maps)),
        Contender("torch channels_last", lambda: _eager(last, maps_last)),
        Contender("torch.compile NCHW", lambda: _compiled(theirs, maps)),
        Contender("torch.compile channels_last", lambda: _compiled(last, maps_last)),
        Contender("pyseg NCHW", lambda: _pyseg(ours, maps), ours=True),
        Contender("pyseg channels_last", lambda: _pyseg(ours, maps_last), ours=True),
    ]
    return Workload(contenders, expected)


def _modules(device: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Theirs, ours with the same parameters, and the maps."""
    from pyseg.nn import JPU
    from pyseg.reference.jpu import JPU as FastFCNJPU

    torch.manual_seed(0)
    channels = [c for c, _ in MAPS]
    with torch.device(device):
        theirs, ours = FastFCNJPU(channels), JPU(channels)
        maps = [torch.randn(1, c, size, size).relu() for c, size in MAPS]
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval(), maps


def _eager(module: nn.Module, maps: list[Tensor]) -> Prepared:
    return Prepared(lambda: module(*maps)[-1])


def _compiled(module: nn.Module, maps: list[Tensor]) -> Prepared:
    call = compiled_for_inference(copy.deepcopy(module), *maps)
    return Prepared(lambda: call(*maps)[-1], sum(parameter.nbytes for parameter in module.parameters()))


def _pyseg(module: nn.Module, maps: list[Tensor]) -> Prepared:
    module = copy.deepcopy(module)
    packed = sum(parameter.nbytes for parameter in module.parameters() if parameter.dim() == 4)
    return Prepared(lambda: module(*maps)[-1], packed, "fused")


def _least() -> tuple[int, int]:
    module, _, maps = _modules("meta")
    result = module(*maps)[-1]
    bytes_ = sum(x.nbytes for x in maps) + sum(p.nbytes for p in module.parameters()) + result.nbytes
    return convolution_flops(module, *maps), bytes_
