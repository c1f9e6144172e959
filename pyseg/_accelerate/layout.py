"""channels_last weights: the convolutions that have them produce channels_last activations, and so on down the model.

(Convolutions and most other operators return channels_last where an input has it, convolutions also where only the
weight has it. So the model's own input can stay as it is.)
"""

import torch
from torch import Tensor, nn


class ChannelsLast:
    """The weights of a model in both memory formats, for going to and fro without new copies."""

    def __init__(self, model: nn.Module) -> None:
        self._weights: list[tuple[nn.Module, str, Tensor, Tensor]] = []  # owner, name, as it was, channels_last
        seen = set()
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or not _convertible(parameter):
                    continue
                seen.add(id(parameter))
                data = parameter.data
                self._weights.append((module, name, data, data.contiguous(memory_format=torch.channels_last)))

    def __bool__(self) -> bool:
        """Whether anything differs between the two formats."""
        return bool(self._weights)

    def set(self, on: bool) -> None:
        for module, name, before, after in self._weights:
            module._parameters[name].data = after if on else before  # type: ignore[union-attr]
            if on:  # for restore_strides
                module.__dict__.setdefault("_pyseg_strides", {})[name] = before.stride()
            else:
                module.__dict__.pop("_pyseg_strides", None)


def restore_strides(module: nn.Module) -> None:
    """Undoes ChannelsLast.set(True) for one module: the same values, also if they have changed since, as they lay."""
    for name, stride in module.__dict__.pop("_pyseg_strides", {}).items():
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dim() == len(stride):
            data = parameter.data
            parameter.data = torch.empty_strided(data.shape, stride, dtype=data.dtype, device=data.device).copy_(data)


def _convertible(parameter: Tensor) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.dim() == 4
        and parameter.is_floating_point()
        and not parameter.is_contiguous(memory_format=torch.channels_last)
    )
