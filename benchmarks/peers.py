"""Ways to run a module that cases of several operators compare with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compiled_for_inference(module: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """torch.compile with inductor's freezing, which folds the weights and prepacks them for oneDNN; compiled here."""
    from torch._inductor import config

    compiled = torch.compile(module.eval(), dynamic=False)
    with torch.inference_mode(), config.patch(freezing=True):
        compiled(example)
    return compiled


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous(memory_format=torch.channels_last)
