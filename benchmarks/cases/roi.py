"""RoIAlign, its pyramid, mask pasting and non-maximum suppression beside torchvision, for an image of 800x1216.

Boxes lie anywhere in the image; on one level they have the sizes that a pyramid would send there (14 to 28 elements a
side), over all levels sides from 16 to 700 pixels. The floor is the part of the maps that boxes cover, read once, and
the output, written once; backward also the gradient's zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import Case, Contender, Prepared, Workload

BASELINE = "torchvision"
FAMILY_NOTES: dict[str, str] = {}  # measured reasons, by the summary's row
TOLERANCE = 1e-4  # coordinates are rounded in another order
HEIGHT, WIDTH, CHANNELS = 800, 1216, 256


def boxes_of(count: int, least: float, most: float) -> Tensor:
    """[count, 5]: sides are log-uniform, in pixels of the image."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    side, aspect = uniform(np.log(least), np.log(most)).exp(), uniform(-0.35, 0.35).exp()
    x, y, w, h = uniform(0, WIDTH), uniform(0, HEIGHT), side * aspect, side / aspect
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    return torch.cat([torch.zeros(count, 1), corners.clamp_min(0)], 1).clamp_max(
        torch.tensor([0.0, WIDTH, HEIGHT, WIDTH, HEIGHT])
    )


def map_of(level: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, CHANNELS, HEIGHT >> level, -(-WIDTH >> level), generator=generator)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def cases() -> list[Case]:
    one_level = [
        _align(OneLevel(level, count, size, ratio, backward))
        for backward in (False, True)
        for level in (2, 3, 4, 5)
        for count in (512, 1000)
        for size in (7, 14)
        for ratio in (2, 0)
    ]
    pyramids = [
        _pyramid(count, size, ratio, backward)
        for backward in (False, True)
        for count in (512, 1000)
        for size in (7, 14)
        for ratio in (2, 0)
    ]
    return one_level + pyramids + [_paste(kind) for kind in _PASTES] + [_nms(classes) for classes in (1, 80)]


# ---- RoIAlign ----


@dataclass(frozen=True)
class OneLevel:
    level: int
    count: int
    size: int
    ratio: int
    backward: bool

    @property
    def name(self) -> str:
        points = "adaptive" if self.ratio == 0 else f"{self.ratio}x{self.ratio}"
        way = "backward" if self.backward else "forward"
        return f"roi_align/{way}/1:{1 << self.level}/{self.count} boxes/{self.size}x{self.size}/{points}"


def _align(one: OneLevel) -> Case:
    scale = 1.0 / (1 << one.level)

    def build() -> Workload:
        from torchvision.ops import roi_align as theirs

        from pyseg.functional import roi_align as ours

        input, boxes = map_of(one.level), boxes_of(one.count, 14 / scale, 28 / scale)
        arguments = (boxes, one.size, scale, one.ratio)

        def prepare(function: Callable[..., Tensor], x: Tensor, last: bool) -> Prepared:
            if not one.backward:
                return Prepared(lambda: function(x, *arguments))
            leaf = x.detach().requires_grad_()
            output = function(leaf, *arguments)
            grad = _gradient(output.shape)
            grad = channels_last(grad) if last else grad
            return Prepared(lambda: torch.autograd.grad(output, leaf, grad, retain_graph=True))

        def expected() -> list[Tensor]:
            x = input.double().requires_grad_(one.backward)
            output = theirs(x, boxes.double(), one.size, scale, one.ratio)
            if not one.backward:
                return [output]
            return [*torch.autograd.grad(output, x, _gradient(output.shape).double())]

        return Workload(
            [
                Contender(BASELINE, lambda: prepare(theirs, input, False)),
                Contender("torchvision channels_last", lambda: prepare(theirs, channels_last(input), True)),
                Contender("pyseg NCHW", lambda: prepare(ours, input, False), ours=True),
                Contender("pyseg channels_last", lambda: prepare(ours, channels_last(input), True), ours=True),
            ],
            expected,
        )

    way = "backward" if one.backward else "forward"
    return Case(
        name=one.name,
        groups=(f"RoIAlign, {way}", f"RoIAlign, {way}, {one.size}x{one.size}"),
        build=build,
        params={"level": one.level, "boxes": one.count, "output": one.size, "sampling_ratio": one.ratio},
        baseline=BASELINE,
        tolerance=TOLERANCE,
        least=lambda: (0, _least([one.level], boxes_of(one.count, 14 / scale, 28 / scale), one.size, one.backward)),
        inference=not one.backward,
        quick=(1, 2) if one.count == 1000 and one.size == 7 and one.level in (2, 4) and one.ratio == 2 else (),
    )


