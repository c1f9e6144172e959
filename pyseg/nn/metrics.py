"""Metrics over a stream of batches, and over processes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyseg import functional as F


class ConfusionMatrix(nn.Module):
    r"""Adds up the confusion matrices of batches: `matrix[i, j]` pixels of class i were predicted as j.

        metric = ConfusionMatrix(21, ignore_index=255)
        for images, target in loader:
            metric.update(model(images), target)
        metric.sync()  # with torch.distributed: from here on compute() speaks of all processes
        print(metric.compute())
        metric.reset()

    Args:
        num_classes, ignore_index: as in `pyseg.functional.confusion_matrix`.
        persistent: whether the counts are part of the state_dict; a checkpoint in the middle of an epoch then has them.

    The counts are a buffer `matrix` [num_classes, num_classes] of int64, which `.to()` moves and `.half()` leaves
    alone. `forward` updates and returns the matrix of its batch. Exact up to 2^63 pixels; updates of logits store
    nothing of their size, and do not wait for a CUDA device.

    Raises:
        RuntimeError: where `confusion_matrix` does; on CUDA labels out of range are reported by `compute`.
    """

    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int | None = None, *, persistent: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.register_buffer("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), persistent=persistent)
        self._of_all: Tensor | None = None  # the sum over processes, while it is up to date

    @torch.no_grad()
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        batch = F.confusion_matrix(prediction, target, self.num_classes, self.ignore_index)
        self.matrix += batch
        self._of_all = None
        return batch

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Counts a batch: prediction [N, C, *S] of floats or [N, *S] of labels, target [N, *S] of labels."""
        self.forward(prediction, target)

    def reset(self) -> None:
        """Starts anew."""
        self.matrix.zero_()
        self._of_all = None

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Sums over the processes of a torch.distributed group: `compute` then describes what all of them have seen.

        Every process of the group calls it. `matrix` keeps the counts of this process alone, so that nothing is counted
        twice however often it is called; the sum is forgotten with the next `update` or `reset`. Does nothing where
        torch.distributed is not initialised.
        """
        if dist.is_available() and dist.is_initialized():
            total = self.matrix.clone()
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
            self._of_all = total

    def compute(self) -> Tensor:
        """The matrix [num_classes, num_classes] since the last `reset`: of all processes after `sync`, else of this."""
        matrix = self.matrix if self._of_all is None else self._of_all.to(self.matrix.device)
        if bool((matrix < 0).any()):
            raise RuntimeError(
                f"confusion_matrix: target and prediction must be in [0, {self.num_classes}) or ignored, "
                "got a label out of range in an update on CUDA"
            )
        return matrix.clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._of_all = None  # what was summed before is not what is loaded
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, ignore_index={self.ignore_index}"


class SegmentationMetrics(nn.Module):
    r"""The usual scores of a segmentation over a stream of batches and over processes.

    A `ConfusionMatrix` with the scores of `pyseg.functional` behind it: `update`, `sync` and `reset` are the matrix's,
    and `compute` returns a dictionary of float64 tensors:

        "iou", "dice", "precision", "recall"                        for each class, [C]
        "mean_iou", "mean_dice", "mean_precision", "mean_recall"    their means over the classes that are not NaN
        "pixel_accuracy", "frequency_weighted_iou"                  over all pixels

    Args:
        num_classes, ignore_index, persistent: as in `ConfusionMatrix`.
        absent: the score of a class that has none (0 / 0); NaN, which means leave out.
        classes: the classes to score, all by default; range(1, num_classes) leaves the background out.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        *,
        absent: float = math.nan,
        classes: Sequence[int] | None = None,
        persistent: bool = False,
    ):
        super().__init__()
        self.confusion_matrix = ConfusionMatrix(num_classes, ignore_index, persistent=persistent)
        self.absent = absent
        self.classes = None if classes is None else tuple(classes)

    def forward(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Counts a batch and returns the scores of that batch alone."""
        return self._scores(self.confusion_matrix(prediction, target))

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Counts a batch: see `ConfusionMatrix.update`."""
        self.confusion_matrix.update(prediction, target)

    def reset(self) -> None:
        """Starts anew."""
        self.confusion_matrix.reset()

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Sums over the processes of a group: see `ConfusionMatrix.sync`."""
        self.confusion_matrix.sync(group)

    def compute(self) -> dict[str, Tensor]:
        """The scores since the last `reset`."""
        return self._scores(self.confusion_matrix.compute())

    def _scores(self, matrix: Tensor) -> dict[str, Tensor]:
        scores = {}
        for name, score in (("iou", F.iou), ("dice", F.dice), ("precision", F.precision), ("recall", F.recall)):
            scores[name] = score(matrix, absent=self.absent, classes=self.classes)
            scores[f"mean_{name}"] = scores[name].nanmean(-1)
        scores["pixel_accuracy"] = F.pixel_accuracy(matrix)
        scores["frequency_weighted_iou"] = F.frequency_weighted_iou(matrix)
        return scores
