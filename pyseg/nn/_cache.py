"""Values computed from tensors and kept for as long as the tensors stay what they were."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

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

    Fused optimisers count no version either. So a call in which the tensors want gradients forgets the value, and on
    CUDA nothing is kept from then on until `clear`, which modules call when they change between training and eval mode.

    Belongs to one module: copies and pickles of it start empty.
    """

    __slots__ = ("_entry", "_retired", "times_cleared")

    def __init__(self) -> None:
        self._entry: tuple[Any, list[_Stamp], Any] | None = None  # replaced as a whole, so that threads may share it
        self._retired = False
        self.times_cleared = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return (Cached, ())

    def clear(self) -> None:
        self._entry = None
        self._retired = False
        self.times_cleared += 1

    def retire(self, tensors: tuple[Tensor, ...]) -> None:
        """Says that gradients will flow into the tensors, so that an optimiser is about to change them."""
        self._entry = None
        self._retired = tensors[0].is_cuda

    def get(self, tensors: tuple[Tensor, ...], key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it returned the last time if key and tensors are as they were then."""
        if not _is_plain_eager(tensors):
            return compute()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self.retire(tensors)
            return compute()
        if self._retired or (tensors[0].is_cuda and not _can_keep_on_cuda(tensors)):
            return compute()
        entry = self._entry
        if entry is not None and entry[0] == key and _match(entry[1], tensors):
            return entry[2]
        # Normal tensors, also where inference mode is on: what is kept may meet autograd later.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
            self._entry = (key, [_Stamp(tensor) for tensor in tensors], value)
        return value


def _is_plain_eager(tensors: tuple[Tensor, ...]) -> bool:
    """Whoever traces, or runs the call under a mode of its own, would make a constant of the value."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0:  # tangents show nowhere else
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and (t.is_cpu or t.is_cuda) for t in tensors)


def _can_keep_on_cuda(tensors: tuple[Tensor, ...]) -> bool:
    return not (torch.cuda.is_current_stream_capturing() or any(tensor.is_inference() for tensor in tensors))


class _Stamp:
    """What a tensor was like, and how to look at its values again: through NumPy, which is cheaper than torch."""

    __slots__ = ("_bytes", "_sampled", "_state", "_sum", "_tensor")

    def __init__(self, tensor: Tensor):
        self._tensor = weakref.ref(tensor)
        self._state = _state(tensor)
        self._sampled = None if tensor.is_cuda else _samples(tensor)
        self._bytes = None if self._sampled is None else self._sampled.tobytes()
        self._sum = _sum(tensor)

    def matches(self, tensor: Tensor) -> bool:
        if self._tensor() is not tensor or _state(tensor) != self._state:
            return False
        if self._sampled is not None and self._sampled.tobytes() != self._bytes:
            return False
        return self._sum is None or self._sum == _sum(tensor)


def _match(stamps: list[_Stamp], tensors: tuple[Tensor, ...]) -> bool:
    return len(stamps) == len(tensors) and all(s.matches(t) for s, t in zip(stamps, tensors, strict=True))


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _samples(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A view of the tensor's memory: all of a small tensor, elements spread over a large one."""
    bare = tensor.detach()
    values = (bare.view(torch.int16) if bare.dtype == torch.bfloat16 else bare).numpy()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if values.size <= _COMPARED_WHOLE or extent != values.size:  # samples need a tensor without gaps
        return values
    # Odd against the usual sizes (powers of two, nine taps), so that the samples do not all see the same tap.
    step = values.size // _SAMPLES - 1
    return np.lib.stride_tricks.as_strided(values, (_SAMPLES,), (step * values.itemsize,), writeable=False)


def _sum(tensor: Tensor) -> float | None:
    """Of a large tensor whose operations leave no trace."""
    if tensor.is_cuda or not tensor.is_inference() or tensor.numel() <= _COMPARED_WHOLE:
        return None
    return tensor.sum(dtype=torch.float64).item()
