"""confusion_matrix from its definition, one cell at a time."""

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
    """m[i, j] = number of pixels with target i and prediction j, ignored pixels left out. O(num_classes^2 * pixels).

    prediction [N, C, *S] of floats (its argmax counts) or [N, *S] of labels, target [N, *S]. Labels out of range are
    left out.
    """
    labels = prediction.argmax(1) if prediction.is_floating_point() else prediction
    predicted, truth = labels.flatten(1).long(), target.flatten(1).long()  # [N, pixels]
    counted = torch.ones_like(truth, dtype=torch.bool) if ignore_index is None else truth != ignore_index
    matrix = target.new_zeros((target.shape[0], num_classes, num_classes), dtype=torch.int64)
    for i in range(num_classes):
        for j in range(num_classes):
            matrix[:, i, j] = (counted & (truth == i) & (predicted == j)).sum(1)
    return matrix if per_image else matrix.sum(0)
