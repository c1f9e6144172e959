"""Times every convolution of a model, as it is and in its accelerated forms, on the inputs that it really gets."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyseg._accelerate.measure import Example, difference, interleaved_ms
from pyseg._accelerate.modules import Chain, FoldedConv2d, FusedAtrousConv2d, Swaps
from pyseg.nn.atrous_conv2d import why_torch_runs

Form = type[FusedAtrousConv2d] | None  # what a convolution becomes; None: it stays


def forms_of(chain: Chain) -> list[type[FusedAtrousConv2d]]:
    """What a convolution can become, best guess first."""
    conv = chain.conv
    forms: list[type[FusedAtrousConv2d]] = []
    if not why_torch_runs(conv, conv.weight):
        forms.append(FusedAtrousConv2d)
    if chain.norm is not None:
        forms.append(FoldedConv2d)
    return forms


@dataclass
class Timing:
    """Milliseconds of one call of each form, and how far each is from the original's output."""

    shape: tuple[int, ...]
    ms: dict[Form, float]
    difference: dict[Form, float]


@dataclass
class Trial:
    """Timings of all chains, in the memory format that the model has then."""

    calls: dict[nn.Module, list[Timing]] = field(default_factory=dict)

    def choose(self, chain: Chain) -> Form:
        """The fastest form over all of this convolution's calls; what was never called takes its default."""
        calls = self.calls.get(chain.conv)
        forms = forms_of(chain)
        if not calls:
            return forms[0] if forms else None
        measured = [form for form in (None, *forms) if form in calls[0].ms]
        best = min(measured, key=lambda form: sum(timing.ms[form] for timing in calls))
        if best is None and FoldedConv2d in forms and FoldedConv2d not in measured:
            return FoldedConv2d  # in training mode it does just what the original does, and it gains in eval mode
        return best


class Stopwatch:
    """Runs trials. Convolutions of the same geometry on inputs of the same shape and strides are timed once."""

    def __init__(self, chains: list[Chain], example: Example, exact: bool, say: Callable[[str], None]) -> None:
        self._chains = chains
        self._example = example
        self._exact = exact
        self._say = say
        self._known: dict[Any, Timing] = {}

    def run(self) -> Trial:
        trial = Trial()

        def recorded(chain: Chain, input: Tensor) -> Tensor:
            conv = chain.conv
            key = _geometry(chain, input)
            if key not in self._known:
                self._known[key] = self._time(chain, input.detach())
            trial.calls.setdefault(conv, []).append(self._known[key])
            self._say(f"timed {len(trial.calls)} of {len(self._chains)} convolutions")
            return type(conv).forward(conv, input)

        try:
            for chain in self._chains:
                # Not a hook: a convolution with hooks must not be folded, and that would go for this one, too.
                chain.conv.__dict__["forward"] = functools.partial(recorded, chain)
            self._example.run()
        finally:
            for chain in self._chains:
                chain.conv.__dict__.pop("forward", None)
        return trial

    def _time(self, chain: Chain, input: Tensor) -> Timing:
        folds = not (chain.conv.training or (chain.norm is not None and chain.norm.training))
        forms: list[Form] = [None]
        forms += [form for form in forms_of(chain) if folds or form is not FoldedConv2d]
        calls = [functools.partial(self._step, *self._pipeline(chain, form, folds), input) for form in forms]
        expected, *outputs = [[("output", call())] for call in calls]  # also fills the caches
        differences = [difference(expected, output)[0] for output in outputs]
        times = interleaved_ms(calls, synchronize=self._example.synchronize)
        return Timing(
            tuple(input.shape), dict(zip(forms, times, strict=True)), dict(zip(forms[1:], differences, strict=True))
        )

    def _pipeline(self, chain: Chain, form: Form, folds: bool) -> list[nn.Module]:
        """The chain in one form, on copies that share their parameters with the model's modules."""
        conv, norm, relu = copy.copy(chain.conv), copy.copy(chain.norm), copy.copy(chain.relu)
        conv.__dict__.pop("forward", None)
        if form is not None:
            Swaps().attach(Chain(conv, norm, relu, chain.relu_shared), form, self._exact)
        # In training mode nothing is folded, and a batch norm would count this call in its statistics.
        return [module for module in (conv, norm, relu) if module is not None] if folds else [conv]

    def _step(self, *arguments: Any) -> Tensor:
        """Modules on an input; in training mode with the backward pass behind it."""
        *modules, input = arguments
        backward = self._example.training and torch.is_grad_enabled()
        output = input.requires_grad_() if backward else input
        for module in modules:
            output = module.forward(output)
        if backward:
            leaves = [input, *(p for module in modules for p in module.parameters() if p.requires_grad)]
            torch.autograd.grad(output, leaves, torch.ones_like(output))
        if input.is_cuda:
            torch.cuda.synchronize(input.device)
        return output.detach()


def _geometry(chain: Chain, input: Tensor) -> tuple[Any, ...]:
    """All that a convolution's time depends on."""
    conv, norm = chain.conv, chain.norm
    weight = conv.weight
    flags = (conv.training, norm is not None and norm.training, norm is not None and norm.affine, chain.relu is None)
    layout = (
        tuple(input.shape),
        input.stride(),
        input.dtype,
        input.device,
        weight.shape,
        weight.stride(),
        weight.dtype,
    )
    window = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is None, conv.padding_mode)
    return type(conv), norm is None, chain.relu_shared, weight.requires_grad, *flags, *layout, *window
