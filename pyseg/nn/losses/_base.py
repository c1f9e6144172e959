"""A loss function as a module."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Arguments of a call, not of the module.
_PER_CALL = ("input", "target", "pixel_weight", "image_labels", "point_weight", "objectness")
# Beside `weight` what may hold a value for each class.
_PER_CLASS = ("alpha", "beta")


class SegmentationLoss(nn.Module):
    """Base of the losses: `class DiceLoss(SegmentationLoss, function=dice_loss)`.

    The constructor takes the function's arguments but for input, target and what else belongs to a batch (such as
    pixel_weight), which forward takes, with the same names, order and defaults (the class's signature shows them), and
    keeps them as attributes. Tensors, and what holds a value for each class, are buffers: they follow `.to()` and are
    in the state_dict. Wrong names and values raise when the module is made or first called.
    """

    _function: ClassVar[Callable[..., Tensor]]
    _names: ClassVar[tuple[str, ...]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, function: Callable[..., Tensor], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(function)
        own = [parameter for name, parameter in signature.parameters.items() if name not in _PER_CALL]
        cls._function = staticmethod(function)
        cls._names = tuple(parameter.name for parameter in own)
        cls.__signature__ = inspect.Signature(own)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor) or name == "weight" or (name in _PER_CLASS and isinstance(value, Sequence)):
                value = value if value is None or isinstance(value, Tensor) else torch.tensor(value)
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, input: Tensor, target: Tensor, **maps: Tensor | None) -> Tensor:
        arguments = {name: getattr(self, name) for name in self._names}
        return self._function(input, target, **arguments, **maps)

    def extra_repr(self) -> str:
        """The arguments that are not the defaults."""
        changed = []
        for name, parameter in self.__signature__.parameters.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = value.tolist()
            if value != parameter.default:
                changed.append(f"{name}={value!r}")
        return ", ".join(changed)
