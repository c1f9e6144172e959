"""The model for referring expressions, and its example as a user runs it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pyseg
from pyseg.models import ReferringSegmenter, SentenceEncoder

SCRIPT = Path(__file__).parents[2] / "examples" / "referring_expressions.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("referring_expressions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, monkeypatch, capsys):
    """The example's main with these arguments: its status, what it printed and what it complained about."""
    threads = torch.get_num_threads()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--threads", "1", *map(str, arguments)])
        status = example.main()
        return status, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


# ---- the model ----


def small(words=9):
    torch.manual_seed(0)
    return ReferringSegmenter(words, 4, 5, (4, 6, 6), 7, (1, 2))


def test_sentences_end_where_their_words_do():
    """Fill behind a sentence changes nothing, words do."""
    torch.manual_seed(0)
    encoder = SentenceEncoder(9, 4, 5)
    short, long = torch.tensor([[3, 1, 7]]), torch.tensor([[3, 1, 7, 0, 0]])
    torch.testing.assert_close(encoder(short), encoder(long))
    assert not torch.allclose(encoder(short), encoder(torch.tensor([[3, 1, 7, 2, 0]])))
    assert not torch.allclose(encoder(short), encoder(torch.tensor([[2, 1, 7]])))


def test_model_is_its_formula():
    """Section 3 of 1603.06180 in torch's modules, from the same parameters."""
    model = small().eval()
    images, words = torch.randn(2, 3, 18, 21), torch.tensor([[3, 1, 0], [8, 2, 5], [1, 0, 0], [4, 4, 4]])
    features = model.visual(images).repeat_interleave(2, 0)
    fused = pyseg.reference.fuse_query(
        features, model.sentence(words), model.fuse.weight, model.fuse.bias, normalize=True, relu=True
    )
    x = fused
    for block in model.context:
        x = torch.relu(
            x
            + block.bn(
                torch.nn.functional.conv2d(x, block.conv.weight, None, 1, block.conv.padding, block.conv.dilation)
            )
        )
    expected = torch.nn.functional.interpolate(model.classify(x), (18, 21), mode="bilinear")[:, 0]
    torch.testing.assert_close(model(images, words), expected, rtol=1e-4, atol=1e-4)


def test_all_parameters_learn():
    model = small()
    model(torch.randn(2, 3, 16, 16), torch.tensor([[3, 1, 2], [8, 2, 0]])).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


# ---- the example ----


def test_scenes(example):
    """Reproducible; every sentence is in the vocabulary, and means one shape that is where the mask says."""
    first, again = example.scene(3, 5), example.scene(3, 5)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    for number in range(20):
        image, words, masks, forms = example.scene(1, number)
        assert image.shape == (3, example.SIDE, example.SIDE)
        assert words.shape == (example.SENTENCES, example.LONGEST)
        assert (masks.sum((1, 2)) > 40).all()
        assert len(forms) == example.SENTENCES


def test_sentences_are_true(example):
    """Four shapes whose sentences can be told by hand."""
    shapes = [
        ("square", "red", 10, 12, 8),
        ("square", "red", 50, 14, 6),
        ("disc", "blue", 30, 40, 10),
        ("disc", "red", 52, 50, 7),
    ]
    found = example.sentences_about(shapes)
    assert ("the blue disc", 2) in found["attributes"]
    assert ("the largest disc", 2) in found["size"]
    assert ("the smallest red shape", 1) not in found["size"]  # hardly smaller
    assert ("the leftmost red shape", 0) in found["place"]
    assert ("the bottommost shape", 3) in found["place"]
    assert ("the red square left of the blue disc", 0) in found["relation"]
    assert ("the red square right of the blue disc", 1) in found["relation"]
    assert not any("above" in sentence for sentence, _ in found["relation"])  # both squares are


def test_overall_iou(example):
    """Sums of intersections over sums of unions, of a model that finds the left half of everything."""

    class Left(torch.nn.Module):
        def forward(self, images, words):
            logits = torch.full((len(words), example.SIDE, example.SIDE), -1.0)
            logits[..., : example.SIDE // 2] = 1
            return logits

    scenes = [example.scene(2, number) for number in range(3)]
    masks = np.concatenate([scene[2] for scene in scenes])
    half = np.zeros_like(masks)
    half[..., : example.SIDE // 2] = True
    expected = (masks & half).sum() / (masks | half).sum()
    assert example.overall_iou(Left(), scenes)[0] == pytest.approx(expected)


def test_example(run, tmp_path):
    """A few steps, a picture, and the threshold that they cannot reach."""
    picture = tmp_path / "expressions.png"
    status, printed, complaint = run("--steps", 2, "--held-out", 4, "-o", picture)
    assert status == 1
    assert complaint.startswith("referring_expressions: overall IoU must be at least 0.6")
    assert picture.stat().st_size > 20_000
    assert "without" in printed


def test_bad_arguments_are_one_line(run):
    for arguments, message in ((("-o", "a.jpg"), "must end in .png"), (("--steps", "1"), "--steps at least 2")):
        status, printed, complaint = run(*arguments)
        assert status == 2
        assert message in complaint
        assert complaint.count("\n") == 1
        assert not printed
