"""Fake kernel of `pyseg::confusion_matrix`. Counts have no gradient."""

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels

_OP = torch.ops.pyseg.confusion_matrix.default
MOST_CLASSES = 32767
_LOGITS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def _fake(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None, per_image: bool = False
) -> Tensor:
    def check(condition: bool, message: str) -> None:
        torch._check(condition, lambda: f"confusion_matrix: {message}")

    check(1 <= num_classes <= MOST_CLASSES, f"num_classes must be in [1, {MOST_CLASSES}], got {num_classes}")
    labels = "uint8, int8, int16, int32, int64 or bool"
    check(target.dtype in _LABELS, f"target must be {labels}, got {target.dtype}")
    check(target.dim() >= 1, f"target must be [N, *S], got {list(target.shape)}")
    logits = prediction.dtype in _LOGITS
    check(
        logits or prediction.dtype in _LABELS,
        f"prediction must be logits (float32, float64, float16 or bfloat16) or labels ({labels}), "
        f"got {prediction.dtype}",
    )
    expected = list(target.shape)
    if logits:
        expected.insert(1, num_classes)
    message = f"prediction must be {expected} ({'logits' if logits else 'labels'}), got {list(prediction.shape)}"
    check(prediction.dim() == len(expected), message)
    for got, size in zip(prediction.shape, expected, strict=True):
        check(got == size, message)
    check(prediction.device == target.device, "prediction must be on the device of target")
    images = [target.shape[0]] if per_image else []
    return target.new_empty([*images, num_classes, num_classes], dtype=torch.int64)


torch.library.register_fake(_OP, _fake)
