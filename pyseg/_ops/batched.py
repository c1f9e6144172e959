"""vmap of operators, both of torch's: torch.vmap's, and that of torch.autograd.grad(..., is_grads_batched=True).

The second, older one is behind torch.autograd.functional.jacobian(vectorize=True) and gradcheck's check_batched_grad
too. Left alone it calls an operator once for each sample, and fails on operators that take or return lists of tensors.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_LIBRARY = torch.library.Library("pyseg", "FRAGMENT")  # type: ignore[no-untyped-call]


_LEVELS = range(1, 64)  # how deep the older vmap nests


def _is_batched(argument: Any) -> bool:
    return isinstance(argument, Tensor) and torch._C._functorch.is_legacy_batchedtensor(argument)


def _samples(tensor: Tensor, level: int) -> Tensor:
    # The number of samples that is passed is for tensors that do not have this level.
    return torch._remove_batch_dim(tensor, level, 1, 0)


def _level(op: Any, tensor: Tensor) -> int:
    """The one level of a tensor. torch's own count is the calling thread's, and CUDA's gradients run on another."""
    for level in _LEVELS:
        if not _is_batched(_samples(tensor, level)):
            return level
    raise RuntimeError(f"{op.name()}: batched gradients within batched gradients are not implemented")


def register_vmap(op: Any, rule: Callable[..., tuple[Any, Any]]) -> None:
    """`rule` as in torch.library.register_vmap, without keyword arguments. Its in_dims are 0 or None for the older."""
    torch.library.register_vmap(op, rule)

    def call(*arguments: Any) -> Any:
        flat, spec = tree_flatten(arguments)
        dims = [0 if _is_batched(each) else None for each in flat]
        level = _level(op, flat[dims.index(0)])
        flat = [each if d is None else _samples(each, level) for each, d in zip(flat, dims, strict=True)]
        if any(_is_batched(each) for each in flat):
            raise RuntimeError(f"{op.name()}: batched gradients within batched gradients are not implemented")
        info = SimpleNamespace(batch_size=flat[dims.index(0)].shape[0], randomness="error")
        results, out_dims = rule(info, tree_unflatten(dims, spec), *tree_unflatten(flat, spec))
        results, spec = tree_flatten(results)
        out_dims = tree_flatten(out_dims)[0]
        batched = [torch._add_batch_dim(each, d, level) for each, d in zip(results, out_dims, strict=True)]
        return tree_unflatten(batched, spec)

    _LIBRARY.impl(op.name().removeprefix("pyseg::"), call, "Batched")  # type: ignore[no-untyped-call]
