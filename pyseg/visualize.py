"""Drawing segmentations: overlays, cut-outs and panels of pictures. Needs Pillow (the `demo` extra brings it)."""

import colorsys
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

_BACKGROUND: Color = (255, 255, 255)
_INK: Color = (32, 32, 32)
_GAP = 12
_CHECKER = 12  # pixels of one square behind transparent parts


def overlay_mask(
    image: Image, mask: npt.NDArray[np.floating[Any]], color: Color = (255, 60, 60), alpha: float = 0.5
) -> Image:
    """Tints an image where the mask is and darkens it elsewhere, with a line along the mask's edge.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W], 0 to 1.
        color: of the tint, RGB.
        alpha: strength of the tint where the mask is 1, and of the shade where it is 0.

    Returns: [H, W, 3] uint8.
    """
    _check("overlay_mask", image, mask)
    weight = np.clip(mask, 0, 1).astype(np.float32)[..., None]
    pixels = image.astype(np.float32)
    tinted = pixels + alpha * (np.asarray(color, np.float32) - pixels)
    shaded = pixels * (1 - 0.8 * alpha)
    result = weight * tinted + (1 - weight) * shaded
    result[_edge(mask >= 0.5)] = color
    return np.rint(result).astype(np.uint8)


def display_instances(
    image: Image,
    boxes: npt.NDArray[Any],
    masks: npt.NDArray[Any] | None,
    class_ids: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    alpha: float = 0.45,
    show_boxes: bool = True,
    show_captions: bool = True,
) -> Image:
    """Draws detected objects: each one's mask tinted, with its contour, its box and a caption in a colour of its own.

    Args:
        image: [H, W, 3] uint8.
        boxes: [K, 4] of x1, y1, x2, y2 in pixels, as detectors return them.
        masks: [K, H, W], bool or 0 to 1; None for boxes alone.
        class_ids: [K], positions in `class_names`.
        class_names: the names of all classes.
        scores: [K], written behind the names where they are given.
        alpha: strength of the tint.
        show_boxes, show_captions: whether to draw them.

    Returns: [H, W, 3] uint8. Later objects are drawn over earlier ones.
    """
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    name = "display_instances"
    count = len(boxes)
    for what, values in (("masks", masks), ("class_ids", class_ids), ("scores", scores)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: {what} must have {count} elements for as many boxes, got {len(values)}")
    colors = [_instance_color(i) for i in range(count)]
    pixels = image.astype(np.float32)
    if masks is None:
        _check(name, image, np.empty(image.shape[:2]))
    else:
        for mask, color in zip(masks, colors, strict=True):
            _check(name, image, mask)
            inside = mask.astype(np.float32) >= 0.5
            pixels[inside] += alpha * (np.asarray(color, np.float32) - pixels[inside])
            pixels[_edge(inside)] = color
    picture = PILImage.fromarray(np.rint(pixels).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10, min(image.shape[:2]) // 40))
    for i, (box, color) in enumerate(zip(np.asarray(boxes, np.float64), colors, strict=True)):
        x1, y1, x2, y2 = (float(value) for value in box)
        if show_boxes:
            draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=color, width=1)
        if show_captions:
            text = class_names[int(class_ids[i])] + ("" if scores is None else f" {float(scores[i]):.2f}")
            right, bottom = draw.textbbox((0, 0), text, font=font)[2:]
            # Above the box, and within the image.
            x = max(0.0, min(x1, image.shape[1] - right - 2))
            y = max(0.0, min(y1 - bottom - 2, image.shape[0] - bottom - 2))
            draw.rectangle((x, y, x + right + 2, y + bottom + 2), fill=color)
            draw.text((x + 1, y + 1), text, fill=_INK, font=font)
    return np.asarray(picture).copy()


def cutout(image: Image, mask: npt.NDArray[np.floating[Any]]) -> Image:
    """The image with the mask as its transparency: [H, W, 4] uint8, from [H, W, 3] uint8 and [H, W] in 0 to 1."""
    _check("cutout", image, mask)
    alpha = np.rint(np.clip(mask, 0, 1) * 255).astype(np.uint8)
    return np.dstack([image, alpha])


def mask_image(mask: npt.NDArray[np.floating[Any]]) -> Image:
    """A mask [H, W] in 0 to 1 as a grey image [H, W, 3] uint8."""
    return np.repeat(np.rint(np.clip(mask, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def save_panel(
    path: str | os.PathLike[str], images: Sequence[Image], titles: Sequence[str], height: int = 420, caption: str = ""
) -> None:
    """Writes images side by side, scaled to one height, each under its title, and a caption below.

    Args:
        path: of the file; its ending names the format.
        images: [H, W, 3] or [H, W, 4] uint8; what is transparent shows a checkerboard.
        titles: as many.
        height: of the images in pixels. Wide images make it smaller, so that the panel is at most 4096 pixels wide.
        caption: one line of text.
    """
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    if len(images) != len(titles) or not images:
        raise ValueError(f"save_panel: titles must be {len(images)} for as many images (1 or more), got {len(titles)}")
    aspects = [image.shape[1] / image.shape[0] for image in images]
    room = 4096 - _GAP * (len(images) + 1)
    height = max(1, min(height, int(room / sum(aspects))))
    widths = [max(1, round(aspect * height)) for aspect in aspects]
    font = ImageFont.load_default(size=18)
    line = 30

    size = (sum(widths) + _GAP * (len(images) + 1), height + line + 2 * _GAP + (line if caption else 0))
    panel = PILImage.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(panel)
    x = _GAP
    for image, title, width in zip(images, titles, widths, strict=True):
        draw.text((x, _GAP), title, fill=_INK, font=font)
        picture = PILImage.fromarray(image).resize((width, height), PILImage.Resampling.LANCZOS)
        if image.shape[2] == 4:
            panel.paste(PILImage.fromarray(_checkerboard(width, height)), (x, _GAP + line))
            panel.paste(picture, (x, _GAP + line), picture)
        else:
            panel.paste(picture, (x, _GAP + line))
        x += width + _GAP
    if caption:
        draw.text((_GAP, height + line + 2 * _GAP), caption, fill=_INK, font=font)
    panel.save(path)


def _instance_color(index: int) -> Color:
    """Hues a golden ratio apart: neighbours in the list differ, and no two are alike for long."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def _check(name: str, image: Image, mask: npt.NDArray[Any]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"{name}: image must be [H, W, 3] uint8, got {list(image.shape)} {image.dtype}")
    if mask.shape != image.shape[:2]:
        raise ValueError(f"{name}: mask must be {list(image.shape[:2])}, got {list(mask.shape)}")


def _edge(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels inside that touch the outside; the line gets thicker with the image."""
    width = max(1, min(inside.shape) // 300)
    core = np.pad(inside, width, mode="edge")
    eroded = inside.copy()
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        y, x = dy * width, dx * width
        eroded &= core[y : y + inside.shape[0], x : x + inside.shape[1]]
    return inside & ~eroded


def _checkerboard(width: int, height: int) -> Image:
    y, x = np.mgrid[:height, :width]
    squares = (y // _CHECKER + x // _CHECKER) % 2
    return np.repeat(np.where(squares == 0, 235, 205).astype(np.uint8)[..., None], 3, axis=2)
