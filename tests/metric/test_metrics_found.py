"""Defects that a review of the metrics found, each with the case that showed it."""

import torch

import pyseg
from pyseg.functional import frequency_weighted_iou


def test_frequency_weighted_iou_of_shares():
    matrix = torch.tensor([[5.0, 3.0], [2.0, 10.0]])
    torch.testing.assert_close(frequency_weighted_iou(matrix / matrix.sum()), frequency_weighted_iou(matrix))


def test_loading_forgets_the_sum_over_processes():
    metric = pyseg.nn.ConfusionMatrix(2, persistent=True)
    fresh = metric.state_dict()
    fresh = {name: value.clone() for name, value in fresh.items()}
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    metric._of_all = metric.matrix.clone()  # as sync() leaves it
    metric.load_state_dict(fresh)
    assert not metric.compute().any()
