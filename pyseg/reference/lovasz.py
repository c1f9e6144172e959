"""The Lovasz extension of the Jaccard loss from the paper, in float64, one class at a time."""

import torch
from torch import Tensor

from pyseg.reference.segmentation_statistics import expand_target, probabilities


def lovasz_statistics(
    logits: Tensor,
    target: Tensor,
    activation: str = "softmax",
    ignore_index: int | None = None,
    per_image: bool = False,
) -> Tensor:
    r"""The loss of every class, [N, C] (per_image) or [1, C], in float64 (Berman et al. 2018, algorithm 1).

    Errors m = |g - p| of the pixels of a class that count, or max(0, 1 - z (2 g - 1)) for activation "hinge", in
    descending order; J_k = 1 - (sum g - cumsum(g)_k) / (sum g + cumsum(1 - g)_k); loss = sum_k m_k (J_k - J_{k-1}).
    Differentiable by torch's autograd, which holds the order fixed.
    """
    if activation == "hinge":
        p = logits.double()
        g, counts = expand_target(target, logits, "sigmoid", ignore_index)
    else:
        p = probabilities(logits, activation)[0]
        g, counts = expand_target(target, logits, activation, ignore_index)
    g = (g >= 0.5).double()
    errors = (1 - p * (2 * g - 1)).relu() if activation == "hinge" else (g - p).abs()

    def loss(m: Tensor, own: Tensor, kept: Tensor) -> Tensor:
        m, own = m[kept], own[kept]
        m, order = m.sort(descending=True, stable=True)
        own = own[order]
        jaccard = 1 - (own.sum() - own.cumsum(0)) / (own.sum() + (1 - own).cumsum(0))
        return m @ jaccard.diff(prepend=jaccard.new_zeros(1))

    groups = [[i] for i in range(len(logits))] if per_image else [list(range(len(logits)))]
    rows = [
        torch.stack(
            [loss(errors[i, c].flatten(), g[i, c].flatten(), counts[i, c].flatten()) for c in range(p.shape[1])]
        )
        for i in groups
    ]
    return torch.stack(rows) if rows else p.new_zeros(0, p.shape[1])
