"""Multi-view RGB-D: fusion, pooled labels, the loss at all scales, FuseNet, and the example."""

import math

import pytest
import torch
import torch.nn.functional as F

from pyseg import reference
from pyseg.functional import fuse_views, multiscale_cross_entropy, pool_labels, warp_and_fuse, warp_to_view
from pyseg.models import FuseNet
from warm_python import run_example

DOUBLE = torch.float64
MODES = ["bayes", "sum", "max"]


def views(count, images=2, classes=4, size=(3, 5), seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, images, classes, *size, generator=g, dtype=DOUBLE)
    return scores, torch.rand(count, images, *size, generator=g) > 0.4


# ---- fusion ----


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_fuse_views(mode, from_logits):
    """The formulas, pixels without views among them; what is not valid does not matter."""
    scores, valid = views(3)
    valid[:, 0, 1, 2] = False
    scores = scores if from_logits else scores.softmax(2)
    expected = reference.fuse_views(scores, valid, mode, from_logits)
    got = fuse_views(scores, valid, mode, from_logits)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got[0, :, 1, 2], torch.full((4,), -math.log(4), dtype=DOUBLE))
    hidden = torch.where(valid.unsqueeze(2), scores, torch.nan)
    torch.testing.assert_close(fuse_views(list(hidden), list(valid), mode, from_logits), expected)


@pytest.mark.parametrize("mode", MODES)
def test_fuse_views_gradient(mode):
    scores, valid = views(2, images=1, size=(2, 2))
    assert torch.autograd.gradcheck(lambda s: fuse_views(s, valid, mode), scores.requires_grad_())


@pytest.mark.parametrize("mode", MODES)
def test_gradient_where_a_probability_is_0(mode):
    """Of probabilities 0 and of logits 95 (1 / p overflows) and 200 apart: finite, and the values end at -100."""
    valid = torch.ones(2, 1, 1, 2, dtype=torch.bool)
    p = torch.tensor([[1.0, 0.3], [0.0, 0.7]]).reshape(1, 2, 1, 2).repeat(2, 1, 1, 1, 1).requires_grad_()
    logits = torch.tensor([[0.0, 0.0], [-95.0, -200.0]]).reshape(1, 2, 1, 2).repeat(2, 1, 1, 1, 1).requires_grad_()
    for scores, from_logits in ((p, False), (logits, True)):
        y = fuse_views(scores, valid, mode, from_logits)
        assert y.min() >= (-400 if mode == "bayes" else -100)
        for of_class in y.unbind(1):
            (grad,) = torch.autograd.grad(of_class.sum(), scores, retain_graph=True)
            assert grad.isfinite().all()


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_nan_is_not_lost(mode, from_logits):
    scores, valid = views(2, images=1)
    valid[:] = True
    scores = scores if from_logits else scores.softmax(2)
    scores[0, 0, 1, 2, 3] = torch.nan
    got = fuse_views(scores, valid, mode, from_logits).isnan().any(1)
    assert got[0, 2, 3] and got.sum() == 1


