"""What accelerate() turns modules into.

An accelerated module stays the same object, with the same parameters, buffers, hooks and state_dict keys: only its
class changes, to a subclass of what it was, and restore() changes it back. So references that others hold, tied
modules, optimisers, copies and pickles all go on working.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from pyseg._accelerate.blocks import is_block, new_fusion
from pyseg.nn import AtrousConv2d
from pyseg.nn._cache import Cached
from pyseg.nn._folded import has_hooks


class Chain:
    """A convolution, and the batch norm and ReLU behind it that its epilogue can take over. Either may be None.

    `relu_shared`: the ReLU also serves other places of the model, as in torchvision's residual blocks.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, relu: nn.ReLU | None, relu_shared: bool) -> None:
        self.conv = conv
        self.norm = norm
        self.relu = relu
        self.relu_shared = relu_shared


class _Swap(NamedTuple):
    """How to turn a module back."""

    original: type[nn.Module]
    attributes: tuple[str, ...]  # that the accelerated class added


def is_accelerated(module: nn.Module) -> bool:
    return "_pyseg_swap" in module.__dict__


def unswap(module: nn.Module) -> None:
    """Makes a module what it was before Swaps.attach."""
    swap = module.__dict__.pop("_pyseg_swap", None)
    if swap is None:
        return
    if isinstance(module, FusedAtrousConv2d):
        module.unfold_chain()
    for name in swap.attributes:
        module.__dict__.pop(name, None)
    module.__class__ = swap.original


class Swaps:
    """The modules that one acceleration changes."""

    def __init__(self) -> None:
        self._swapped: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []  # module, original, new class

    def attach(self, chain: Chain, kind: "type[FusedAtrousConv2d]", exact: bool) -> None:
        """Makes chain.conv a `kind`, and its batch norm and ReLU step aside for it."""
        conv, norm, relu = chain.conv, chain.norm, chain.relu if kind.fuses_relu else None
        own = {"_folded_weight": Cached()} if kind is FoldedConv2d else {}
        self._swap(conv, kind, _pyseg_chain=chain, **own)
        assert isinstance(conv, FusedAtrousConv2d)
        if "exact" in conv._pyseg_swap.attributes:  # else the user has chosen it for a module of ours
            conv.exact = exact
        conv.fold_chain()
        if norm is not None:
            self._swap(norm, FoldedBatchNorm2d, _pyseg_chain=chain)
        if relu is not None and not is_accelerated(relu):
            self._swap(relu, FoldedReLU, _pyseg_chain=None if chain.relu_shared else chain)

    def attach_part(self, module: nn.Module, kind: type[nn.Module], exact: bool) -> None:
        """Makes a part of a model, of a detector or a block, a `kind`."""
        original = type(module)
        own = {"_pyseg_fusion": new_fusion(original, exact)} if is_block(original) else {}
        self._swap(module, kind, **own)

    def _swap(self, module: nn.Module, kind: type[nn.Module], **attributes: object) -> None:
        original, before = type(module), set(module.__dict__)
        module.__class__ = kind
        if isinstance(module, AtrousConv2d) and not issubclass(original, AtrousConv2d):
            module._init_own(exact=False)
        module.__dict__.update(attributes)
        added = tuple(name for name in module.__dict__ if name not in before)
        module.__dict__["_pyseg_swap"] = _Swap(original, added)
        self._swapped.append((module, original, kind))

    def set(self, on: bool) -> None:
        """Turns all of them into their originals for a while, or back; packed weights stay."""
        for module, original, kind in self._swapped:
            module.__class__ = kind
            if isinstance(module, FusedAtrousConv2d):
                if on:
                    module.fold_chain()
                elif issubclass(original, AtrousConv2d):
                    module.unfold_chain()
            module.__class__ = kind if on else original

    def undo(self) -> None:
        for module, _, _ in self._swapped:
            unswap(module)
        self._swapped.clear()


