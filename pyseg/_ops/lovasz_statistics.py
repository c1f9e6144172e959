"""Fake kernel and autograd of `pyseg::lovasz_statistics`: the Lovasz extension of the Jaccard loss per class and image.

The operator returns each class's loss and that loss's gradient with respect to its p = activation(logits) (hinge: to
the logits), both computed from one sort. The gradient of a combination of losses is then `_activation_vjp`, which takes
the factors of the classes for a scale. Autocast changes nothing: 16-bit logits are read as they are, with errors and
the gradient in float32: in float16 most of it would vanish before a loss scale can save it.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg._ops.segmentation_statistics import check_logits, check_target, empty_like_logits, wide_dtype

_OP = torch.ops.pyseg.lovasz_statistics.default
_VJP = torch.ops.pyseg._activation_vjp.default


def _fake(
    logits: Tensor, target: Tensor, activation: str, ignore_index: int | None, per_image: bool
) -> tuple[Tensor, Tensor]:
    check_logits("lovasz_statistics", logits, "none" if activation == "hinge" else activation)
    check_target("lovasz_statistics", target, logits)
    groups = logits.shape[0] if per_image else 1
    wide = wide_dtype(logits)
    return logits.new_empty((groups, logits.shape[1]), dtype=torch.float64), empty_like_logits(logits, wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.activation, *_ = inputs
    ctx.set_materialize_grads(False)  # no map of zeros for grad_p
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_loss is None:
        return None, None, None, None, None
    logits, grad_p = ctx.saved_tensors
    activation = "none" if ctx.activation == "hinge" else ctx.activation
    return _VJP(grad_p, logits, grad_loss.expand(logits.shape[:2]), activation), None, None, None, None


torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
