"""Drop-in replacement of torch.nn.Conv2d over pyseg.functional.atrous_conv2d."""

from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyseg import _loader
from pyseg._ops import atrous_conv2d as _op
from pyseg.functional.atrous_conv2d import atrous_conv2d, why_torch
from pyseg.nn._cache import Cached

torch.fx.wrap("atrous_conv2d")  # one node of a symbolically traced graph


class AtrousConv2dPlan(NamedTuple):
    """How a convolution of one shape will be computed; print it."""

    path: str  # torch, winograd, direct, depthwise (CPU and CUDA), implicit_gemm, plain (CUDA)
    reason: str
    details: dict[str, Any]  # CPU: tiles, products, taps, speedup

    def __str__(self) -> str:
        details = "".join(f", {name} {value}" for name, value in self.details.items())
        return f"{self.path}: {self.reason}{details}"


class AtrousConv2d(nn.Conv2d):
    """torch.nn.Conv2d whose 3x3 stride-1 convolutions, dense or depthwise, and dense 1x1 run on pyseg's kernels.

    Same arguments, attributes, parameters and state_dict as nn.Conv2d, and all other convolutions (other kernels,
    strides, groups) work too: they go to torch. `plan` says which. Formula, dtypes, errors, accuracy and determinism:
    pyseg.functional.atrous_conv2d, with `exact` as there.

    Packed weights. Without gradients for the weight a dense convolution keeps its weight in the kernels' own layout,
    made in the first call and again when the weight has changed. Neither the state_dict nor copies nor pickles of the
    module carry it. Eager calls notice new weights: load_state_dict, in-place operations, assignments, `.data`, `.to()`
    (pyseg/nn/_cache.py says exactly what; `clear_cache()` is there for edits that nothing shows). Graphs that outlive a
    call hold no packed weight: under torch.compile, torch.export, tracing and CUDA graph capture packing is a step of
    the graph, so that they follow their weights, too; inductor's `freezing` option folds it, together with the weights.

    Folded batch norm. `fold_batch_norm` makes a following BatchNorm2d and ReLU part of this module's forward in eval
    mode.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        exact: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_own(exact)

    def _init_own(self, exact: bool) -> None:
        self.exact = exact
        self._packed = Cached()
        self._affine = Cached()
        self._folded: tuple[nn.BatchNorm2d | None, bool] | None = None  # in a tuple: not a child module

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, exact: bool = False) -> Self:
        """The module that computes what `conv` does, on conv's own parameters, hooks and attributes (shared, no copy).

        Also later on the two are one: parameters and hooks set on either are set on both. Raises TypeError for a
        subclass of nn.Conv2d with a forward of its own, a lazy or a parametrized module.
        """
        kind = type(conv)
        plain = (
            isinstance(conv, nn.Conv2d)
            and (kind.forward is nn.Conv2d.forward)
            and kind._conv_forward in (nn.Conv2d._conv_forward, AtrousConv2d._conv_forward)
            and not isinstance(conv, nn.modules.lazy.LazyModuleMixin)
            and not nn.utils.parametrize.is_parametrized(conv)
        )
        if not plain:
            raise TypeError(
                f"AtrousConv2d: conv must be an nn.Conv2d without a forward of its own, got {kind.__name__}"
            )
        module = cls.__new__(cls)
        module.__dict__.update(conv.__dict__)
        module.__dict__.pop("_compiled_call_impl", None)
        module._init_own(exact)
        return module

    # ---- folded batch norm ----

    def fold_batch_norm(self, bn: nn.BatchNorm2d | None, relu: bool = False) -> None:
        """Lets forward compute relu?(bn(conv(x))) in eval mode, in one kernel; with bn=None, relu?(conv(x)).

        `bn` stays where it is in the model and is no child of this module: state_dict keys do not change. Its
        statistics and parameters are read in every call (and folded to a scale and a shift again when they have
        changed), and they get gradients. `applies_folded` tells whether the next forward will do it: not in training
        mode, this module's or bn's. The caller sees to it that bn and the ReLU are skipped then, and only then.

        Raises ValueError if bn normalises with the statistics of the batch even in eval mode, or has other channels.
        """
        if bn is not None and (bn.running_mean is None or bn.running_var is None):
            raise ValueError(
                "AtrousConv2d: bn must have running statistics to be folded, got track_running_stats=False"
            )
        if bn is not None and bn.num_features != self.out_channels:
            raise ValueError(f"AtrousConv2d: bn must have {self.out_channels} features, got {bn.num_features}")
        self._folded = (bn, relu)

    def unfold_batch_norm(self) -> None:
        """Undoes fold_batch_norm."""
        self._folded = None
        self._affine.clear()

    @property
    def folded_by_user(self) -> bool:
        """Whether fold_batch_norm was called, by others than pyseg.accelerate."""
        return self._folded is not None

    @property
    def applies_folded(self) -> bool:
        """Whether forward includes the folded batch norm and ReLU now."""
        if self._folded is None or self.training:
            return False
        bn, _ = self._folded
        return bn is None or not bn.training

    def _epilogue(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, bool]:
        """scale, shift and relu."""
        if self._folded is None or not self.applies_folded:
            return None, None, False
        bn, relu = self._folded
        return (None, None, relu) if bn is None else (*batch_norm_affine(bn, dtype, self._affine), relu)

    # ---- packed weight ----

    def clear_cache(self) -> None:
        """Forgets the packed weight and the folded batch norm's scale and shift: the next call makes them anew."""
        self._packed.clear()
        self._affine.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.clear_cache()  # .to(), .cuda(), .half(): free the old device's memory now
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Self:
        """Training mode on or off, as in torch. Forgets what was cached: in between parameters change."""
        self.clear_cache()
        return super().train(mode)

    def _packed_weight(self, weight: Tensor) -> Tensor | None:
        return packed_weight(self, weight, self._packed)

    # ---- forward ----

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        scale, shift, relu = self._epilogue(weight.dtype)
        return atrous_conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            scale=scale,
            shift=shift,
            relu=relu,
            exact=self.exact,
            packed=self._packed_weight(weight),
        )

    def extra_repr(self) -> str:
        """As in torch, and what is special about this module."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        text += ", exact=True" if self.exact else ""
        if self._folded is not None:
            bn, relu = self._folded
            text += f", folded={'+'.join(['batch_norm'] * (bn is not None) + ['relu'] * relu)}"
        return text

    # ---- plan ----

    def plan(self, input_shape: tuple[int, ...]) -> AtrousConv2dPlan:
        """How an input of this shape [N, C_in, H, W] or [C_in, H, W] will be computed on the weight's device, and why.

        For channels_last or contiguous inputs of the weight's dtype, outside autocast. The CPU's details: `tiles` of
        each axis by kind; per image and pair of channels the `products` that the path multiplies and the `taps` inside
        the map, which the direct path would; `speedup` over the direct path as the cost model sees it.
        """
        if len(input_shape) not in (3, 4) or input_shape[-3] != self.in_channels:
            expected = f"[N, {self.in_channels}, H, W] or [{self.in_channels}, H, W]"
            raise RuntimeError(f"AtrousConv2d: input_shape must be {expected}, got {list(input_shape)}")
        weight, device = self.weight, self.weight.device.type
        reason = why_torch_runs(self, weight)
        if reason:
            return AtrousConv2dPlan("torch", reason, {})
        batch = input_shape[0] if len(input_shape) == 4 else 1
        height, width = input_shape[-2:]
        pad_h, pad_w = self._zero_padding()
        if self.padding_mode != "zeros":
            left, right, top, bottom = self._reversed_padding_repeated_twice
            height, width = height + top + bottom, width + left + right
        if device == "cuda":
            return _cuda_plan(weight, self.groups)
        if self.kernel_size == (1, 1):
            height, width = (-(-size // step) for size, step in zip((height, width), self.stride, strict=True))
        plan = _loader._C.atrous_conv2d_plan(
            batch,
            self.in_channels,
            height,
            width,
            self.out_channels,
            pad_h,
            pad_w,
            *self.dilation,
            self.kernel_size[0],
            self.groups,
            self.exact,
        )
        return AtrousConv2dPlan(plan.pop("path"), plan.pop("reason"), plan)

    def _zero_padding(self) -> tuple[int, ...]:
        if self.padding_mode != "zeros" or self.padding == "valid":
            return (0, 0)
        if isinstance(self.padding, tuple):
            return self.padding
        return self.dilation if self.kernel_size == (3, 3) else (0, 0)


def why_torch_runs(conv: nn.Conv2d, weight: Tensor) -> str:
    """Why a convolution with this weight is not for our kernels but for torch's; empty if it is for ours."""
    padding = conv.padding if conv.padding_mode == "zeros" else (0, 0)  # other modes pad before the convolution
    return why_torch(weight, conv.stride, padding, conv.groups, conv.in_channels, weight.dtype, weight.device.type)