class FusedAtrousConv2d(AtrousConv2d):
    """AtrousConv2d with the batch norm and ReLU of its chain in the kernel's epilogue, in eval mode."""

    fuses_relu = True
    _pyseg_chain: Chain | None
    _pyseg_swap: _Swap

    def fold_chain(self) -> None:
        chain = self._pyseg_chain
        if chain is not None and self._folds_chain:
            self.fold_batch_norm(chain.norm, self.fuses_relu and chain.relu is not None)

    def unfold_chain(self) -> None:
        """Undoes fold_chain, and leaves alone what the user has folded."""
        if self._folds_chain:
            self.unfold_batch_norm()

    @property
    def _folds_chain(self) -> bool:
        chain = self._pyseg_chain
        return chain is not None and (chain.norm is not None or (self.fuses_relu and chain.relu is not None))

    @property
    def folded_by_user(self) -> bool:
        return super().folded_by_user and not self._folds_chain

    @property
    def applies_folded(self) -> bool:
        chain = self._pyseg_chain
        if chain is None or has_hooks(self):
            return False
        ready = chain.norm is None or (isinstance(chain.norm, FoldedBatchNorm2d) and not has_hooks(chain.norm))
        return ready and super().applies_folded

    def applies_relu(self) -> bool:
        return (
            self._pyseg_chain is not None
            and self._folded is not None
            and self._folded[1]
            and self.applies_folded
            and not has_hooks(self._pyseg_chain.relu)
        )

    def _epilogue(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, bool]:
        scale, shift, _ = super()._epilogue(dtype)
        return scale, shift, self.applies_relu()

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        chain = self._pyseg_chain
        if chain is not None and chain.relu_shared and not torch.compiler.is_compiling() and self.applies_relu():
            output._pyseg_rectified = True  # type: ignore[attr-defined]  # for FoldedReLU
        return output

    def _replicate_for_data_parallel(self) -> Self:
        # The chain holds this device's batch norm: on the others the modules work one by one.
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._pyseg_chain = None
        replica._folded = None
        return replica


class FoldedConv2d(FusedAtrousConv2d):
    """torch's convolution with the batch norm of its chain multiplied into the weights, in eval mode."""

    fuses_relu = False

    _folded_weight: Cached

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale, shift, _ = self._epilogue(weight.dtype)
        if scale is None or shift is None:
            return nn.Conv2d._conv_forward(self, input, weight, bias)

        def fold() -> tuple[Tensor, Tensor]:
            return weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale

        tensors = (weight, scale, shift) if bias is None else (weight, scale, shift, bias)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            weight, bias = fold()
        else:
            weight, bias = self._folded_weight.get(tensors, None, fold)
        return nn.Conv2d._conv_forward(self, input, weight, bias)

    def clear_cache(self) -> None:
        super().clear_cache()
        self._folded_weight.clear()


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that lets through what the convolution before it has normalised already."""

    _pyseg_chain: Chain | None

    def forward(self, input: Tensor) -> Tensor:
        conv = None if self._pyseg_chain is None else self._pyseg_chain.conv
        # A part of the model may have been restored.
        if isinstance(conv, FusedAtrousConv2d) and conv.applies_folded:
            return input
        return super().forward(input)

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._pyseg_chain = None
        return replica


class FoldedReLU(nn.ReLU):
    """A ReLU that lets through what the convolution before it has clamped already.

    One that serves several places tells its inputs apart by the mark that FusedAtrousConv2d leaves on its output.
    Running all the same is never wrong, since ReLU is idempotent: it does so where marks would not do, in graphs.
    """

    _pyseg_chain: Chain | None

    def forward(self, input: Tensor) -> Tensor:
        if self._pyseg_chain is not None:
            conv = self._pyseg_chain.conv
            skip = isinstance(conv, FusedAtrousConv2d) and conv.applies_relu()
        else:
            # The mark is used up, lest it outlive what the caller does to the tensor next.
            skip = not torch.compiler.is_compiling() and vars(input).pop("_pyseg_rectified", False)
        return input if skip else super().forward(input)

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._pyseg_chain = None
        return replica
