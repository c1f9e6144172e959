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


def register_vmap(op: Any, rule: Callable[..., tuple[Any, Any]]) -> None:
    """`rule` as in torch.library.register_vmap, without keyword arguments. Its in_dims are 0 or None for the older."""
    torch.library.register_vmap(op, rule)

    def call(*arguments: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

        def is_batched(argument: Any) -> bool:
            return isinstance(argument, Tensor) and torch._C._functorch.is_legacy_batchedtensor(argument)

        flat, spec = tree_flatten(arguments)
        dims = [0 if is_batched(each) else None for each in flat]
        # The number of samples that is passed is for tensors without this level: those of an outer call.
        flat = [
            each if d is None else torch._remove_batch_dim(each, level, 1, 0)
            for each, d in zip(flat, dims, strict=True)
        ]
        if any(is_batched(each) for each in flat):
            raise RuntimeError(f"{op.name()}: batched gradients within batched gradients are not implemented")
        batch = next(each.shape[0] for each, d in zip(flat, dims, strict=True) if d == 0)
        info = SimpleNamespace(batch_size=batch, randomness="error")
        results, out_dims = rule(info, tree_unflatten(dims, spec), *tree_unflatten(flat, spec))
        results, spec = tree_flatten(results)
        out_dims = tree_flatten(out_dims)[0]
        batched = [torch._add_batch_dim(each, d, level) for each, d in zip(results, out_dims, strict=True)]
        return tree_unflatten(batched, spec)

    _LIBRARY.impl(op.name().removeprefix("pyseg::"), call, "Batched")  # type: ignore[no-untyped-call]
