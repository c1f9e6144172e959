"""fuse_query as it is defined: a vector tiled over a map, eight coordinates beside it, and a 1x1 convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fuse_query(
    input: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    normalize: bool = False,
    relu: bool = False,
) -> Tensor:
    """Hu, Rohrbach, Darrell 2016 (1603.06180), section 3.3."""
    images, _, height, width = input.shape
    if normalize:
        input, query = F.normalize(input, dim=1), F.normalize(query, dim=1)
    coordinates = []
    for i in range(height):
        for j in range(width):
            x_min, x_max = 2 * j / width - 1, 2 * (j + 1) / width - 1
            y_min, y_max = 2 * i / height - 1, 2 * (i + 1) / height - 1
            centre = ((x_min + x_max) / 2, (y_min + y_max) / 2)
            coordinates.append([x_min, y_min, x_max, y_max, *centre, 1 / width, 1 / height])
    pixels = torch.tensor(coordinates, dtype=input.dtype).t().reshape(8, height, width)
    tiled = query[:, :, None, None].expand(-1, -1, height, width)
    stacked = torch.cat([input, tiled, pixels.expand(images, -1, -1, -1)], 1)
    output = F.conv2d(stacked, weight, bias)
    return output.relu() if relu else output
