"""Eval mode of blocks built from convolutions, batch norms and ReLUs: each such group in one call of an operator.

A block is described by its layers, read off its modules in every call, so that whatever is done to the modules shows;
kept between calls are only values computed from their parameters.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from pyseg.functional.atrous_conv2d import atrous_conv2d
from pyseg.nn._cache import Cached
from pyseg.nn.atrous_conv2d import AtrousConv2d, batch_norm_affine, packed_weight


class Layer(NamedTuple):
    """A convolution and what follows it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None = None
    relu: bool = False


Kinds = tuple[type[nn.Module], ...]


def layers_of(*modules: nn.Module, separable: Kinds | None = None) -> list[Layer] | None:
    """The layers of modules that run one behind the other; None if they are made of anything else.

    Dropout is left out: it does nothing in eval mode. `separable` are the classes of separable convolutions to look
    into; None: other libraries' composite convolutions, told by name, so that the result needs a check by numbers.
    """
    layers: list[Layer] = []
    for module in _flat(modules, separable):
        last = layers[-1] if layers else None
        if isinstance(module, nn.Conv2d) and _is_plain_conv(module):
            layers.append(Layer(module))
        elif last is not None and not last.relu and last.bn is None and _is_plain_norm(module):
            layers[-1] = last._replace(bn=module)  # type: ignore[arg-type]
        elif last is not None and (type(module) is nn.ReLU or (_is_swapped(module) and isinstance(module, nn.ReLU))):
            layers[-1] = last._replace(relu=True)
        elif type(module) not in (nn.Identity, nn.Dropout, nn.Dropout2d):
            return None
    return layers or None


def _flat(modules: Iterable[nn.Module], separable: Kinds | None) -> Iterator[nn.Module]:
    """The leaves of nested Sequentials and of composite convolutions, in the order they run in."""
    for module in modules:
        known = separable is None or type(module) in separable
        names = _ORDERS.get(type(module).__name__, ()) if known else ()
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _flat(module, separable)
        elif names and all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            yield from _flat((getattr(module, name) for name in names), separable)
        elif known and _is_conv_module(module):
            parts: Any = module
            yield from _flat([parts.conv, *([parts.norm] if parts.with_norm else [])], separable)
            yield from [parts.activate] if parts.with_activation else []
        else:
            yield module


# Composite convolutions by the class's name: the submodules in order. FastFCN; mmcv.
_ORDERS = {
    "SeparableConv2d": ("conv1", "bn", "pointwise"),
    "DepthwiseSeparableConvModule": ("depthwise_conv", "pointwise_conv"),
}


def _is_conv_module(module: nn.Module) -> bool:
    """mmcv's ConvModule, in its usual order and without its special paddings and norms."""
    return (
        type(module).__name__ == "ConvModule"
        and getattr(module, "order", None) == ("conv", "norm", "act")
        and not getattr(module, "with_explicit_padding", True)
        and not getattr(module, "with_spectral_norm", True)
    )


def _is_swapped(module: nn.Module) -> bool:
    """Whether pyseg.accelerate has changed its class: it still stands for what it was."""
    return "_pyseg_swap" in module.__dict__


def _is_plain_conv(conv: nn.Conv2d) -> bool:
    return (
        (type(conv) in (nn.Conv2d, AtrousConv2d) or _is_swapped(conv))
        and "weight" in conv._parameters  # not computed by a parametrization
        and conv.padding_mode == "zeros"
        and not (isinstance(conv, AtrousConv2d) and conv.folded_by_user)
    )


def _is_plain_norm(module: nn.Module) -> bool:
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    plain = type(module) in kinds or (_is_swapped(module) and isinstance(module, nn.BatchNorm2d))
    return plain and module.running_mean is not None and module.running_var is not None


def has_hooks(module: nn.Module | None) -> bool:
    """Whether someone looks at what goes in or out: then the module must see just that."""
    return module is not None and (_has_own_hooks(module) or _has_global_hooks())


