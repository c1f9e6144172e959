"""Forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad), which torch drops silently at an operator.

Operators whose autograd is registered in Python have none. What calls them either computes with torch's operators where
`has_tangent`, or says that it cannot by `refuse_tangents`. Both cost nothing, in compiled graphs too, where forward
mode is not in use.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode derivatives are wanted."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and _tangent(t) is not None for t in tensors)


def _tangent(tensor: Tensor) -> Any:
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(tensor):  # of a vmap within: its tangent, if any, is that of the whole batch
        tensor = functorch.get_unwrapped(tensor)
    unpack: Any = forward_ad.unpack_dual
    return unpack(tensor).tangent


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raises where forward-mode derivatives with respect to one of the tensors are wanted."""
    if has_tangent(*tensors):
        raise NotImplementedError(f"{op}: forward-mode differentiation is not supported")