def batch_norm_affine(bn: nn.BatchNorm2d, dtype: torch.dtype, cache: Cached) -> tuple[Tensor, Tensor]:
    """What a batch norm with running statistics does in eval mode, as scale and shift of each channel; cached."""
    mean, variance, gamma, beta, eps = bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps
    assert mean is not None  # the callers have checked
    assert variance is not None

    def affine() -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(variance + eps)
        scale = scale if gamma is None else scale * gamma
        shift = -mean * scale if beta is None else beta - mean * scale
        return scale.to(dtype), shift.to(dtype)

    tensors = tuple(tensor for tensor in (mean, variance, gamma, beta) if tensor is not None)
    result: tuple[Tensor, Tensor] = cache.get(tensors, (dtype, eps), affine)
    return result


def packed_weight(conv: nn.Conv2d, weight: Tensor, cache: Cached) -> Tensor | None:
    """`weight` in the kernels' layout, cached; None where a call packs it for itself or takes it as it is."""
    if torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        return None
    device = weight.device.type
    if conv.groups != 1 or why_torch_runs(conv, weight):
        return None
    if torch.is_grad_enabled() and weight.requires_grad:
        if not torch.compiler.is_compiling():
            cache.retire((weight,))
        return None  # a training step changes it anyway
    dtype = weight.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    pack = torch.ops.pyseg._atrous_conv2d_pack
    packed: Tensor = cache.get((weight,), dtype, lambda: pack(weight.detach().to(dtype)))
    return packed


def _cuda_plan(weight: Tensor, groups: int) -> AtrousConv2dPlan:
    if groups != 1:
        return AtrousConv2dPlan("depthwise", "groups = C_in = C_out", {})
    if weight.dtype == torch.float64:
        return AtrousConv2dPlan("plain", "float64 has no tensor-core path", {})
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return AtrousConv2dPlan("plain", "tensor-core path needs compute capability 8.0", {})
    if weight.dtype == torch.float32 and not _op.cudnn_allows_tf32():
        return AtrousConv2dPlan("plain", "float32 and torch's switches forbid tf32", {})
    return AtrousConv2dPlan("implicit_gemm", "dense, on tensor cores", {})
