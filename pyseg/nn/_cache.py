"""Values computed from tensors and kept for as long as the tensors stay what they were."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_COMPARED_WHOLE = 4096
_SAMPLES = 32


class Cached:
    """One value computed from tensors, computed again when one of them has changed.

    A tensor has changed if it is another object, has moved (a swapped `.data`, `.to()`) or counts another version (any
    in-place operation: load_state_dict, optimisers). Edits through `.data` or NumPy leave the version alone, and
    inference tensors have none. So on the CPU tensors of up to 4096 elements are also compared whole, and of larger
    ones 32 evenly spread elements; of large inference tensors the sum, too. What escapes: an edit of single elements of
    a large tensor through `.data`, and on CUDA, where looking at values would synchronise, any edit through `.data`
    that leaves the tensor where it is. `clear` is for these. On CUDA nothing is kept for inference tensors.

    Belongs to one module: copies and pickles of it start empty.
    """

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        self._entry: tuple[Any, list[_Stamp], Any] | None = None  # replaced as a whole, so that threads may share it

    def __reduce__(self) -> tuple[Any, ...]:
        return (Cached, ())

    def clear(self) -> None:
        self._entry = None

    def get(self, tensors: tuple[Tensor, ...], key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it returned the last time if key and tensors are as they were then."""
        if not _can_keep(tensors):
            return compute()
        entry = self._entry
        if entry is not None and entry[0] == key and _match(entry[1], tensors):
            return entry[2]
        # Normal tensors, also where inference mode is on: what is kept may meet autograd later.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
            self._entry = (key, [_Stamp(tensor) for tensor in tensors], value)
        return value


def _can_keep(tensors: tuple[Tensor, ...]) -> bool:
    """Only without gradients and in plain eager mode: whoever traces would make a constant of the value."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if tensors[0].is_cuda and (torch.cuda.is_current_stream_capturing() or any(t.is_inference() for t in tensors)):
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta for tensor in tensors)


class _Stamp:
    __slots__ = ("_state", "_tensor", "_values")

    def __init__(self, tensor: Tensor):
        self._tensor = weakref.ref(tensor)
        self._state = _state(tensor)
        self._values = None if tensor.is_cuda else _values(tensor)

    def matches(self, tensor: Tensor) -> bool:
        if self._tensor() is not tensor or _state(tensor) != self._state:
            return False
        if isinstance(self._values, Tensor):
            return torch.equal(tensor, self._values)
        return self._values is None or _values(tensor) == self._values


def _match(stamps: list[_Stamp], tensors: tuple[Tensor, ...]) -> bool:
    return len(stamps) == len(tensors) and all(s.matches(t) for s, t in zip(stamps, tensors, strict=True))


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _values(tensor: Tensor) -> Tensor | list[float]:
    count = tensor.numel()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if count <= _COMPARED_WHOLE or extent != count:  # samples need a tensor without gaps
        return tensor.detach().clone()
    # Odd against the usual sizes (powers of two, nine taps), so that the samples do not all see the same tap.
    samples = tensor.detach().as_strided((_SAMPLES,), (count // _SAMPLES - 1,)).tolist()
    return [*samples, tensor.sum(dtype=torch.float64).item()] if tensor.is_inference() else samples