def _has_own_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _has_global_hooks() -> bool:
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def can_fold(block: nn.Module, submodules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> bool:
    """Whether a call may leave out the block's submodules, all that there are on every level.

    Eval mode, no derivatives, submodules that do what their classes say, nobody who listens in, and real tensors of
    the devices that the kernels are for.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not _is_eager():  # first: what torch.fx traces with has no values
        return False
    if block.training or _has_global_hooks() or not all(map(_is_untouched, submodules)):
        return False
    tensors = (*inputs, *block.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if not compiling and not all(type(t) in (Tensor, nn.Parameter) and (t.is_cpu or t.is_cuda) for t in tensors):
        return False
    return all(x.dim() == 4 and x.numel() > 0 and x.is_floating_point() for x in inputs)


def _is_untouched(module: nn.Module) -> bool:
    own = module.__dict__
    return not (module.training or _has_own_hooks(module) or "forward" in own or "_conv_forward" in own)


def _is_eager() -> bool:
    """Outside torch.fx, torch.jit, torch.func and forward-mode AD, which do not know writing into `out`."""
    if torch.fx._symbolic_trace.is_fx_symbolic_tracing() or torch._C._is_tracing():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def result_dtype(input: Tensor) -> torch.dtype:
    """What a convolution makes of `input`: autocast's dtype where that is on."""
    device = input.device.type
    if input.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype


class FoldedLayer:
    """Runs one layer of a block; keeps its packed weight, and its batch norm as scale and shift.

    With `channels` it is the part of the layer that reads these input channels. Copies and pickles start empty.
    """

    def __init__(self, channels: slice | None = None, exact: bool = False) -> None:
        self._channels = channels
        self._exact = exact
        self._affine, self._part, self._packed = Cached(), Cached(), Cached()

    def affine(self, layer: Layer) -> tuple[Tensor | None, Tensor | None]:
        """The batch norm as scale and shift of each channel."""
        if layer.bn is None:
            return None, None
        return batch_norm_affine(layer.bn, layer.conv.weight.dtype, self._affine)

    def __call__(
        self,
        layer: Layer,
        input: Tensor,
        *,
        linear: bool = False,
        relu: bool = True,
        extra_shift: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """relu?(scale * (conv(input) + bias) + shift + extra_shift); `linear`: without bias, shift and ReLU."""
        conv = layer.conv
        weight, bias, groups = conv.weight, conv.bias, conv.groups
        scale, shift = self.affine(layer)
        if self._channels is not None:
            part = self._channels
            if groups == 1:
                whole, key = weight, (part.start, part.stop)
                weight = self._part.get((whole,), key, lambda: whole[:, part].contiguous())
            else:
                weight = weight[part]
                groups = weight.shape[0]
                bias, scale, shift = (None if vector is None else vector[part] for vector in (bias, scale, shift))
        if linear:
            bias = shift = None
        elif extra_shift is not None:
            shift = extra_shift if shift is None else shift + extra_shift
        return atrous_conv2d(
            input,
            weight,
            bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            groups,
            scale=scale,
            shift=shift,
            relu=layer.relu and relu and not linear,
            exact=conv.exact if isinstance(conv, AtrousConv2d) else self._exact,
            packed=packed_weight(conv, weight, self._packed),
            out=out,
        )


class BlockFusion:
    """Runs a block from its layers; keeps what they make of their parameters, by the rules of Cached.

    `exact` is that of convolutions that do not say it themselves. Copies and pickles start empty.
    """

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self.clear()

    def __reduce__(self) -> tuple[type["BlockFusion"], tuple[bool]]:
        return type(self), (self._exact,)

    def clear(self) -> None:
        """Forgets all; from now on things are kept again."""
        self._forget()
        self._retired = False
        self._times_cleared: list[int] = []  # the convolutions' own caches

    def _forget(self) -> None:
        self._folded: dict[Any, FoldedLayer] = {}

    def may_fold(self, block: nn.Module, inputs: Sequence[Tensor]) -> bool:
        """can_fold; where not, forgets all: a training step may follow, and on CUDA not all of them leave traces.

        So on CUDA nothing is kept after a call with gradients, until `clear`.
        """
        _, *submodules = block.modules()
        possible = can_fold(block, submodules, inputs)
        if torch.compiler.is_compiling():
            return possible
        times = [conv._packed.times_cleared for conv in submodules if isinstance(conv, AtrousConv2d)]
        if times != self._times_cleared:
            self.clear()
            self._times_cleared = times
        if not possible:
            self._forget()
            if torch.is_grad_enabled() and any(p.requires_grad and p.is_cuda for p in block.parameters()):
                self._retired = True
        return possible

    @property
    def is_in_use(self) -> bool:
        """Whether something is kept: the block has run as a whole."""
        return bool(self._folded)

    @property
    def _keeps(self) -> bool:
        return not (self._retired or torch.compiler.is_compiling())

    def _layer(self, name: str, channels: slice | None = None) -> FoldedLayer:
        """The runner of one layer, under a name of its own, or of some input channels of it; graphs keep nothing."""
        if not self._keeps:
            return FoldedLayer(channels, self._exact)
        folded = self._folded  # other threads may forget it
        key = name if channels is None else (name, channels.start, channels.stop)
        return folded.get(key) or folded.setdefault(key, FoldedLayer(channels, self._exact))

    def _side_by_side(
        self,
        chains: list[list[Layer]],
        inputs: Iterator[Tensor],
        memory_format: torch.memory_format = torch.channels_last,
    ) -> Tensor:
        """The results of all chains of layers, each from its own input, as one tensor that they write into."""
        if torch.compiler.is_compiling():  # in graphs a concatenation, and memory, is left to the compiler
            return torch.cat([self._chain(i, layers, next(inputs)) for i, layers in enumerate(chains)], 1)
        widths = [layers[-1].conv.out_channels for layers in chains]
        parts: tuple[Tensor, ...] = ()
        between: dict[tuple[int, int], Tensor] = {}
        for index, layers in enumerate(chains):
            x = next(inputs)
            if not parts:
                shape = (x.shape[0], sum(widths), *x.shape[2:])
                whole = torch.empty(shape, dtype=result_dtype(x), device=x.device, memory_format=memory_format)
                parts = torch.split(whole, widths, 1)
            self._chain(index, layers, x, between, parts[index])
            del x  # before the next input is made, which can then lie in the same memory
        return whole

    def _chain(
        self,
        index: int,
        layers: list[Layer],
        x: Tensor,
        between: dict[tuple[int, int], Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Layers one behind the other, the last one into `out`.

        What lies between two of them is written into `between`, over what an earlier branch has left there: fresh
        memory costs as much time as a depthwise layer.
        """
        *first, last = layers
        for depth, layer in enumerate(first):
            key = (depth, layer.conv.out_channels)
            x = self._layer(f"branch {index} {depth}")(layer, x, out=None if between is None else between.get(key))
            if between is not None:
                between[key] = x
        return self._layer(f"branch {index} {len(first)}")(last, x, out=out)


class FusedBlock(nn.Module):
    """Mixed into blocks: what they keep for eval mode goes when a convolution's packed weight does."""

    _pyseg_fusion: BlockFusion

    def clear_cache(self) -> None:
        """Forgets what was computed from the parameters, in the submodules, too: the next call computes it anew."""
        self._pyseg_fusion.clear()
        for module in self.modules():
            if isinstance(module, AtrousConv2d):
                module.clear_cache()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._pyseg_fusion.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Self:
        """Training mode on or off, as in torch. Forgets what was kept: in between parameters change."""
        self._pyseg_fusion.clear()
        return super().train(mode)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
