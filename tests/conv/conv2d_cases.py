"""Inputs, oracle and error bounds that the tests of atrous_conv2d share."""

import dataclasses

import torch
from torch import Tensor

import pyseg
from pyseg.functional import atrous_conv2d

# Largest error allowed, as a share of the output's largest magnitude. 16-bit: half a unit in the last place, since the
# sum and the epilogue are rounded once, and something for the float32 sum.
BOUNDS = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2**-11 + 3e-5, torch.bfloat16: 2**-8 + 3e-5}
EXACT_BOUNDS = {**BOUNDS, torch.float32: 5e-6}
DTYPES = list(BOUNDS)

LAYOUTS = ["contiguous", "channels_last", "channel_slice", "window", "every_other", "transposed", "expanded"]


def make(shape, dtype=torch.float32, device="cpu", layout="contiguous", seed=0) -> Tensor:
    """A normal random tensor of this shape and memory layout; the values depend on seed and layout only."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(seed)

    def base(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype).to(device)

    match layout:
        case "contiguous":
            return base(n, c, h, w)
        case "channels_last":
            return base(n, h, w, c).permute(0, 3, 1, 2)
        case "channel_slice":
            return base(n, h, w, c + 3).permute(0, 3, 1, 2)[:, 2 : c + 2]
        case "window":
            return base(n, c, h + 2, w + 3)[:, :, 1 : h + 1, 2 : w + 2]
        case "every_other":
            return base(n, c, h, 2 * w)[..., ::2]
        case "transposed":
            return base(n, c, w, h).transpose(2, 3)
        case "expanded":
            return base(1, c, h, 1).expand(n, c, h, w)
    raise ValueError(layout)


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    c_in: int
    h: int
    w: int
    c_out: int
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1
    kernel: int = 3

    def __str__(self) -> str:
        padding, dilation = ("x".join(map(str, pair)) for pair in (self.padding, self.dilation))
        kind = f"{self.c_in}to{self.c_out}" if self.groups == 1 else f"dw{self.c_in}"
        kind = kind if self.kernel == 3 else f"pw{kind}"
        return f"{self.n}x{kind}-{self.h}x{self.w}-p{padding}-d{dilation}"

    @property
    def input_shape(self):
        return (self.n, self.c_in, self.h, self.w)

    @property
    def weight_shape(self):
        return (self.c_out, self.c_in // self.groups, self.kernel, self.kernel)

    @property
    def geometry(self):
        return {"padding": self.padding, "dilation": self.dilation, "groups": self.groups}


def dense(n, c_in, size, c_out, dilation, padding=None) -> Case:
    """A dense case; one number for both axes, padding = dilation where it is not given."""
    h, w = size if isinstance(size, tuple) else (size, size)
    dilation = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    padding = dilation if padding is None else padding if isinstance(padding, tuple) else (padding, padding)
    return Case(n, c_in, h, w, c_out, padding, dilation)


def depthwise(n, channels, size, dilation, padding=None) -> Case:
    return dataclasses.replace(dense(n, channels, size, channels, dilation, padding), groups=channels)


def pointwise(n, c_in, size, c_out, padding=0) -> Case:
    """A dense 1x1 case."""
    return dataclasses.replace(dense(n, c_in, size, c_out, 1, padding), kernel=1)


def vectors(channels, dtype, device, seed=10, names=("bias", "scale", "shift")) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(channels, generator=generator) for name in ("bias", "scale", "shift")}
    return {name: values[name].to(dtype).to(device) for name in names}


def oracle(input, weight, case, **epilogue) -> Tensor:
    """The reference in float64, on the CPU, of the very values that the operator gets."""
    wide = {k: v.cpu().double() if isinstance(v, Tensor) else v for k, v in epilogue.items()}
    return pyseg.reference.atrous_conv2d(input.cpu().double(), weight.cpu().double(), **wide, **case.geometry)


def magnitude(input, weight, case) -> float:
    """The largest sum of magnitudes in the bare convolution: what rounding errors are relative to in small cases."""
    sums = oracle(input.abs(), weight.abs(), case)
    return sums.max().item() if sums.numel() else 0.0


def check(case, *, dtype=torch.float32, device="cpu", layout="channels_last", weight_layout="contiguous", exact=False,
          packed=False, epilogue=(), relu=False, bound=None, seed=0):  # fmt: skip
    """Runs one case and compares with the oracle: values, shape, memory format."""
    input = make(case.input_shape, dtype, device, layout, seed)
    weight = make(case.weight_shape, dtype, device, weight_layout, seed + 1)
    more = vectors(case.c_out, dtype, device, names=epilogue)
    pack = torch.ops.pyseg._atrous_conv2d_pack(weight) if packed and case.groups == 1 else None
    output = atrous_conv2d(input, weight, **more, **case.geometry, relu=relu, exact=exact, packed=pack)
    expected = oracle(input, weight, case, **more, relu=relu)
    assert output.shape == expected.shape
    assert output.dtype == dtype
    assert output.device == input.device
    last = any(torch._prims_common.suggest_memory_format(t) == torch.channels_last for t in (input, weight))
    assert output.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if expected.numel() == 0:
        return
    bound = bound or (EXACT_BOUNDS if exact else BOUNDS)[dtype]
    # Of the convolution's largest magnitude, not of what ReLU and shift may have left of it.
    largest = max(expected.abs().max().item(), oracle(input, weight, case).abs().max().item())
    error = (output.cpu().double() - expected).abs().max().item()
    scales = more["scale"].abs().max().item() if "scale" in more else 1.0
    assert error <= bound * largest * max(1.0, scales), f"{error / largest:.2e} of the largest magnitude"


def check_backward(case, *, dtype=torch.float32, device="cpu", layout="channels_last", exact=False, bound=None, seed=0):
    """Both gradients of the bare convolution against autograd's derivatives of the reference in float64."""
    input = make(case.input_shape, dtype, device, layout, seed)
    weight = make(case.weight_shape, dtype, device, "contiguous", seed + 1)
    wide = [tensor.cpu().double().requires_grad_() for tensor in (input, weight)]
    output = pyseg.reference.atrous_conv2d(*wide, **case.geometry)
    grad = make(output.shape, dtype, device, layout, seed + 2)
    expected = torch.autograd.grad(output, wide, grad.cpu().double())
    arguments = (case.padding, case.dilation, case.groups, exact, False, True, True)
    gradients = torch.ops.pyseg._atrous_conv2d_backward(grad, input, weight, *arguments)
    bound = bound or (EXACT_BOUNDS if exact else BOUNDS)[dtype]
    for name, got, want in zip(("input", "weight"), gradients, expected, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == dtype, name
        if want.numel():
            error = (got.cpu().double() - want).abs().max().item()
            assert error <= bound * want.abs().max().item() + 1e-30, f"{name}: {error / want.abs().max().item():.2e}"
