"""pyseg.functional.fuse_query with parameters."""

import math

import torch
from torch import Tensor, nn

from pyseg._ops.fuse_query import COORDINATES
from pyseg.functional.fuse_query import fuse_query


class FuseQuery(nn.Module):
    r"""The 1x1 convolution of a map, a vector tiled over it and eight coordinates of each pixel, without that tensor.

    See `pyseg.functional.fuse_query` for the formula, dtypes, layouts and errors. Parameters and state_dict are those
    of `torch.nn.Conv2d(in_channels + query_channels + 8, out_channels, 1)`, and so is how they are drawn.

    Args:
        in_channels, query_channels: of the map and of the vector.
        out_channels: of the result.
        bias: whether there is one.
        normalize: map and vector are divided by their norms first.
        relu: clamp at zero, last.

    Input [N, in_channels, H, W] and [N, query_channels], result [N, out_channels, H, W].
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        query_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        normalize: bool = False,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.query_channels, self.out_channels = in_channels, query_channels, out_channels
        self.normalize, self.relu = normalize, relu
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels + query_channels + COORDINATES, 1, 1))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, query: Tensor) -> Tensor:
        return fuse_query(input, query, self.weight, self.bias, normalize=self.normalize, relu=self.relu)

    def extra_repr(self) -> str:
        switches = "".join(f", {name}=True" for name in ("normalize", "relu") if getattr(self, name))
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.query_channels}, {self.out_channels}{bias}{switches}"
