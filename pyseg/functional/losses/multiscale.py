"""Cross-entropy at several resolutions of a decoder, and label maps pooled to these.

Arguments, empty cases, dtypes, determinism and cost that all losses share: pyseg.functional.losses.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyseg.functional.losses._common import Weight, one_of
from pyseg.functional.losses.distribution import cross_entropy

Pooling = Literal["stochastic", "majority", "nearest"]


def pool_labels(
    target: Tensor,
    size: tuple[int, int],
    pooling: Pooling = "stochastic",
    *,
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A label map at a lower resolution: [N, *size] of [N, H, W], each label that of a window of H / h x W / w pixels.

    stochastic: the label of a pixel drawn from the window's, so that a class is drawn as often as it has pixels there
    (stochastic pooling, Zeiler and Fergus 2013, of one-hot labels). majority: the most frequent label, the smallest of
    several. nearest: the label of the middle pixel. Ignored pixels do not take part in the first two; a window of such
    pixels alone is ignored.

    Args:
        target: [N, H, W] of an integer dtype.
        size: (h, w), divisors of H and W.
        pooling: see above.
        ignore_index: the label of ignored pixels.
        generator: for "stochastic".

    Raises:
        ValueError: an argument that does not fit.
    """
    op = "pool_labels"
    one_of(op, "pooling", pooling, ("stochastic", "majority", "nearest"))
    if target.dim() != 3 or target.is_floating_point():
        raise ValueError(f"{op}: target must be [N, H, W] of integers, got {list(target.shape)} {target.dtype}")
    (height, width), (h, w) = target.shape[1:], size
    if h < 1 or w < 1 or height % h or width % w:
        raise ValueError(f"{op}: size must divide [{height}, {width}], got {list(size)}")
    rows, columns = height // h, width // w
    if rows == columns == 1:
        return target
    if pooling == "nearest":
        return target[:, rows // 2 :: rows, columns // 2 :: columns]
    windows = target.reshape(-1, h, rows, w, columns).transpose(2, 3).flatten(3)
    if pooling == "stochastic":
        order = torch.rand(windows.shape, generator=generator, device=target.device)
        chosen = order.masked_fill(windows == ignore_index, -1.0).argmax(-1, keepdim=True)
        return windows.gather(-1, chosen).squeeze(-1)
    windows = windows.sort(-1).values
    at = torch.arange(rows * columns, device=target.device)
    begins = torch.ones_like(windows, dtype=torch.bool)
    begins[..., 1:] = windows[..., 1:] != windows[..., :-1]
    before = at - torch.where(begins, at, 0).cummax(-1).values  # equal labels before this one
    chosen = before.masked_fill(windows == ignore_index, -1).argmax(-1, keepdim=True)
    return windows.gather(-1, chosen).squeeze(-1)


def multiscale_cross_entropy(
    inputs: Sequence[Tensor],
    target: Tensor,
    scale_weights: Sequence[float] | None = None,
    *,
    weight: Weight = None,
    pooling: Pooling = "stochastic",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""sum_s a_s * cross_entropy(inputs[s], pool_labels(target, size of inputs[s])): the loss of a decoder at all
    scales.

    Multi-scale loss minimisation as in Ma et al. 2017 (1703.08866), section III: each resolution of the decoder
    predicts, and is compared with labels pooled to it.

    Args:
        inputs: logits [N, C, h_s, w_s] of each scale s.
        target: labels [N, H, W], H and W multiples of all h_s and w_s.
        scale_weights: a_s; by default one over the number of scales.
        weight: [C], of the classes.
        pooling, ignore_index, generator: as in pool_labels.

    Returns: a scalar. Each cross-entropy is the mean over its pixels.
    """
    if len(inputs) == 0 or (scale_weights is not None and len(scale_weights) != len(inputs)):
        got = None if scale_weights is None else list(scale_weights)
        raise ValueError(f"multiscale_cross_entropy: scale_weights must be {len(inputs)} numbers, 1 or more, got {got}")
    factors = scale_weights or [1 / len(inputs)] * len(inputs)
    losses = []
    for factor, logits in zip(factors, inputs, strict=True):
        size = (logits.shape[2], logits.shape[3])
        labels = pool_labels(target, size, pooling, ignore_index=ignore_index, generator=generator)
        losses.append(factor * cross_entropy(logits, labels, weight, ignore_index=ignore_index))
    return torch.stack(losses).sum()
