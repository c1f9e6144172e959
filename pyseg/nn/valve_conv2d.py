"""Valve filters as modules: pyseg.functional.valve_conv2d and region_gate with their parameters."""

from typing import Any

import torch
from torch import Tensor, nn

from pyseg.functional.valve_conv2d import Combine, region_gate, valve_conv2d

Pair = int | tuple[int, int]


class RegionGate(nn.Module):
    """Multiplies features by a convolution of a region map (or adds it), such as behind a batch norm.

    forward(features [N, channels, H, W], region [N, region_channels, H_r, W_r]) -> [N, channels, H, W]; formula, dtypes
    and errors: pyseg.functional.region_gate.

    Parameters (state_dict): `weight` [channels, region_channels, *kernel_size] and, with bias=True, `bias` [channels].
    A new module lets everything through: the weights are 0, and the biases 1 for combine="multiply", otherwise 0. So it
    can be put into a trained network, which then learns what to close. `padding` is by default half the kernel.
    """

    def __init__(
        self,
        channels: int,
        region_channels: int = 1,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | None = None,
        dilation: Pair = 1,
        bias: bool = True,
        *,
        combine: Combine = "multiply",
        relu: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel = _pair(kernel_size)
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = _half_of(kernel, self.dilation) if padding is None else _pair(padding)
        self.combine, self.relu = combine, relu
        self.weight = nn.Parameter(torch.empty(channels, region_channels, *kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights 0 and neutral biases; without biases an open gate is the mean of the region in the window."""
        _open_valves(self.weight, self.bias, self.combine)

    def forward(self, features: Tensor, region: Tensor) -> Tensor:
        return region_gate(
            features,
            region,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            combine=self.combine,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        channels, region_channels, *kernel = self.weight.shape
        return (
            f"{channels}, {region_channels}, kernel_size={tuple(kernel)}, stride={self.stride}, "
            f"padding={self.padding}, combine={self.combine!r}, relu={self.relu}"
        )


class ValveConv2d(nn.Conv2d):
    """A convolution with valve filters: each image filter has one that acts on the region map and multiplies it.

    forward(image [N, in_channels, H, W], region [N, region_channels, H_r, W_r]) -> [N, out_channels, H_out, W_out];
    formula, dtypes, what is fused and errors: pyseg.functional.valve_conv2d. Eppel 2017 (1708.08711, 1710.05126).

    Parameters (state_dict): `weight` and `bias` of nn.Conv2d, with its defaults, so that a trained first layer can be
    loaded with strict=False; `valve_weight` [out_channels, region_channels, *valve_kernel_size] and, with bias=True,
    `valve_bias` [out_channels]. A new valve is open everywhere (weights 0, biases 1), as in the author's later
    programs; valve_std=0.01 draws both from a normal distribution about 0, as in those of the papers.

    `valve_kernel_size`, `valve_stride`, `valve_padding` and `valve_dilation` are by default the image's, the padding
    such that the windows' centres coincide. `padding` is by default 0, as in nn.Conv2d. No groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        bias: bool = True,
        *,
        region_channels: int = 1,
        valve_kernel_size: Pair | None = None,
        valve_stride: Pair | None = None,
        valve_padding: Pair | None = None,
        valve_dilation: Pair | None = None,
        combine: Combine = "multiply",
        relu: bool = False,
        valve_std: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias, device=device, dtype=dtype
        )
        kernel = self.kernel_size if valve_kernel_size is None else _pair(valve_kernel_size)
        self.valve_stride, self.valve_padding, self.valve_dilation = valve_stride, valve_padding, valve_dilation
        self.combine, self.relu, self.valve_std = combine, relu, valve_std
        made = {"device": device, "dtype": dtype}
        self.valve_weight = nn.Parameter(torch.empty(out_channels, region_channels, *kernel, **made))
        self.valve_bias = nn.Parameter(torch.empty(out_channels, **made)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not hasattr(self, "valve_weight"):  # nn.Conv2d's constructor calls this, too
            return
        if self.valve_std == 0:
            _open_valves(self.valve_weight, self.valve_bias, self.combine)
            return
        for parameter in (self.valve_weight, self.valve_bias):
            if parameter is not None:
                nn.init.normal_(parameter, std=self.valve_std)

    def forward(self, input: Tensor, region: Tensor) -> Tensor:  # type: ignore[override]
        return valve_conv2d(
            input,
            region,
            self.weight,
            self.valve_weight,
            self.bias,
            self.valve_bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]  # __init__ takes no strings
            self.dilation,
            valve_stride=self.valve_stride,
            valve_padding=self.valve_padding,
            valve_dilation=self.valve_dilation,
            combine=self.combine,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        _, channels, *kernel = self.valve_weight.shape
        valve = f"region_channels={channels}, valve_kernel_size={tuple(kernel)}, combine={self.combine!r}"
        return f"{super().extra_repr()}, {valve}, relu={self.relu}"  # type: ignore[no-untyped-call]


def _open_valves(weight: Tensor, bias: Tensor | None, combine: str) -> None:
    if bias is not None:
        nn.init.zeros_(weight)
        nn.init.constant_(bias, 1.0 if combine == "multiply" else 0.0)
    elif combine == "multiply":
        nn.init.constant_(weight, 1.0 / max(1, weight[0].numel()))
    else:
        nn.init.zeros_(weight)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _half_of(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    return (kernel[0] - 1) * dilation[0] // 2, (kernel[1] - 1) * dilation[1] // 2
