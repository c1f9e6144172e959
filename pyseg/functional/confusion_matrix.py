"""What was predicted against what is there, counted pixel by pixel."""

import torch
from torch import Tensor

from pyseg._ops import confusion_matrix as _op  # noqa: F401  registers the fake kernel


def confusion_matrix(
    prediction: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    *,
    per_image: bool = False,
) -> Tensor:
    r"""Counts of pixels by their class in `target` (row) and their predicted class (column).

        m[i, j] = #{p : target[p] = i, predicted[p] = j, target[p] != ignore_index}
        predicted[p] = argmax_c prediction[c, p]

    Rows are the truth and columns the prediction, as in scikit-learn and torchmetrics. The argmax is part of the
    kernel: logits are read once and nothing of their size is stored.

    Args:
        prediction: [N, C, *S] of floats, logits or probabilities (float32, float64, float16, bfloat16; any strides,
            channels_last is read in place): the class of a pixel is the first that has the largest value, and NaN
            counts as the largest, as in torch.argmax. Or [N, *S] of integers (uint8, int8, int16, int32, int64, bool):
            labels.
        target: [N, *S] labels, of the same integer dtypes. *S is any number of dimensions, none too.
        num_classes: C, at most 32767; may be left out for logits. One channel of binary logits is not two classes: hand
            over the labels `logits[:, 0] > 0` and num_classes=2.
        ignore_index: pixels with this target are left out, whatever was predicted there.
        per_image: one matrix for each of the N images, instead of their sum.

    Returns:
        [C, C] int64, or [N, C, C] with per_image; exact up to 2^63. Zeros for an empty or wholly ignored batch.

    Labels that are neither in [0, C) nor ignored: an error on the CPU. On CUDA, where that would take a wait for the
    device, the whole matrix (with per_image that of the image) gets -2^48 added to every cell: it stays negative
    when matrices are added up, the metrics made from it are NaN, and pyseg.nn.ConfusionMatrix raises an error.

    Deterministic on both devices, the same for every number of threads: integer sums do not depend on their order. No
    gradient. O(N * C * |S|) time; no memory beyond histograms (at most 32 KB a thread up to 32 classes, 514 KB up to
    256, none above).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or on the CPU a label out of range.
    """
    if num_classes is None:
        if not prediction.is_floating_point():
            raise RuntimeError("confusion_matrix: num_classes must be given for labels, got None")
        if prediction.dim() < 2:
            raise RuntimeError(f"confusion_matrix: prediction must be [N, C, *S], got {list(prediction.shape)}")
        num_classes = prediction.shape[1]
    matrix: Tensor = torch.ops.pyseg.confusion_matrix(prediction, target, num_classes, ignore_index, per_image)
    return matrix
