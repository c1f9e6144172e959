"""Fake kernels and autograd of `pyseg::paste_masks`, `pyseg::paste_masks_rle` and `pyseg::crop_masks`.

Pasted values are linear in the masks; their boxes, cut to whole pixels, have no gradient, and neither have comparisons,
run lengths and crops of boolean masks.
"""

from typing import Any

import torch
from torch import Tensor

from pyseg import _loader  # noqa: F401  registers the kernels
from pyseg._ops.segmentation_statistics import FLOATS, check

_PASTE = torch.ops.pyseg.paste_masks.default
_BACKWARD = torch.ops.pyseg._paste_masks_backward.default
_RLE = torch.ops.pyseg.paste_masks_rle.default
_CROP = torch.ops.pyseg.crop_masks.default


def _check(op: str, masks: Tensor, boxes: Tensor) -> None:
    check(op, masks.dim() == 3, f"masks must be [K, m_h, m_w], got {list(masks.shape)}")
    check(op, masks.dtype in FLOATS, f"masks must be float32, float64, float16 or bfloat16, got {masks.dtype}")
    message = f"boxes must be [{masks.shape[0]}, 4] for as many masks, got {list(boxes.shape)}"
    check(op, boxes.dim() == 2, message)
    check(op, boxes.shape[0] == masks.shape[0], message)
    check(op, boxes.shape[1] == 4, message)


def _fake_paste(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, output: str, padding: int
) -> Tensor:
    op = "paste_masks"
    _check(op, masks, boxes)
    check(op, output in ("values", "bool", "packed"), f"output must be values, bool or packed, got {output}")
    dtype = {"values": masks.dtype, "bool": torch.bool, "packed": torch.uint8}[output]
    return masks.new_empty((masks.shape[0], height, (width + 7) // 8 if output == "packed" else width), dtype=dtype)


def _fake_backward(grad: Tensor, boxes: Tensor, mask_height: int, mask_width: int, padding: int) -> Tensor:
    return grad.new_empty((grad.shape[0], mask_height, mask_width))


def _fake_rle(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int
) -> tuple[Tensor, Tensor]:
    _check("paste_masks_rle", masks, boxes)
    total = torch.library.get_ctx().new_dynamic_size()
    return masks.new_empty(total, dtype=torch.uint8), masks.new_empty(masks.shape[0], dtype=torch.int64)


def _fake_crop(masks: Tensor, boxes: Tensor, size: list[int], sampling_ratio: int, aligned: bool) -> Tensor:
    op = "crop_masks"
    check(op, masks.dtype in (torch.bool, torch.uint8), f"masks must be bool or uint8, got {masks.dtype}")
    check(op, masks.dim() == 3, f"masks must be [N, H, W], got {list(masks.shape)}")
    check(op, boxes.dim() == 2, f"boxes must be [K, 5], got {list(boxes.shape)}")
    check(op, boxes.shape[1] == 5, f"boxes must be [K, 5], got {list(boxes.shape)}")
    check(op, len(size) == 2, f"output_size must be 2 positive integers, got {list(size)}")
    return masks.new_empty((boxes.shape[0], *size), dtype=torch.float32)


torch.library.register_fake(_PASTE, _fake_paste)
torch.library.register_fake(_BACKWARD, _fake_backward)
torch.library.register_fake(_RLE, _fake_rle)
torch.library.register_fake(_CROP, _fake_crop)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    masks, boxes, _, _, _, kind, ctx.padding = inputs
    ctx.mask_size = masks.shape[1:]
    ctx.save_for_backward(boxes)
    if kind != "values":
        ctx.mark_non_differentiable(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _BACKWARD(grad, *ctx.saved_tensors, *ctx.mask_size, ctx.padding), *[None] * 6


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, boxes, _, _, ctx.padding = inputs
    ctx.image_size = grad.shape[1:]
    ctx.save_for_backward(boxes)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _PASTE(grad, *ctx.saved_tensors, *ctx.image_size, 0.5, "values", ctx.padding), *[None] * 4


torch.library.register_autograd(_PASTE, _backward, setup_context=_setup)
torch.library.register_autograd(_BACKWARD, _double_backward, setup_context=_setup_backward)
