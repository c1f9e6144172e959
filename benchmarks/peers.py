"""Ways to run a module that cases of several operators compare with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compiled_for_inference(module: nn.Module, *example: Tensor) -> Callable[..., Any]:
    """torch.compile with inductor's freezing, which folds the weights and prepacks them for oneDNN; compiled here."""
    from torch._inductor import config

    compiled = torch.compile(module.eval(), dynamic=False)
    with torch.inference_mode(), config.patch(freezing=True):
        compiled(*example)
    return compiled


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous(memory_format=torch.channels_last)


def convolution_flops(model: nn.Module, *inputs: Tensor) -> int:
    """Operations of the convolutions of one call, without the taps outside their maps. Model and inputs on meta."""
    flops = 0

    def count(conv: nn.Conv2d, arguments: tuple[Tensor], result: Tensor) -> None:
        nonlocal flops
        taps = [_taps_inside(conv, axis, arguments[0].shape[2 + axis], result.shape[2 + axis]) for axis in (0, 1)]
        flops += 2 * result.shape[0] * conv.out_channels * conv.in_channels // conv.groups * taps[0] * taps[1]

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return flops


def _taps_inside(conv: nn.Conv2d, axis: int, size_in: int, size_out: int) -> int:
    return sum(
        0 <= position * conv.stride[axis] - conv.padding[axis] + tap * conv.dilation[axis] < size_in
        for tap in range(conv.kernel_size[axis])
        for position in range(size_out)
    )