def _gradient(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _least(levels: list[int], boxes: Tensor, size: int, backward: bool) -> int:
    """Bytes: of the maps what boxes cover (backward: all, since the rest is set to zero), and of the outputs."""
    elements = 0
    for level in levels:
        shape = map_of(level).shape[2:]
        covered = np.zeros(shape, bool)
        if backward:
            covered[:] = True
        for x1, y1, x2, y2 in (boxes[:, 1:] / (1 << level)).tolist():
            covered[int(y1) : int(y2) + 2, int(x1) : int(x2) + 2] = True
        elements += int(covered.sum()) * CHANNELS
    return 4 * (elements + len(boxes) * CHANNELS * size * size)


def _pyramid(count: int, size: int, ratio: int, backward: bool) -> Case:
    levels, names = [2, 3, 4, 5], ["0", "1", "2", "3"]

    def build() -> Workload:
        from torchvision.ops import MultiScaleRoIAlign

        import pyseg

        maps = [map_of(level, level) for level in levels]
        boxes = [boxes_of(count, 16, 700)[:, 1:]]

        def prepare(module: Any, maps: list[Tensor], last: bool) -> Prepared:
            leaves = [x.detach().requires_grad_(backward) for x in maps]
            features = dict(zip(names, leaves, strict=True))
            if not backward:
                return Prepared(lambda: module(features, boxes, [(HEIGHT, WIDTH)]))
            grad = _gradient(torch.Size((count, CHANNELS, size, size)))
            grad = channels_last(grad) if last else grad

            def step() -> list[Tensor]:
                output = module(features, boxes, [(HEIGHT, WIDTH)])
                return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

            return Prepared(step)

        def ours(last: bool) -> Prepared:
            module = pyseg.nn.MultiScaleRoIAlign(names, size, ratio)
            return prepare(module, [channels_last(x) for x in maps] if last else maps, last)

        def expected() -> list[Tensor]:
            result = prepare(MultiScaleRoIAlign(names, size, ratio), maps, False).call()
            return [result.double()] if isinstance(result, Tensor) else [each.double() for each in result]

        return Workload(
            [
                Contender(BASELINE, lambda: prepare(MultiScaleRoIAlign(names, size, ratio), maps, False)),
                Contender("pyseg NCHW", lambda: ours(False), ours=True),
                Contender("pyseg channels_last", lambda: ours(True), ours=True),
            ],
            expected,
        )

    way = "forward+backward" if backward else "forward"
    points = "adaptive" if ratio == 0 else f"{ratio}x{ratio}"
    passes = (False, True) if backward else (False,)
    return Case(
        name=f"multiscale_roi_align/{way}/{count} boxes/{size}x{size}/{points}",
        groups=(f"MultiScaleRoIAlign, {way}",),
        build=build,
        params={"boxes": count, "output": size, "sampling_ratio": ratio},
        baseline=BASELINE,
        tolerance=TOLERANCE,
        least=lambda: (0, sum(_least(levels, boxes_of(count, 16, 700), size, each) for each in passes)),
        inference=not backward,
        quick=(1, 2) if count == 1000 and size == 7 and ratio == 2 else (),
    )


# ---- masks ----

_PASTES = ("float", "bool", "packed", "run lengths", "mask targets")


def _masks() -> tuple[Tensor, Tensor]:
    noise = torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    masks = torch.nn.functional.avg_pool2d(noise, 7, 1, 3).mul(6).sigmoid()
    return masks, boxes_of(100, 20, 330)[:, 1:]


def _as_tensor(runs: list[dict[str, Any]]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(each["counts"] for each in runs)), dtype=torch.uint8).double()


