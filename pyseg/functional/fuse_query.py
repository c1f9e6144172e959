"""A sentence's vector and the pixels' coordinates joined to a feature map, in a 1x1 convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyseg._ops.forward_mode import has_tangent
from pyseg._ops.fuse_query import COORDINATES, composed
from pyseg._ops.segmentation_statistics import FLOATS


def fuse_query(
    input: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    normalize: bool = False,
    relu: bool = False,
) -> Tensor:
    r"""A 1x1 convolution of a map, a vector tiled over it and eight coordinates of each pixel, without that tensor.

        y = relu?(conv2d(cat([x, tile(q), p], 1), weight, bias))
        p[:, i, j] = (xmin, ymin, xmax, ymax, xcentre, ycentre, 1/W, 1/H)     of pixel (i, j), from -1 to 1 over the map

    The first layer of the classification network of Hu, Rohrbach, Darrell 2016 ("Segmentation from Natural Language
    Expressions", 1603.06180, section 3.3); any vector that conditions a map on something else fits. What is computed is

        y[n, k] = relu?(s[n] * (W_x x[n])[k] + (W_q q[n] + b)[k] + c[k] + a_x[k] * u + a_y[k] * v)

    with u and v the centre of the pixel: the vector's part is one product for each image instead of each pixel, the
    coordinates' an affine function of the pixel, and s the normalisation. W_x x is torch's matrix product, and the rest
    one pass over it, in place.

    Args:
        input: x [N, C, H, W]. float32, float64, float16 or bfloat16. Any strides; channels_last and contiguous are read
            as they are.
        query: q [N, C_q], like input.
        weight: [K, C + C_q + 8, 1, 1], of torch's conv2d on the concatenation in this order. (The authors' published
            code has the sentence first.)
        bias: [K] or None.
        normalize: x over its norm in each pixel and q over its own (at least 1e-12), as in the paper. In float32 and
            float64 no normalised copy of x is made. 16-bit types have no room for one over a norm: there, and under
            autocast, x is normalised by torch in float32, and the operator runs on what that is rounded to.
        relu: clamp at zero, last. A NaN stays a NaN.

    Returns:
        [N, K, H, W], channels_last where input is.

    16-bit types are accumulated in float32 and rounded after normalising, after the product and at the end. Products
    are torch's: float32 on CUDA obeys `torch.backends.cuda.matmul`'s precision, where conv2d obeys cuDNN's.
    Differentiable in input, query, weight and bias; the gradient takes one pass over dL/dy (ReLU's gate, and its sums
    over the pixels as they are and weighted by u and v) beside torch's products. Derivatives of higher order fall back
    on the formula in torch's operators, and so do those in forward mode. The passes give the same bits in every run
    and, on the CPU, for every number of threads. vmap runs sample by sample. O(N * C * K * H * W) time instead of
    O(N * (C + C_q + 8) * K * H * W); no memory but the output, in backward one more like it (for ReLU or normalize),
    beside what normalising in 16 bits takes.

    Raises:
        RuntimeError: an argument that does not fit: names argument, expected and got.
    """
    op = "fuse_query"
    if input.dim() != 4:
        raise RuntimeError(f"{op}: input must be [N, C, H, W], got {list(input.shape)}")
    images, channels = input.shape[:2]
    if query.dim() != 2 or query.shape[0] != images:
        raise RuntimeError(f"{op}: query must be [N, C_q] with N = {images}, got {list(query.shape)}")
    stacked = channels + query.shape[1] + COORDINATES
    if weight.dim() != 4 or weight.shape[1:] != (stacked, 1, 1):
        raise RuntimeError(
            f"{op}: weight must be [K, {stacked}, 1, 1] for {channels} + {query.shape[1]} + {COORDINATES} channels, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"{op}: bias must be [K] = [{weight.shape[0]}], got {list(bias.shape)}")
    if input.dtype not in FLOATS:
        raise RuntimeError(f"{op}: input must be float32, float64, float16 or bfloat16, got {input.dtype}")
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, tensor in (("query", query), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype and not autocast:
            raise RuntimeError(f"{op}: {name} must be {input.dtype} like input, got {tensor.dtype}")
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"{op}: {name} must be on {input.device} like input, got {tensor.device}")

    if normalize:
        query = _normalized(query, query.dtype)
        dtype = (
            torch.get_autocast_dtype(input.device.type) if autocast and input.dtype != torch.float64 else input.dtype
        )
        if dtype.itemsize == 2:
            input, normalize = _normalized(input, dtype), False
    parts = [channels, query.shape[1], COORDINATES]
    of_map, of_query, of_coordinates = torch.split(weight.flatten(1), parts, 1)
    offset = F.linear(query, of_query, bias)
    if has_tangent(input, of_map, offset, of_coordinates):
        return composed(input, of_map, offset, of_coordinates, normalize, relu)
    output: Tensor = torch.ops.pyseg.fuse_query(input, of_map, offset, of_coordinates, normalize, relu)[0]
    return output


def _normalized(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Over its norm along dimension 1, in float32 where elements have 16 bits: there the least norm would be zero."""
    return F.normalize(tensor.float() if tensor.dtype.itemsize == 2 else tensor, dim=1).to(dtype)
