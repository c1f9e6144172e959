"""Fake kernel and autograd of `pyseg::_activation_vjp`, the backward pass of an activation."""

import torch
from torch import Tensor

from pyseg._ops.segmentation_statistics import check_logits, check_shape, empty_like_logits, no_double_backward

_OP = torch.ops.pyseg._activation_vjp.default


def _fake(grad_p: Tensor, logits: Tensor, scale: Tensor, activation: str) -> Tensor:
    check_logits("_activation_vjp", logits, activation)
    check_shape("_activation_vjp", "grad_p", grad_p, list(logits.shape))
    check_shape("_activation_vjp", "scale", scale, list(logits.shape[:2]))
    return empty_like_logits(logits)


torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, no_double_backward("_activation_vjp"))
