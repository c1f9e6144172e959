"""confusion_matrix: from logits and from labels, beside torchmetrics and torch.bincount, plain and compiled."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import Case, Contender, Prepared, Workload
from peers import channels_last

BASELINE = "torchmetrics"
IGNORE = 255


@dataclass(frozen=True)
class Shape:
    batch: int
    classes: int
    size: int  # height and width
    layout: str = "NCHW"
    dtype: torch.dtype = torch.float32
    labels: bool = False

    @property
    def pixels(self) -> int:
        return self.batch * self.size**2

    @property
    def name(self) -> str:
        if self.labels:
            return f"confusion_matrix/labels/{self.batch}x{self.size}x{self.size}/classes{self.classes}"
        dtype = "" if self.dtype == torch.float32 else f"/{str(self.dtype).removeprefix('torch.')}"
        return f"confusion_matrix/logits/{self.batch}x{self.classes}x{self.size}x{self.size}/{self.layout}{dtype}"


# With the numbers of threads at which the quick run has them.
SHAPES = {
    Shape(4, 21, 512): (1, 2),
    Shape(4, 21, 512, "channels_last"): (1,),
    Shape(4, 21, 512, dtype=torch.float16): (),
    Shape(1, 150, 512): (),
    Shape(8, 2, 512): (),
    Shape(4, 21, 512, labels=True): (1,),
}


def cases() -> list[Case]:
    return [_case(shape, quick) for shape, quick in SHAPES.items()]


def _inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """Targets of square objects, as real ones have neighbours of one class; an eighth of the rows is ignored."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, shape.classes, (shape.batch, shape.size // 32, shape.size // 32), generator=generator)
    target = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
    target[:, : shape.size // 8] = IGNORE
    if shape.labels:
        prediction = target.roll(5, 2).clamp_max(shape.classes - 1)
        return prediction, target
    x = torch.randn(shape.batch, shape.classes, shape.size, shape.size, generator=generator).to(shape.dtype)
    return channels_last(x) if shape.layout == "channels_last" else x, target


def _bincount(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """What most training scripts do."""
    labels = prediction.argmax(1) if prediction.is_floating_point() else prediction
    counted = target != IGNORE
    cells = target[counted] * classes + labels[counted]
    return torch.bincount(cells, minlength=classes**2).reshape(classes, classes)


def _bincount_static(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """The same without shapes that depend on values, for a compiler: ignored pixels get a cell of their own."""
    labels = prediction.argmax(1) if prediction.is_floating_point() else prediction
    cells = torch.where(target == IGNORE, classes**2, target * classes + labels)
    return torch.bincount(cells.flatten(), minlength=classes**2 + 1)[: classes**2].reshape(classes, classes)


def _case(shape: Shape, quick: tuple[int, ...]) -> Case:
    def build() -> Workload:
        prediction, target = _inputs(shape)

        def peer(function: Callable[[Tensor, Tensor, int], Tensor]) -> Prepared:
            return Prepared(lambda: function(prediction, target, shape.classes))

        def torchmetrics() -> Prepared:
            from torchmetrics.functional.classification import multiclass_confusion_matrix

            return Prepared(lambda: multiclass_confusion_matrix(prediction, target, shape.classes, ignore_index=IGNORE))

        def compiled() -> Prepared:
            return peer(torch.compile(_bincount_static, dynamic=False))

        def ours() -> Prepared:
            from pyseg.functional import confusion_matrix

            return Prepared(lambda: confusion_matrix(prediction, target, shape.classes, IGNORE))

        contenders = [
            Contender(BASELINE, torchmetrics),
            Contender("argmax and torch.bincount", lambda: peer(_bincount)),
            Contender("the same compiled", compiled),
            Contender("pyseg", ours, ours=True),
        ]
        return Workload(contenders, lambda: [_bincount(prediction, target, shape.classes)])

    element = 8 if shape.labels else shape.classes * shape.dtype.itemsize
    kind = "labels" if shape.labels else f"logits, {shape.layout}"
    return Case(
        name=shape.name,
        groups=(f"confusion matrix, {kind}",),
        build=build,
        params={"shape": [shape.batch, shape.classes, shape.size, shape.size], "layout": shape.layout},
        baseline=BASELINE,
        tolerance=0.0,
        least=lambda: (0, shape.pixels * (element + 8)),
        quick=quick,
    )
