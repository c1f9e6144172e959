"""pixel_cross_entropy from its definition, in float64."""

import torch
from torch import Tensor

from pyseg.reference.segmentation_statistics import expand_target, probabilities


def pixel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    activation: str = "softmax",
    ignore_index: int | None = None,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The cross-entropy of every pixel, [N, *S] (softmax), or element, [N, C, *S] (sigmoid, none), in float64.

    With p = activation(logits), g the target (one-hot where it is labels), w = class_weight and e = label_smoothing:

        softmax, labels t  (1 - e) w_t (1 - p_t)^gamma (-log p_t) + e / C sum_c w_c (-log p_c)
        softmax, dense     sum_c w_c g_c (1 - p_c)^gamma (-log p_c),  g made (1 - e) g + e / C
        sigmoid, none      w_c (g (1 - p)^gamma (-log p) + (1 - g) p^gamma (-log(1 - p))),  g made (1 - e) g + e / 2

    and 0 where the target is ignore_index. Differentiable by torch's autograd.
    """
    p, log_p, log_rest = probabilities(logits, activation)
    g, counts = expand_target(target, logits, activation, ignore_index)
    classes = logits.shape[1]
    w = torch.ones(classes, dtype=p.dtype, device=p.device) if class_weight is None else class_weight.double()
    w = w.view(-1, *[1] * (logits.dim() - 2))
    zero = torch.zeros_like(p)

    def term(share: Tensor, rest: Tensor, log: Tensor) -> Tensor:
        focal = torch.ones_like(rest) if gamma == 0 else rest**gamma
        return torch.where(counts & (share != 0), w * share * focal * log, zero)

    if activation != "softmax":
        g = (1 - label_smoothing) * g + label_smoothing / 2
        return term(g, 1 - p, log_p) + term(1 - g, p, log_rest)
    if target.dim() == logits.dim():
        return term((1 - label_smoothing) * g + label_smoothing / classes, 1 - p, log_p).sum(1)
    loss = (1 - label_smoothing) * term(g, 1 - p, log_p)
    if label_smoothing:
        loss = loss + label_smoothing / classes * torch.where(counts, w * log_p, zero)
    return loss.sum(1)
