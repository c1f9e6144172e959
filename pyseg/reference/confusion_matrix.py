"""confusion_matrix from its definition, by one-hot tensors of target and prediction."""

import torch
from torch import Tensor


def confusion_matrix(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int | None = None,
    *,
    per_image: bool = False,
) -> Tensor:
    """m[i, j] = sum over pixels of [target = i] * [prediction = j], ignored pixels left out.

    prediction [N, C, *S] of floats (its argmax counts) or [N, *S] of labels, target [N, *S]. Labels out of range are
    left out. O(num_classes^2 * pixels), exact below 2^53 pixels.
    """
    labels = prediction.argmax(1) if prediction.is_floating_point() else prediction
    predicted, truth = (x.unsqueeze(-1).flatten(1).long() for x in (labels, target))  # [N, pixels]
    counted = torch.ones_like(truth, dtype=torch.bool) if ignore_index is None else truth != ignore_index
    classes = torch.arange(num_classes, device=target.device)
    is_truth = ((truth[..., None] == classes) & counted[..., None]).double()  # [N, pixels, classes]
    is_predicted = (predicted[..., None] == classes).double()
    matrix = torch.einsum("npi,npj->nij", is_truth, is_predicted).long()
    return matrix if per_image else matrix.sum(0)
