"""Fake kernel of `pyseg::_hausdorff_dt`: hausdorff_dt_loss, which calls it, differentiates by its second result."""

import torch
from torch import Tensor

from pyseg._ops.segmentation_statistics import check, check_logits, check_target, no_double_backward, wide_dtype

_OP = torch.ops.pyseg._hausdorff_dt.default


def _fake(
    logits: Tensor, target: Tensor, classes: list[int], spacing: list[float], one_sided: bool
) -> tuple[Tensor, Tensor]:
    op = "_hausdorff_dt"
    check_logits(op, logits, "softmax")
    check(op, target.dtype == torch.uint8, f"target must be uint8 labels, got {target.dtype}")
    check_target(op, target, logits)
    wide = wide_dtype(logits)
    return logits.new_empty(logits.shape[:2], dtype=torch.float64), logits.new_empty(logits.shape, dtype=wide)


torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, no_double_backward("_hausdorff_dt"))