def test_fusion_of_two_views_by_hand():
    """Votes of 0.6 and 0.9 for the first of two classes: 0.54 against 0.04, 1.5 against 0.5, 0.9 against 0.4."""
    p = torch.tensor([[0.6, 0.4], [0.9, 0.1]]).reshape(2, 1, 2, 1, 1)
    valid = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    for mode, expected in (("bayes", 0.54 / 0.58), ("sum", 0.75), ("max", 0.9 / 1.3)):
        assert fuse_views(p, valid, mode, False).exp()[0, 0, 0, 0].item() == pytest.approx(expected)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_warp_and_fuse(mode, from_logits, own):
    """The same as its two steps, values and gradients, for two keyframes of three frames each."""
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(6, 5, 4, 6, generator=g, dtype=DOUBLE)
    key_scores = torch.randn(2, 5, 4, 6, generator=g, dtype=DOUBLE)
    depth = 2 + torch.rand(2, 1, 4, 6, generator=g, dtype=DOUBLE)
    measured = 2 + torch.rand(6, 1, 4, 6, generator=g, dtype=DOUBLE)
    k = torch.tensor([[5.0, 0, 2.5], [0, 5, 1.5], [0, 0, 1]], dtype=DOUBLE).repeat(6, 1, 1)
    pose = torch.eye(4, dtype=DOUBLE).repeat(6, 1, 1)
    pose[:, :3, 3] = 0.3 * torch.randn(6, 3, generator=g, dtype=DOUBLE)
    if not from_logits:
        scores, key_scores = scores.softmax(1), key_scores.softmax(1)
    scores.requires_grad_()
    named = {"absolute_tolerance": 0.4, "relative_tolerance": 0.0}
    got = warp_and_fuse(
        scores,
        depth,
        k[:2],
        k,
        pose,
        measured,
        key_scores=key_scores if own else None,
        mode=mode,
        from_logits=from_logits,
        **named,
    )

    if mode == "bayes":
        warped_scores = scores if from_logits else scores.log()
    else:
        warped_scores = scores.softmax(1) if from_logits else scores
    warped, valid = warp_to_view(
        warped_scores, depth.repeat_interleave(3, 0), k[:2].repeat_interleave(3, 0), k, pose, measured, **named
    )
    assert 0.1 < valid.double().mean() < 0.9
    each, masks = list(warped.unflatten(0, (2, 3)).unbind(1)), list(valid.unflatten(0, (2, 3)).unbind(1))
    if own:
        of_key = key_scores if mode == "bayes" else key_scores.softmax(1) if from_logits else key_scores
        each.append(of_key.log() if mode == "bayes" and not from_logits else of_key)
        masks.append(torch.ones_like(masks[0]))
    expected = fuse_views(each, masks, mode, from_logits=mode == "bayes")
    torch.testing.assert_close(got, expected)
    grad = torch.randn(got.shape, generator=g, dtype=DOUBLE)
    gradients = (torch.autograd.grad(y, scores, grad)[0] for y in (got, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mode", MODES)
def test_warp_and_fuse_of_few_views(mode):
    """One camera for all frames; 16 bits are widened before anything is added up; no frames at all."""
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(6, 5, 4, 6, generator=g).bfloat16()
    own = torch.randn(2, 5, 4, 6, generator=g)
    depth = 2 + torch.rand(2, 1, 4, 6, generator=g)
    k, pose = torch.tensor([[5.0, 0, 2.5], [0, 5, 1.5], [0, 0, 1]]), torch.eye(4)
    got = warp_and_fuse(scores, depth, k, k, pose, mode=mode)
    each = (k.expand(2, 3, 3), k.expand(6, 3, 3), pose.expand(6, 4, 4))
    assert torch.equal(got, warp_and_fuse(scores.float(), depth, *each, mode=mode))
    alone = warp_and_fuse(scores[:0], depth, k, k, pose, key_scores=own, mode=mode)
    torch.testing.assert_close(alone, own.log_softmax(1))
    uniform = warp_and_fuse(scores[:0], depth, k, k, pose, mode=mode)
    torch.testing.assert_close(uniform, torch.full_like(own, -math.log(5)))
    for change, message in (
        ({"scores": scores[:1]}, "warp_and_fuse: scores must have as many frames of each of 2 keyframes, got 1"),
        ({"scores": scores[0]}, r"warp_and_fuse: scores must be \[K \* V, C, H, W\], got \[5, 4, 6\]"),
        ({"key_scores": own[:1]}, r"warp_and_fuse: key_scores must be \[2, 5, 4, 6\], got \[1, 5, 4, 6\]"),
    ):
        arguments = {"scores": scores, "key_scores": own, **change}
        with pytest.raises(ValueError, match=message):
            warp_and_fuse(arguments["scores"], depth, k, k, pose, key_scores=arguments["key_scores"], mode=mode)


def test_fusion_errors():
    scores, valid = views(2)
    with pytest.raises(ValueError, match="fuse_views: mode must be one of bayes, sum, max, got median"):
        fuse_views(scores, valid, "median")
    with pytest.raises(ValueError, match="fuse_views: valid must be as many as scores, 1 or more, got 1 and 2"):
        fuse_views(scores, valid[:1])
    with pytest.raises(ValueError, match=r"fuse_views: valid must be \[2, 3, 5\] like scores, got \[2, 3, 4\]"):
        fuse_views(scores, valid[..., :4])


# ---- labels and losses ----


def windows_of(labels, size):
    h, w = labels.shape[0] // size[0], labels.shape[1] // size[1]
    return [[labels[i * h : (i + 1) * h, j * w : (j + 1) * w] for j in range(size[1])] for i in range(size[0])]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_pool_labels(dtype):
    """Window by window; ignored pixels have no say."""
    labels = torch.randint(4, (2, 6, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    labels[0, :3, :4] = 3  # a window of ignored pixels alone
    majority = pool_labels(labels, (2, 2), "majority", ignore_index=3)
    drawn = pool_labels(labels, (2, 2), "stochastic", ignore_index=3, generator=torch.Generator().manual_seed(1))
    assert majority.dtype == drawn.dtype == dtype
    for n in range(2):
        for i, row in enumerate(windows_of(labels[n], (2, 2))):
            for j, window in enumerate(row):
                counts = torch.bincount(window.flatten().long(), minlength=4)[:3]
                if counts.sum() == 0:
                    assert majority[n, i, j] == drawn[n, i, j] == 3
                    continue
                assert majority[n, i, j] == counts.argmax()
                assert counts[int(drawn[n, i, j])] > 0
    assert torch.equal(pool_labels(labels, (2, 2), "nearest"), labels[:, 1::3, 2::4])
    assert torch.equal(pool_labels(labels, (6, 8)), labels)
    with pytest.raises(ValueError, match=r"pool_labels: size must divide \[6, 8\], got \[4, 8\]"):
        pool_labels(labels, (4, 8))
    with pytest.raises(ValueError, match=r"pool_labels: target must be \[N, H, W\] of integers"):
        pool_labels(labels[0], (2, 2))


def test_stochastic_labels_have_the_windows_shares():
    labels = torch.tensor([[0, 1], [1, 1]]).repeat(200, 200).unsqueeze(0)
    drawn = pool_labels(labels, (200, 200), generator=torch.Generator().manual_seed(0))
    assert drawn.double().mean().item() == pytest.approx(0.75, abs=0.01)


def test_multiscale_cross_entropy():
    g = torch.Generator().manual_seed(0)
    target = torch.randint(3, (2, 8, 8), generator=g)
    target[0, :4, :4] = -100
    logits = [torch.randn(2, 3, 8 >> s, 8 >> s, generator=g, dtype=DOUBLE, requires_grad=True) for s in range(3)]
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE)
    got = multiscale_cross_entropy(logits, target, [1.0, 0.5, 0.25], weight=weight, pooling="majority")
    pooled = [pool_labels(target, z.shape[2:], "majority") for z in logits]
    expected = sum(a * F.cross_entropy(z, t, weight) for a, z, t in zip((1.0, 0.5, 0.25), logits, pooled, strict=True))
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="scale_weights must be 3 numbers, 1 or more, got \\[1.0\\]"):
        multiscale_cross_entropy(logits, target, [1.0])


# ---- network and example ----


def test_fusenet():
    """Predictions at every scale, both branches and the places of the maxima in use."""
    torch.manual_seed(0)
    model = FuseNet(5, (4, 6, 8), (1, 2, 1)).eval()
    image, depth = torch.randn(2, 3, 16, 20, requires_grad=True), torch.randn(2, 1, 16, 20, requires_grad=True)
    logits = model(image, depth)
    assert [list(z.shape) for z in logits] == [[2, 5, 16, 20], [2, 5, 8, 10], [2, 5, 4, 5]]
    for gradient in torch.autograd.grad(logits[0].square().sum(), (image, depth)):
        assert gradient.any()
    assert not torch.allclose(model(image, -depth)[0], logits[0])
    with pytest.raises(ValueError, match="FuseNet: convolutions must be as many as widths, 2 or more, got 1 and 2"):
        FuseNet(5, (4, 6), (1,))


def run(*arguments):
    return run_example("rgbd_views.py", *arguments)


def test_example(tmp_path):
    """A few steps write a picture; a threshold that they cannot reach fails the run."""
    pytest.importorskip("PIL")
    picture = tmp_path / "views.png"
    done = run("--steps", 2, "--rooms", 1, "--views", 2, "--threads", 1, "--least", 0.9, "-o", picture)
    assert done.returncode == 1, done.stderr
    assert "Bayesian fusion must gain 0.9 over one view" in done.stderr
    assert "max fusion" in done.stdout
    assert picture.stat().st_size > 1000


def test_example_errors():
    done = run("--steps", 0)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("rgbd_views: --steps, --views, --rooms and --threads must be")
