"""segmentation_statistics from its definition, in float64, one column at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def probabilities(logits: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """p, -log p and -log(1 - p), each [N, C, *S], in float64."""
    z = logits.double()
    if activation == "softmax":
        log_p = z.log_softmax(1)
        return log_p.exp(), -log_p, torch.zeros_like(z)
    if activation == "sigmoid":
        return z.sigmoid(), F.softplus(-z, threshold=1000), F.softplus(z, threshold=1000)
    return z, -z.log().clamp_min(-100), -(1 - z).log().clamp_min(-100)


def expand_target(target: Tensor, logits: Tensor, activation: str, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """The target of every class as float64 and whether the element counts as bool, each [N, C, *S]."""
    dense = target.dim() == logits.dim()
    counts = torch.ones(target.shape, dtype=torch.bool, device=target.device)
    if ignore_index is not None and not target.is_floating_point():
        counts = target != ignore_index
    if dense:
        return torch.where(counts, target, 0).double(), counts
    labels = torch.where(counts, target, 0).long()
    if logits.shape[1] == 1 and activation != "softmax":
        return labels.unsqueeze(1).double(), counts.unsqueeze(1)
    one_hot = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)
    return one_hot.double(), counts.unsqueeze(1).expand(logits.shape)


def segmentation_statistics(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    activation: str = "softmax",
    ignore_index: int | None = None,
    gamma: float = 0.0,
    region: bool = True,
    pixel: bool = True,
    smoothing: bool = True,
) -> Tensor:
    r"""Sums over the pixels that count, [N, C, 11] float64: what region and pixel losses are made of.

    With p = activation(logits), g the target (one-hot where it is labels) and w = pixel_weight:

        PG = sum p g, P = sum p, G = sum g, PP = sum p^2, GG = sum g^2, PPG = sum p^2 g                     (region)
        POS = sum w g (1 - p)^gamma (-log p), NEG = sum w (1 - g) p^gamma (-log(1 - p)),                    (pixel)
        WG = sum w g, W = sum w, and NLL = sum w (-log p)                                                   (smoothing)

    NEG is 0 for softmax. Columns that are not asked for are 0. Logarithms of probabilities given as such (activation
    "none") are not below -100. Differentiable by torch's autograd.
    """
    p, log_p, log_rest = probabilities(logits, activation)
    g, counts = expand_target(target, logits, activation, ignore_index)
    w = torch.ones_like(p) if pixel_weight is None else pixel_weight.double().unsqueeze(1).expand(p.shape)
    zero = torch.zeros_like(p)

    def total(x: Tensor) -> Tensor:
        return torch.where(counts, x, zero).flatten(2).sum(2)

    def cross_entropy(share: Tensor, rest: Tensor, log: Tensor) -> Tensor:
        focal = torch.ones_like(rest) if gamma == 0 else rest**gamma
        return total(torch.where(share == 0, zero, w * share * focal * log))

    columns = [total(zero)] * 11
    if region:
        columns[:6] = [total(x) for x in (p * g, p, g, p * p, g * g, p * p * g)]
    if pixel:
        columns[6] = cross_entropy(g, 1 - p, log_p)
        if activation != "softmax":
            columns[7] = cross_entropy(1 - g, p, log_rest)
        columns[8:10] = [total(w * g), total(w)]
    if smoothing:
        columns[10] = total(w * log_p)
    return torch.stack(columns, 2)