def _paste(kind: str) -> Case:
    """100 masks of 28x28 into the image; bits by numpy, run lengths by pycocotools behind torchvision's threshold."""
    size = (HEIGHT, WIDTH)

    def build() -> Workload:
        from pycocotools import mask as coco
        from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

        from pyseg.functional import crop_masks, paste_masks

        masks, boxes = _masks()
        pasted = paste_masks(masks, boxes, size, 0.5)
        many, indices = boxes_of(512, 20, 330)[:, 1:], torch.arange(512) % 100

        def theirs() -> Tensor:
            return paste_masks_in_image(masks, boxes, size)[:, 0]

        def packed() -> Tensor:
            return torch.from_numpy(np.packbits((theirs() > 0.5).numpy(), axis=-1))

        def runs() -> Tensor:
            return _as_tensor(
                coco.encode(np.asfortranarray((theirs() > 0.5).numpy().view(np.uint8).transpose(1, 2, 0)))
            )

        calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "float": (theirs, lambda: paste_masks(masks, boxes, size)),
            "bool": (lambda: theirs() > 0.5, lambda: paste_masks(masks, boxes, size, 0.5)),
            "packed": (packed, lambda: paste_masks(masks, boxes, size, 0.5, "packed")),
            "run lengths": (runs, lambda: _as_tensor(paste_masks(masks, boxes, size, 0.5, output="rle"))),
            "mask targets": (
                lambda: project_masks_on_boxes(pasted, many, indices, 28),
                lambda: crop_masks(pasted, many, indices, 28),
            ),
        }
        peer, own = calls[kind]
        return Workload(
            [Contender(BASELINE, lambda: Prepared(peer)), Contender("pyseg", lambda: Prepared(own), ours=True)],
            lambda: [peer().double()],
        )

    pixels = HEIGHT * WIDTH * 100
    written = {
        "float": 4 * pixels,
        "bool": pixels,
        "packed": pixels // 8,
        "run lengths": 0,
        "mask targets": 512 * 784 * 4,
    }
    return Case(
        name=f"paste_masks/{kind}/100 masks",
        groups=(f"mask pasting, {kind}",) if kind != "mask targets" else ("mask targets",),
        build=build,
        params={"masks": [100, 1, 28, 28], "image": [HEIGHT, WIDTH], "output": kind},
        baseline=BASELINE,
        tolerance=TOLERANCE,
        least=lambda: (0, 100 * 784 * 4 + written[kind]),
        quick=(1, 2),
    )


# ---- suppression ----


def _nms(classes: int) -> Case:
    count = 5000

    def build() -> Workload:
        from torchvision import ops

        from pyseg import functional

        boxes = boxes_of(count, 20, 330)[:, 1:]
        generator = torch.Generator().manual_seed(2)
        scores = torch.randperm(count, generator=generator) / count  # torchvision leaves the order of equal ones open
        idxs = torch.randint(0, classes, (count,), generator=generator)
        if classes == 1:
            theirs, ours = (lambda f=f: f.nms(boxes, scores, 0.5).double() for f in (ops, functional))
        else:
            theirs, ours = (lambda f=f: f.batched_nms(boxes, scores, idxs, 0.5).double() for f in (ops, functional))
        return Workload(
            [Contender(BASELINE, lambda: Prepared(theirs)), Contender("pyseg", lambda: Prepared(ours), ours=True)],
            lambda: [theirs()],
        )

    return Case(
        name=f"nms/{count} boxes/{classes} class{'es' if classes > 1 else ''}",
        groups=("nms",),
        build=build,
        params={"boxes": count, "classes": classes},
        baseline=BASELINE,
        tolerance=0.0,
        least=lambda: (0, count * (16 + 4 + 8)),
        quick=(1, 2),
    )
