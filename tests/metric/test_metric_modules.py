"""The streaming modules: batches, states, processes."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyseg.functional import confusion_matrix, dice, iou, pixel_accuracy
from pyseg.nn import ConfusionMatrix, SegmentationMetrics


def batches(count=3, classes=4, device="cpu", first=0):
    for seed in range(first, first + count):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, classes, 5, 6, generator=generator)
        target = torch.randint(0, classes, (2, 5, 6), generator=generator)
        target[:, 0] = 255
        yield logits.to(device), target.to(device)


def total(count=3, **options):
    return sum(confusion_matrix(logits, target, 4, 255) for logits, target in batches(count, **options))


def test_stream(device):
    metric = ConfusionMatrix(4, 255).to(device)
    for i, (logits, target) in enumerate(batches(device=device)):
        if i == 1:
            assert torch.equal(metric(logits, target), confusion_matrix(logits, target, 4, 255))
        else:
            metric.update(logits.requires_grad_(), target)
    assert torch.equal(metric.compute(), total(device=device))
    assert not metric.compute().requires_grad
    metric.reset()
    assert not metric.compute().any()


def test_computed_is_not_the_state():
    metric = ConfusionMatrix(4, 255)
    metric.update(*next(batches()))
    metric.compute().zero_()
    assert metric.compute().sum() == 48


def test_state():
    metric = ConfusionMatrix(4, 255)
    assert not metric.state_dict()
    assert not list(metric.parameters())
    metric.half().bfloat16()
    assert metric.matrix.dtype == torch.int64
    assert metric.to("meta").matrix.is_meta
    kept = ConfusionMatrix(4, 255, persistent=True)
    kept.update(*next(batches()))
    other = ConfusionMatrix(4, 255, persistent=True)
    other.load_state_dict(kept.state_dict())
    assert torch.equal(other.compute(), total(1))
    assert torch.equal(copy.deepcopy(kept).compute(), total(1))
    assert repr(kept) == "ConfusionMatrix(num_classes=4, ignore_index=255)"


def test_in_inference_mode():
    """A model's evaluation loop: updates in inference mode, of a module made outside."""
    metric = ConfusionMatrix(4, 255)
    with torch.inference_mode():
        metric.update(*next(batches()))
    metric.update(*next(batches()))
    assert torch.equal(metric.compute(), 2 * total(1))


def test_scores(device):
    metric = SegmentationMetrics(5, 255, classes=range(1, 5)).to(device)
    for logits, target in batches(device=device):
        metric.update(torch.nn.functional.pad(logits, (0, 0, 0, 0, 0, 1), value=-9.0), target)
    matrix = torch.nn.functional.pad(total(), (0, 1, 0, 1))
    scores = {name: value.cpu() for name, value in metric.compute().items()}
    same = {"equal_nan": True}
    torch.testing.assert_close(scores["iou"], iou(matrix)[1:], **same)
    torch.testing.assert_close(scores["mean_dice"], dice(matrix)[1:].nanmean(), **same)
    torch.testing.assert_close(scores["pixel_accuracy"], pixel_accuracy(matrix))
    assert set(scores) == {
        *(f"{mean}{name}" for mean in ("", "mean_") for name in ("iou", "dice", "precision", "recall")),
        "pixel_accuracy",
        "frequency_weighted_iou",
    }
    batch = metric(*next(batches(classes=5, device=device)))
    assert batch["iou"].shape == (4,)
    metric.reset()
    assert metric.compute()["mean_iou"].isnan()


@pytest.mark.cuda_only
def test_bad_label_is_an_error_of_compute(device):
    metric = ConfusionMatrix(4, 255).to(device)
    logits, target = next(batches(device=device))
    broken = target.cpu()
    broken[1, 2, 3] = 7
    metric.update(logits, broken.to(device))
    metric.update(logits, target)
    with pytest.raises(RuntimeError, match=r"^confusion_matrix: target and prediction must be in \[0, 4\) or ignored"):
        metric.compute()
    metric.reset()
    metric.update(logits, target)
    assert metric.compute().sum() == 48


def test_sync_of_one_process():
    metric = ConfusionMatrix(4, 255)
    metric.update(*next(batches()))
    metric.sync()  # torch.distributed is not initialised
    assert torch.equal(metric.compute(), total(1))


WORKER = """
import sys
sys.path[:0] = ["tests", "tests/metric"]
import test_metric_modules
test_metric_modules.work(int(sys.argv[1]), int(sys.argv[2]))
"""


def work(rank, port):
    """One of two processes: rank r sees r + 1 batches, the second half of them after a first sync."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metric, scores = ConfusionMatrix(4, 255), SegmentationMetrics(4, 255)
    for logits, target in batches(rank + 1, first=10 * rank):
        metric.update(logits, target)
        scores.update(logits, target)
    mine = metric.compute()
    assert torch.equal(mine, total(rank + 1, first=10 * rank))
    everything = total(1) + total(2, first=10)
    for _ in range(2):  # as often as one likes
        metric.sync()
        assert torch.equal(metric.compute(), everything)
    scores.sync(torch.distributed.group.WORLD)
    torch.testing.assert_close(scores.compute()["iou"], iou(everything))
    assert torch.equal(metric.matrix, mine)
    logits, target = next(batches(1, first=20 + rank))
    metric.update(logits, target)
    assert torch.equal(metric.compute(), mine + confusion_matrix(logits, target, 4, 255))
    metric.sync()
    assert torch.equal(metric.compute(), everything + total(2, first=20))
    metric.reset()
    assert not metric.compute().any()
    metric.sync()
    assert not metric.compute().any()
    torch.distributed.barrier()  # gloo aborts a process whose peer leaves while its threads still answer
    torch.distributed.destroy_process_group()


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
