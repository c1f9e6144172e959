"""Scores made from a confusion matrix, against their definitions pixel by pixel."""

import math

import pytest
import torch

from pyseg.functional import (
    confusion_matrix,
    dice,
    frequency_weighted_iou,
    iou,
    pixel_accuracy,
    precision,
    recall,
    specificity,
)

SCORES = [iou, dice, precision, recall, specificity]
NAN = math.nan


def masks(classes=5, size=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, classes, (1, size), generator=generator) for _ in range(2))


def by_definition(score, prediction, target, c):
    a, b = prediction == c, target == c
    n = {
        iou: ((a & b).sum(), (a | b).sum()),
        dice: (2 * (a & b).sum(), a.sum() + b.sum()),
        precision: ((a & b).sum(), a.sum()),
        recall: ((a & b).sum(), b.sum()),
        specificity: ((~a & ~b).sum(), (~b).sum()),
    }[score]
    return (n[0].double() / n[1]).item()


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_definitions(device, score):
    prediction, target = masks()
    matrix = confusion_matrix(prediction.to(device), target.to(device), 5)
    expected = torch.tensor([by_definition(score, prediction, target, c) for c in range(5)], dtype=torch.float64)
    got = score(matrix).cpu()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(score(matrix, reduction="mean").cpu(), expected.mean())
    torch.testing.assert_close(score(matrix, classes=[3, 1]).cpu(), expected[[3, 1]])


def test_accuracy_and_frequency_weights():
    prediction, target = masks()
    matrix = confusion_matrix(prediction, target, 6)  # class 5 is absent
    torch.testing.assert_close(pixel_accuracy(matrix), (prediction == target).double().mean())
    share = torch.bincount(target[0], minlength=6).double() / target.numel()
    torch.testing.assert_close(frequency_weighted_iou(matrix), (share * iou(matrix, absent=0.0)).sum())


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_absent_classes(score):
    """0 / 0 is NaN and does not count in the mean, or what the user says."""
    matrix = torch.tensor([[8, 0, 2], [0, 0, 0], [1, 0, 4]])
    values = score(matrix)
    expected_nan = [False, score is not specificity, False]
    assert values.isnan().tolist() == expected_nan
    torch.testing.assert_close(score(matrix, reduction="mean"), values.nanmean())
    filled = score(matrix, absent=1.0)
    torch.testing.assert_close(filled, values.nan_to_num(1.0))
    torch.testing.assert_close(score(matrix, absent=1.0, reduction="mean"), filled.mean())


def test_one_sided_classes():
    """In the target but never predicted, and the other way round."""
    matrix = torch.tensor([[5, 1, 0], [0, 0, 0], [3, 0, 0]])
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(iou(matrix)[1:], torch.zeros(2).double(), **same)
    torch.testing.assert_close(precision(matrix)[1:], torch.tensor([0.0, NAN]).double(), **same)
    torch.testing.assert_close(recall(matrix)[1:], torch.tensor([NAN, 0.0]).double(), **same)


def test_empty_matrix():
    matrix = torch.zeros(2, 3, 3, dtype=torch.int64)
    for score in SCORES:
        assert score(matrix).isnan().all()
        assert score(matrix, reduction="mean").isnan().all()
        assert score(matrix, reduction="mean", absent=0.0).tolist() == [0, 0]
    assert pixel_accuracy(matrix).isnan().all()
    assert frequency_weighted_iou(matrix).isnan().all()


def test_batches_of_matrices():
    matrix = torch.randint(0, 9, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    for score in (*SCORES, pixel_accuracy, frequency_weighted_iou):
        one_by_one = [score(m) for m in matrix.flatten(0, 1)]
        torch.testing.assert_close(score(matrix).flatten(0, 1), torch.stack(one_by_one), equal_nan=True)


def test_poisoned_matrices_are_nan():
    matrix = torch.ones(2, 3, 3, dtype=torch.int64)
    matrix[1] -= 2**48
    for score in (*SCORES, pixel_accuracy, frequency_weighted_iou):
        values = score(matrix)
        assert not values[0].isnan().any()
        assert values[1].isnan().all()
        values = score(matrix.sum(0))
        assert values.isnan().all()


def test_large_counts():
    """Above what float32 counts."""
    matrix = torch.tensor([[2**40, 1], [2, 2**30 + 1]])
    torch.testing.assert_close(iou(matrix), torch.tensor([2**40 / (2**40 + 3), (2**30 + 1) / (2**30 + 4)]).double())
    assert 0 < 1 - iou(matrix)[0] < 1e-11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": torch.zeros(2, 3)}, r"matrix must be \[\*, C, C\], got \[2, 3\]"),
        ({"matrix": torch.zeros(3)}, r"matrix must be \[\*, C, C\], got \[3\]"),
        ({"reduction": "sum"}, "reduction must be 'none' or 'mean', got 'sum'"),
        ({"classes": [0, 3]}, r"classes must be in \[0, 3\), got \[0, 3\]"),
    ],
    ids=str,
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError, match=f"^iou: {message}"):
        iou(**{"matrix": torch.zeros(3, 3), **arguments})
