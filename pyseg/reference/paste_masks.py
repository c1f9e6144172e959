"""Mask pasting and non-maximum suppression, one pixel and one box at a time."""

import torch
from torch import Tensor


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], padding: int = 1) -> Tensor:
    """What torchvision's paste_masks_in_image computes, [K, H, W] in float64. O(K * H * W) Python steps.

    The places of the boxes are those of float32 (float64 for such boxes), as in torch.
    """
    height, width = image_size
    images = []
    for mask, box in zip(masks.double(), boxes if boxes.dtype == torch.float64 else boxes.float(), strict=True):
        framed = torch.nn.functional.pad(mask, (padding,) * 4)
        x1, y1, x2, y2 = box
        left, right, columns = _place(x1, x2, mask.shape[1], padding)
        top, bottom, rows = _place(y1, y2, mask.shape[1], padding)
        image = []
        for y in range(height):
            for x in range(width):
                if top <= y <= bottom and left <= x <= right:
                    image.append(_value(framed, (y - top + 0.5) / rows, (x - left + 0.5) / columns))
                else:
                    image.append(framed.new_zeros(()))
        images.append(torch.stack(image).reshape(height, width) if image else framed.new_zeros(height, width))
    return torch.stack(images) if images else masks.new_zeros(0, height, width).double()


def _place(low: Tensor, high: Tensor, mask_width: int, padding: int) -> tuple[int, int, int]:
    """First and last pixel and number of pixels of the framed mask along an axis; none in an inverted box."""
    scale = torch.tensor((mask_width + 2 * padding) / mask_width, dtype=low.dtype)
    half, centre = (high - low) * 0.5, (high + low) * 0.5
    first, last = int(centre - half * scale), int(centre + half * scale)
    return first, last, max(last - first + 1, 1)


def _value(framed: Tensor, y: float, x: float) -> Tensor:
    """Bilinear at a share of the height and width."""
    axes = []
    for share, size in zip((y, x), framed.shape, strict=True):
        at = max(share * size - 0.5, 0.0)
        low = min(int(at), size - 1)
        axes.append(((low, 1 - (at - low)), (min(low + 1, size - 1), at - low)))
    rows, columns = axes
    terms = [wy * wx * framed[i, j] for i, wy in rows for j, wx in columns]
    return torch.stack(terms).sum()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, idxs: Tensor | None = None) -> Tensor:
    """Greedy non-maximum suppression: overlaps in the boxes' arithmetic, compared as doubles. O(K^2) Python steps."""
    kept: list[int] = []
    for row in scores.argsort(descending=True, stable=True).tolist():
        rivals = [other for other in kept if idxs is None or idxs[other] == idxs[row]]
        if not any(_iou(boxes[other], boxes[row]).double() > iou_threshold for other in rivals):
            kept.append(row)
    return torch.tensor(kept, dtype=torch.int64)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0)
    overlap = sides.prod()
    return overlap / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap)
