"""Point supervision from its definition (Bearman et al. 2016), in float64, one term after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def point_supervision_loss(
    logits: Tensor,
    target: Tensor,
    image_labels: Tensor | None = None,
    point_weight: Tensor | None = None,
    objectness: Tensor | None = None,
    background: Sequence[int] = (0,),
    ignore_index: int = -100,
) -> Tensor:
    r"""L_img, L_point - L_img and L_obj of every image, [N, 3]; differentiable by torch's autograd.

    S = softmax(logits) over the classes, t_c = argmax_i S_ic:

        L_img    -1/|L| sum_{c in L} log S_{t_c c} - 1/|L'| sum_{c in L'} log(1 - S_{t_c c})
        points   -sum_{i in I_s} alpha_i log S_{i G_i}, alpha_i = point_weight, or 1/|I_s| where that is None
        L_obj    -1/|I| sum_i P_i log sum_{c in O} S_ic + (1 - P_i) log(1 - sum_{c in O} S_ic), P = objectness

    Without image_labels L are the classes of an image's points, and the background. Probabilities are kept as their
    log-odds x: log S = logsigmoid(x), log(1 - S) = logsigmoid(-x), so that none rounds to 1.
    """
    z = logits.double().flatten(2)  # [N, C, pixels]
    labels = target.flatten(1).long()
    images, classes, pixels = z.shape
    objects = [c for c in range(classes) if c not in set(background)]
    zero = z[:, :0].sum()  # depends on the logits, whatever there is to add up
    x = torch.stack([_log_odds(z, [c]) for c in range(classes)], 1)
    rows = []
    for n in range(images):
        supervised = (labels[n] != ignore_index).nonzero().flatten()
        if not pixels:
            presence = [-1] * classes
        elif image_labels is not None:
            presence = image_labels[n].long().sign().tolist()
        elif len(supervised):
            of_points = set(labels[n, supervised].tolist())
            presence = [int(c in of_points or c not in objects) for c in range(classes)]
        else:
            presence = [-1] * classes

        present = [-logsigmoid(x[n, c].max(0).values) for c in range(classes) if presence[c] > 0]
        absent = [-logsigmoid(-x[n, c].max(0).values) for c in range(classes) if presence[c] == 0]
        image = sum(present, zero) / max(len(present), 1) + sum(absent, zero) / max(len(absent), 1)

        point = zero
        for i in supervised.tolist():
            alpha = 1 / len(supervised) if point_weight is None else point_weight[n].flatten()[i].double()
            point = point - alpha * logsigmoid(x[n, labels[n, i], i])

        prior = zero
        if objectness is not None and pixels:
            p, u = objectness[n].flatten().double(), _log_odds(z[n : n + 1], objects)[0]
            prior = -(p * logsigmoid(u) + (1 - p) * logsigmoid(-u)).mean()
        rows.append(torch.stack([image, point, prior]))
    return torch.stack(rows) if rows else zero.expand(0, 3)


def _log_odds(z: Tensor, chosen: Sequence[int]) -> Tensor:
    """Of some classes' probability together, [N, pixels]."""
    others = [c for c in range(z.shape[1]) if c not in set(chosen)]
    return z[:, list(chosen)].logsumexp(1) - z[:, others].logsumexp(1)
