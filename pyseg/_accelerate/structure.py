"""Whether a block computes what its names and structure suggest: by numbers, since forwards can do anything."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pyseg._accelerate.measure import Outputs, difference, tensors_in
from pyseg._accelerate.modules import Swaps
from pyseg.nn._aspp_fusion import aspp_layers, mmseg_layers
from pyseg.nn._jpu_fusion import jpu_layers

_AGREES = 1e-6  # in float64, where rounding stays below 1e-12; another structure is off by about 1


def why_not(block: nn.Module, kind: type[nn.Module]) -> str:
    """Why `block` must not become a `kind`; empty if it may.

    Compares the two on random inputs, in eval mode, on a copy in float64 with random parameters: those of a model that
    was never trained, with batch norms that do nothing, would not tell.
    """
    devices = {t.device for t in (*block.parameters(), *block.buffers())}
    try:
        with torch.inference_mode(), torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            torch.manual_seed(0)
            copied = _without_hooks(block).double().eval()
            _randomize(copied)
            inputs = _inputs(copied)
            expected = _outputs(copied, inputs)
            Swaps().attach_part(copied, kind, exact=False)
            got = _outputs(copied, inputs)
    except Exception as error:  # user code, run in a way that it may not have been written for: anything can come out
        return f"cannot be compared with its modules: {(str(error).splitlines() or [type(error).__name__])[0]}"
    fusion: Any = copied._pyseg_fusion
    if not fusion.is_in_use:
        return "its modules cannot run as a whole"
    far, where = difference(expected, got)
    return "" if far <= _AGREES else f"computes something else than its modules suggest: {where} is off by {far:.1e}"


def _without_hooks(block: nn.Module) -> nn.Module:
    """A copy. Hooks would see the random inputs, and copying them might copy much else."""
    empty: dict[int, Any] = {
        id(value): OrderedDict()
        for module in block.modules()
        for name, value in module.__dict__.items()
        if name.endswith("_hooks") and isinstance(value, dict)
    }
    return copy.deepcopy(block, empty)


def _randomize(block: nn.Module) -> None:
    """Parameters and running statistics with which every layer shows."""
    for module in block.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:
                nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
            elif name in ("running_mean", "bias"):
                nn.init.normal_(tensor, std=0.3)
            else:
                nn.init.uniform_(tensor, 0.5, 1.5)


def _inputs(block: Any) -> tuple[Any, ...]:
    """Small random inputs."""
    name, weight = type(block).__name__, next(block.parameters())

    def random(channels: int, height: int, width: int) -> Tensor:
        return torch.randn(2, channels, height, width, dtype=weight.dtype, device=weight.device)

    if name == "JPU":
        layers = jpu_layers(block)
        assert layers is not None
        coarse, middle, fine = (layer.conv.in_channels for layer in layers.maps)
        return random(1, 12, 16), random(fine, 6, 8), random(middle, 3, 4), random(coarse, 2, 2)
    found = aspp_layers(block) if name == "ASPP" else mmseg_layers(block)
    assert found is not None
    x = random(found.branches[0][0].conv.in_channels, 5, 6)
    if name == "ASPP":
        return (x,)
    # The head takes a list of a backbone's maps: the first for c1_bottleneck, where there is one, and its own.
    block._transform_inputs = lambda maps: maps[-1]
    bottleneck = getattr(block, "c1_bottleneck", None) or nn.Identity()
    convs = [module for module in bottleneck.modules() if isinstance(module, nn.Conv2d)]
    return ([random(convs[0].in_channels if convs else 1, 10, 12), x],)


def _outputs(block: nn.Module, inputs: tuple[Any, ...]) -> Outputs:
    return list(tensors_in(block(*inputs)))
