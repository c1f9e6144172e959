"""Running a model on example inputs: repeatable calls, times, and the comparison of outputs."""

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# One median is worth at least this many rounds; short calls get as many as fit into _SECONDS_PER_FORM.
_MIN_ROUNDS = 3
_MAX_ROUNDS = 25
_SECONDS_PER_FORM = 0.05


Outputs = list[tuple[str, Tensor]]  # where a tensor is in the output, and the tensor


class Example:
    """Example inputs of a model, in the mode that the model is in.

    A call leaves the model as it was: buffers (running statistics) and torch's random state are put back, parameters
    keep their gradients. In training mode a call is a forward and backward pass.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._model = model
        self._inputs = inputs
        self._args, self._kwargs = _arguments(inputs)
        self.training = any(module.training for module in model.modules())
        self._parameters = [p for p in model.parameters() if p.requires_grad] if model.training else []
        devices = {t.device for t in (*model.parameters(), *model.buffers(), *self._tensors()) if t.is_cuda}
        self._cuda = sorted(devices, key=str)

    def _tensors(self) -> list[Tensor]:
        return [tensor for _, tensor in tensors_in((self._args, self._kwargs))]

    def run(self) -> Outputs:
        """The tensors of the model's output, copied, since later calls may write into the same memory."""
        return [(path, tensor.detach().clone()) for path, tensor in tensors_in(self._call()[0])]

    def seconds(self) -> float:
        """The time of one call."""
        return self._call()[1]

    def rounding_error(self, outputs: Outputs) -> float | None:
        """How far `outputs` are from those in float64; None where the model does not run in it."""
        try:
            double = Example(copy.deepcopy(self._model).double(), _clone(self._inputs, torch.float64))
            exact = [(path, t.to(like.dtype)) for (path, t), (_, like) in zip(double.run(), outputs, strict=True)]
        except Exception:  # user code, in a dtype that it may not have been written for
            return None
        return difference(exact, outputs)[0]

    def _call(self) -> tuple[Any, float]:
        # A model may work in place on its input.
        args, kwargs = _clone((self._args, self._kwargs))
        with self._undisturbed(), torch.random.fork_rng(self._cuda):
            torch.manual_seed(0)
            # no_grad, not inference_mode: tensors that the model keeps for itself must still be good for training.
            with nullcontext() if self._parameters else torch.no_grad():
                self.synchronize()
                start = time.perf_counter()
                output = self._model(*args, **kwargs)
                if self._parameters:
                    self._backward(output)
                self.synchronize()
                return output, time.perf_counter() - start

    def _backward(self, output: Any) -> None:
        losses = [tensor.float().mean() for _, tensor in tensors_in(output) if tensor.requires_grad]
        if losses:
            torch.autograd.grad(torch.stack(losses).sum(), self._parameters, allow_unused=True)

    def synchronize(self) -> None:
        """Waits for the devices that the model works on."""
        for device in self._cuda:
            torch.cuda.synchronize(device)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        buffers = [(b, b.detach().clone()) for b in self._model.buffers()] if self.training else []
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def interleaved_ms(
    calls: Sequence[Callable[[], object]],
    rounds: int | None = None,
    synchronize: Callable[[], object] = lambda: None,
) -> list[float]:
    """Median milliseconds of each call, the calls taking turns; they have been run once before.

    A call that returns a float says itself how many seconds it took. synchronize: waits for what a call has started.
    """
    times: list[list[float]] = [[] for _ in calls]
    while True:
        for call, taken in zip(calls, times, strict=True):
            synchronize()
            start = time.perf_counter()
            result = call()
            synchronize()
            taken.append(result if isinstance(result, float) else time.perf_counter() - start)
        done = len(times[0])
        enough = max(sum(taken) for taken in times) > _SECONDS_PER_FORM or done >= _MAX_ROUNDS
        if done == rounds or (rounds is None and done >= _MIN_ROUNDS and enough):
            return [statistics.median(taken) * 1e3 for taken in times]


# ---- nested outputs ----


def tensors_in(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested tuples, lists, mappings and dataclasses, with where they are."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from tensors_in(getattr(value, item.name), f"{path}.{item.name}")


def _clone(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of plain containers with copies of their tensors, of the given dtype if they are of a floating one."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        if dtype is not None and value.is_floating_point():
            copied = copied.to(dtype)
        return copied.requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {key: _clone(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_clone(item, dtype) for item in value)
    return value


def difference(expected: Outputs, got: Outputs) -> tuple[float, str]:
    """The largest difference of two outputs, relative to each tensor's largest magnitude, and where it is.

    Of integer tensors (label maps) it is the share of elements that differ. Equal infinities and NaN in both are no
    difference, nor is another order of a detector's detections; another structure or shape is infinitely far.
    """
    if [path for path, _ in expected] != [path for path, _ in got]:
        return math.inf, f"tensors {[path for path, _ in expected]}, got {[path for path, _ in got]}"
    got = _in_same_order(expected, got)
    worst, where = 0.0, ""
    for (path, a), (_, b) in zip(expected, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf, f"{path} {list(a.shape)} {a.dtype}, got {list(b.shape)} {b.dtype}"
        value = _difference(a, b)
        if value > worst:
            worst, where = value, path
    return worst, where


def _in_same_order(expected: Outputs, got: Outputs) -> Outputs:
    """`got` with the detections of each image in the order of the expected ones.

    Detectors sort them by their scores, and where scores are equal to rounding, rounding decides. Detections are the
    tensors [K, ...] of a mapping with boxes [K, 4] and labels [K].
    """
    wanted, found = dict(expected), dict(got)
    orders: dict[str, Tensor] = {}
    for path, boxes in found.items():
        parent = path.removesuffix("['boxes']")
        labels, wanted_labels = (tensors.get(parent + "['labels']") for tensors in (found, wanted))
        if parent == path or labels is None or wanted_labels is None:
            continue
        if not len(boxes) or not boxes.shape == wanted[path].shape == (*labels.shape, 4) == (*wanted_labels.shape, 4):
            continue
        distance = torch.cdist(wanted[path].double(), boxes.double(), p=1.0)
        order = distance.masked_fill(wanted_labels[:, None] != labels, math.inf).argmin(1)
        if len(set(order.tolist())) == len(order):
            orders[parent] = order
    return [(path, _taken(tensor, orders.get(path[: path.rfind("[")]))) for path, tensor in got]


def _taken(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None or tensor.shape[:1] != order.shape else tensor[order]


def _difference(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return (a != b).double().mean().item()
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    same = (a == b) | (a.isnan() & b.isnan())
    error = (a - b).abs().masked_fill_(same, 0.0)
    if not error.isfinite().all():
        return math.inf
    magnitude = a.abs()
    largest = magnitude[magnitude.isfinite()].max().item() if magnitude.isfinite().any() else 0.0
    return error.max().item() / max(largest, torch.finfo(torch.float32).tiny)
