"""Masks of boxes into images, and masks of images into boxes."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyseg._ops import paste_masks as _op  # noqa: F401  registers the fake kernels
from pyseg._ops.forward_mode import refuse_tangents
from pyseg.functional.roi_align import roi_align


@overload
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float | None = None,
    output: Literal["dense", "packed"] = "dense",
    *,
    padding: int = 1,
) -> Tensor: ...
@overload
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float | None = None,
    *,
    output: Literal["rle"],
    padding: int = 1,
) -> list[dict[str, Any]]: ...
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float | None = None,
    output: Literal["dense", "packed", "rle"] = "dense",
    *,
    padding: int = 1,
) -> Tensor | list[dict[str, Any]]:
    r"""Resizes each mask to its box (Mask R-CNN's last step) and writes it into an image of zeros.

    As torchvision's paste_masks_in_image: the mask gets a frame of `padding` zeros, its box grows about its centre by
    the share that the frame adds to the mask's width (along both axes, for masks that are not square too) and is cut to
    whole pixels (towards 0, last pixel included), and the framed mask is resized to that, bilinear with
    align_corners=False. Each pixel is written once.

    Args:
        masks: [K, m_h, m_w] or [K, 1, m_h, m_w], float32, float64, float16 or bfloat16.
        boxes: [K, 4] of x1, y1, x2, y2 in pixels of the image, any real dtype.
        image_size: height and width of the image.
        threshold: None for the values themselves; else whether a pixel of the box is above it, rounded to the masks'
            dtype as torch does. Packed masks and run lengths take 0.5 where it is None.
        output: "dense" [K, H, W], of the masks' dtype or, with a threshold, of bool. "packed" [K, H, ceil(W / 8)] of
            uint8, the first of eight columns in the highest bit: numpy.unpackbits(packed, axis=-1, count=W). "rle": for
            each mask {"size": [H, W], "counts": bytes}, COCO's compressed run lengths, as pycocotools.mask.encode makes
            them. Neither of the last two ever holds a dense mask.
        padding: width of the frame.

    Dense values are differentiable by `masks`, any number of times; nothing else has a gradient. Deterministic, the
    same bits for every number of threads. Time is O(output) and O(pixels of the boxes); run lengths need no image,
    O(pixels of the boxes) alone. "rle" waits for a CUDA device once.

    Raises:
        RuntimeError: a shape, dtype or combination that does not fit; on the CPU a box that is not finite. (On CUDA
            such boxes cover no pixel.)
    """
    op = "paste_masks"
    if output not in ("dense", "packed", "rle"):
        raise RuntimeError(f"{op}: output must be dense, packed or rle, got {output}")
    if masks.dim() == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if not boxes.is_floating_point():
        boxes = boxes.float()
    height, width = image_size
    limit = 0.5 if threshold is None else float(threshold)
    if output == "rle":
        data, sizes = torch.ops.pyseg.paste_masks_rle(masks.detach(), boxes.detach(), height, width, limit, padding)
        return _split(bytes(data.cpu().numpy()), sizes.tolist(), [height, width])
    kind = "packed" if output == "packed" else "values" if threshold is None else "bool"
    if kind == "values":
        refuse_tangents(op, masks)
    return torch.ops.pyseg.paste_masks(masks, boxes.detach(), height, width, limit, kind, padding)


def crop_masks(
    masks: Tensor,
    boxes: Tensor,
    indices: Tensor,
    output_size: int | Sequence[int],
    *,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    r"""The part of a mask in each box, resized: Mask R-CNN's mask targets.

        output[k] = roi_align(masks[indices[k]], boxes[k])

    as torchvision's project_masks_on_boxes with the defaults, and as detectron2 with aligned=True.

    Args:
        masks: [N, H, W] of bool or uint8 (what is not zero counts as 1), which are read as they are; or floats, which
            are `roi_align`'s own.
        boxes: [K, 4] of x1, y1, x2, y2 in pixels of the masks.
        indices: [K], which mask a box belongs to.
        output_size: height and width, or one number for both.
        sampling_ratio, aligned: as in `roi_align`.

    Returns:
        [K, *output_size] in float32 (floats: the masks' dtype), from 0 to 1. Deterministic. Masks of floats only are
        differentiable, and their boxes.
    """
    size = [output_size] * 2 if isinstance(output_size, int) else list(output_size)
    wide = boxes.dtype if boxes.dtype == torch.float64 else torch.float32  # 16-bit types cannot count the masks
    rows = torch.cat([indices.to(boxes.device, wide)[:, None], boxes.to(wide)], 1)
    if masks.is_floating_point():
        return roi_align(masks[:, None], rows, size, 1.0, sampling_ratio, aligned)[:, 0]
    return torch.ops.pyseg.crop_masks(masks, rows.detach(), size, sampling_ratio, aligned)


def _split(data: bytes, sizes: list[int], image_size: list[int]) -> list[dict[str, Any]]:
    results, start = [], 0
    for size in sizes:
        results.append({"size": list(image_size), "counts": data[start : start + size]})
        start += size
    return results
