"""2D convolution with dilation and a fused per-channel scale, shift and ReLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyseg._ops import atrous_conv2d as _op
from pyseg._ops.forward_mode import has_tangent
from pyseg._ops.memory_format import is_channels_last

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Pair = int | tuple[int, ...]


def atrous_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    exact: bool = False,
    packed: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""torch.nn.functional.conv2d with an optional per-channel affine map (a folded batch norm) and ReLU behind it.

        y[n, o, i, j] = relu?(scale[o] * (z[n, o, i, j] + bias[o]) + shift[o])
        z[n, o, i, j] = sum_{c, u, v} weight[o, c, u, v] * x[n, c, i*s_h + u*d_h - p_h, j*s_w + v*d_w - p_w]

    with x zero outside the map. "Atrous" convolution with rate d = dilation: DeepLab, Chen et al. 2018 (1606.00915),
    equation 2.

    Args:
        input: [N, C_in, H, W] or [C_in, H, W]. float32, float64, float16 or bfloat16; any strides, channels_last is the
            fastest. The 16-bit types accumulate in float32 and are rounded once, after the epilogue.
        weight: [C_out, C_in / groups, kH, kW].
        bias, scale, shift: [C_out], each may be left out. All tensors have one dtype and device, except under autocast.
        stride, dilation: one integer or (height, width).
        padding: one integer or (height, width), "same" or "valid".
        groups: as in torch.
        relu: clamp at zero, last. A NaN stays a NaN.
        exact: forbid Winograd's algorithm, which the CPU uses where it is faster, gradients too. Its error is at most
            2e-5 of the output's largest magnitude, against 5e-6 without it; sums above about 1e35 overflow; one NaN or
            infinity in `input` makes NaN of the outputs in its tile, not only of those whose window holds it.
        packed: what `torch.ops.pyseg._atrous_conv2d_pack(weight)` returned, to save rearranging a dense weight for each
            call; whoever passes it sees to it that it is not stale, as pyseg.nn.AtrousConv2d does.
        out: tensor for the result, of exactly its shape, dtype and device, not overlapping the other arguments. It may
            be a channel slice of a larger tensor: a concatenation then costs nothing. Without gradients only.

    Returns:
        [N, C_out, H_out, W_out], or without N: H_out = (H + 2*p_h - d_h*(kH - 1) - 1) // s_h + 1, W_out alike.
        channels_last if `input` or `weight` is, like torch.

    What runs here: 3x3 kernels with stride 1, dense (groups=1) or depthwise (groups = C_in = C_out), on the CPU and
    CUDA; dense 1x1 kernels in float32 and float64 on the CPU, with any stride (the input is then thinned out first)
    where the padding is 0. All others go to torch's conv2d, followed by the same epilogue. Differentiable any number of
    times in input, weight, bias, scale and shift, in forward mode by torch's conv2d; torch.func.vmap works,
    torch.func.grad raises (torch has no such transform of operators with Python autograd). On both devices the same
    bits come out in every run, on the CPU for every number of threads. float32 on CUDA obeys torch's tf32 switches for
    cuDNN convolutions. O(N * C_out * C_in / groups * H_out * W_out * kH * kW) time at most; taps that see nothing but
    padding are left out.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit: names argument, expected and got.
    """
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if input.dim() not in (3, 4):
        raise RuntimeError(f"atrous_conv2d: input must be [N, C_in, H, W] or [C_in, H, W], got {list(input.shape)}")
    if weight.dim() != 4:
        raise RuntimeError(f"atrous_conv2d: weight must be [C_out, C_in / groups, kH, kW], got {list(weight.shape)}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"atrous_conv2d: padding must be integers, 'same' or 'valid', got '{padding}'")
    else:
        padding = _pair("padding", padding)

    reason = why_torch(weight, stride, padding, groups, input.shape[-3], input.dtype, input.device.type)
    if reason or has_tangent(input, weight, bias, scale, shift):
        return _torch_conv2d(input, weight, bias, stride, padding, dilation, groups, scale, shift, relu, out)

    if isinstance(padding, str):
        padding = dilation if padding == "same" and weight.shape[-1] == 3 else (0, 0)
    allow_tf32 = input.is_cuda and _op.cudnn_allows_tf32()
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    if stride != (1, 1):
        batch = _every(stride, batch)
    arguments = (batch, weight, bias, scale, shift, padding, dilation, groups, relu, exact, allow_tf32, packed)
    if out is None:
        output: Tensor = torch.ops.pyseg.atrous_conv2d(*arguments)
        return output if input.dim() == 4 else output.squeeze(0)
    if out.dim() != input.dim():
        raise RuntimeError(f"atrous_conv2d: out must have {input.dim()} dimensions like input, got {list(out.shape)}")
    torch.ops.pyseg.atrous_conv2d_out(*arguments, out if input.dim() == 4 else out.unsqueeze(0))
    return out


def why_torch(
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    groups: int,
    channels: int,
    dtype: torch.dtype,
    device: str,
) -> str:
    """Why this convolution is not for our kernels but for torch's; empty if it is for ours."""
    c_out, _, k_h, k_w = weight.shape
    if k_h == k_w == 1:
        return _why_torch_pointwise(stride, padding, groups, dtype, device)
    if k_h != 3 or k_w != 3:
        return f"kernel {k_h}x{k_w} is neither 3x3 nor 1x1"
    if stride != (1, 1):
        return f"stride {stride} is not 1"
    if groups != 1 and not groups == channels == c_out:
        return f"groups {groups} is neither 1 nor C_in = C_out"
    if dtype not in _KERNEL_DTYPES:
        return f"no kernels for {dtype}"
    if device not in _op.DEVICES:
        return f"no kernels for {device} in this installation"
    return ""


def _why_torch_pointwise(
    stride: tuple[int, ...], padding: tuple[int, ...] | str, groups: int, dtype: torch.dtype, device: str
) -> str:
    """why_torch for 1x1: a plain matrix product, which torch has too; here only where this library's is faster."""
    if groups != 1:
        return f"groups {groups} of a 1x1 kernel is not 1"
    if device != "cpu":
        return f"1x1 on {device} is a plain matrix product"
    if dtype not in (torch.float32, torch.float64) or (dtype == torch.float32 and torch.is_autocast_enabled(device)):
        return "1x1 in 16 bits is a plain matrix product"
    if stride != (1, 1) and (min(stride) < 1 or padding not in ((0, 0), "valid")):
        return f"stride {stride} with padding {padding} of a 1x1 kernel"
    return ""


def _every(stride: tuple[int, int], input: Tensor) -> Tensor:
    """The pixels that a 1x1 kernel with this stride reads, in the memory format of `input`."""
    height, width = input.shape[-2:]
    # On a map of one pixel the slice would keep strides that no longer say what the format was.
    if height == 1 and width == 1:
        return input
    thinned = input[..., :: stride[0], :: stride[1]]
    return thinned.contiguous(memory_format=torch.channels_last if is_channels_last(input) else torch.contiguous_format)


def _pair(name: str, value: Pair) -> tuple[int, int]:
    if isinstance(value, int | torch.SymInt):
        return (value, value)
    if len(value) not in (1, 2):
        raise RuntimeError(f"atrous_conv2d: {name} must be one or two integers, got {list(value)}")
    return (value[0], value[-1])


def _torch_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    out: Tensor | None,
) -> Tensor:
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if scale is not None:  # under autocast the output is narrower than the parameters
        output = output * scale.to(output.dtype)[:, None, None]
    if shift is not None:
        output = output + shift.to(output.dtype)[:, None, None]
    if relu:
        output = output.relu()
    if out is None:
        return output
    _op.refuse_gradient(output, out)
    if out.shape != output.shape or out.dtype != output.dtype or out.device != output.device:
        expected, got = (f"{list(t.shape)} {t.dtype} on {t.device}" for t in (output, out))
        raise RuntimeError(f"atrous_conv2d: out must be {expected}, got {got}")
    return out.copy_(output)
