"""Cross-entropies against their definitions, and what they do at the edges."""

import loss_oracles as oracle
import pytest
import torch

import pyseg.functional as P

MODES = ["multilabel", "binary"]


def weights_of(positive, negative, g):
    return positive * g, negative * (1 - g)


def focal_map(p, g, v, gamma, positive=1.0, negative=1.0):
    """Elementwise, for independent classes."""
    a, b = weights_of(positive, negative, g)
    return v * (a * (1 - p) ** gamma * -torch.log(p) + b * p**gamma * -torch.log1p(-p))


def check_reductions(loss, map_, count, x, tolerance=2e-6, **arguments):
    """`map_` is the definition's map as a function of float64 logits; the mean divides its sum by `count`."""
    ours, theirs = x.detach().clone().requires_grad_(), x.detach().cpu().double().requires_grad_()
    for reduction in ("none", "sum", "mean"):
        value = loss(ours, reduction=reduction, **arguments)
        expected = map_(theirs)
        expected = expected if reduction == "none" else expected.sum() / (count if reduction == "mean" else 1)
        torch.testing.assert_close(
            value.detach().cpu().double(), expected.detach(), rtol=10 * tolerance, atol=tolerance
        )
        (gradient,) = torch.autograd.grad(value.sum(), ours)
        (wanted,) = torch.autograd.grad(expected.sum(), theirs)
        scale = wanted.abs().max().item()
        torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-4, atol=20 * tolerance * scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ignore", [None, 9])
def test_weighted_binary_cross_entropy(device, mode, ignore):
    x, target = oracle.draw((2, 3, 8, 7), mode, ignore=ignore, device=device)
    for smoothing in (0.0, 0.2):

        def map_(z, smoothing=smoothing):
            p, g, v = oracle.dense(z, target.cpu(), mode, ignore)
            return 2 * focal_map(p, oracle.smoothed(g, v, smoothing, mode), v, 0.0, positive=3.0)

        count = oracle.dense(x.cpu(), target.cpu(), mode, ignore)[2].sum()
        weight = [2.0] * x.shape[1]
        check_reductions(
            P.weighted_binary_cross_entropy, map_, count, x, target=target, weight=weight, beta=3.0, mode=mode,
            ignore_index=ignore, label_smoothing=smoothing,
        )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("beta", [None, 0.7])
def test_balanced_cross_entropy(mode, batch, beta):
    x, target = oracle.draw((2, 3, 8, 7), mode, ignore=9)
    _, g, v = oracle.dense(x, target, mode, 9)
    share = 1 - oracle.total(g, batch) / oracle.total(v, batch) if beta is None else torch.full((1, 1), beta).double()
    share = share[:, :, None, None]
    check_reductions(
        P.balanced_cross_entropy,
        lambda z: focal_map(oracle.dense(z, target, mode, 9)[0], g, v, 0.0, share, 1 - share),
        v.sum(),
        x,
        target=target,
        mode=mode,
        ignore_index=9,
        beta=beta,
        batch=batch,
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [None, 0.25, [0.1, 0.5, 0.9]])
def test_softmax_focal(device, gamma, alpha):
    x, target = oracle.draw((2, 3, 8, 7), "multiclass", ignore=9, device=device)
    factor = torch.tensor([1.0] * 3 if alpha is None else [0.75, 0.25, 0.25] if alpha == 0.25 else alpha).double()
    weight = torch.tensor([1.0, 2.0, 0.5]).double()

    def map_(z):
        p, g, _ = oracle.dense(z, target.cpu(), "multiclass", 9)
        return ((factor * weight)[:, None, None] * g * (1 - p) ** gamma * -torch.log(p)).sum(1)

    check_reductions(
        P.focal_loss, map_, (target != 9).sum().cpu(), x, target=target, weight=weight, alpha=alpha, gamma=gamma,
        ignore_index=9,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("soft", [False, True])
def test_sigmoid_focal(mode, soft):
    x, target = oracle.draw((2, 3, 8, 7), mode, ignore=None if soft else 9)
    _, g, v = oracle.dense(x, target, mode, None if soft else 9)
    if soft:
        g = g * 0.7 + 0.1
        target = g.float().squeeze(1) if mode == "binary" else g.float()
    check_reductions(
        P.focal_loss,
        lambda z: focal_map(z.sigmoid(), g, v, 1.5, 0.25, 0.75),
        v.sum(),
        x,
        target=target,
        mode=mode,
        alpha=0.25,
        gamma=1.5,
        ignore_index=None if soft else 9,
    )


@pytest.mark.parametrize("shape", oracle.SHAPES)
@pytest.mark.parametrize("labelled", [False, True])
def test_pixel_weights(shape, labelled):
    x, target = oracle.draw(shape, "multiclass", ignore=9)
    pixel_weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(3))
    weight = torch.arange(1.0, x.shape[1] + 1).double()
    _, g, v = oracle.dense(x, target, "multiclass", 9)
    spread = pixel_weight.double().unsqueeze(1)
    if not labelled:
        g = torch.rand(g.shape, generator=torch.Generator().manual_seed(4)).double().softmax(1).float()
        target, v = g, torch.ones_like(v)
    view = weight.view(-1, *[1] * (x.dim() - 2))
    count = (g * view * spread).sum() if labelled else spread.sum()
    check_reductions(
        P.cross_entropy,
        lambda z: (g * view * spread * v * -z.log_softmax(1)).sum(1),
        count,
        x,
        target=target,
        weight=weight,
        pixel_weight=pixel_weight,
        ignore_index=9,
    )


def test_binary_pixel_weights():
    x, target = oracle.draw((2, 1, 8, 7), "binary", ignore=9)
    pixel_weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(3))
    p_weight = pixel_weight.double().unsqueeze(1)
    _, g, v = oracle.dense(x, target, "binary", 9)
    check_reductions(
        P.weighted_binary_cross_entropy,
        lambda z: p_weight * focal_map(z.sigmoid(), g, v, 0.0, 2.0),
        (p_weight * v).sum(),
        x,
        target=target,
        beta=2.0,
        pixel_weight=pixel_weight,
        ignore_index=9,
    )


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss"])
def test_probabilities(name):
    x, target = oracle.draw((2, 3, 8, 7), "multiclass", ignore=9)
    loss = getattr(P, name)
    for reduction in ("none", "mean"):
        expected = loss(x, target, ignore_index=9, reduction=reduction)
        value = loss(x.softmax(1), target, ignore_index=9, reduction=reduction, from_logits=False)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    certain = torch.tensor([1.0, 0.0]).view(1, 2, 1).requires_grad_()
    value = P.cross_entropy(certain, torch.tensor([[1]]), from_logits=False)
    assert value.item() == 100
    assert torch.autograd.grad(value, certain)[0].isfinite().all()


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("k", [0.2, 7])
def test_topk(batch, k):
    x, target = oracle.draw((2, 3, 8, 7), "multiclass", ignore=9, dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.5])
    every = torch.nn.functional.cross_entropy(x.double(), target, weight.double(), ignore_index=9, reduction="none")
    flat = every.reshape(1, -1) if batch else every.flatten(1)
    number = int(0.2 * flat.shape[1]) if k == 0.2 else k
    expected = flat.sort(descending=True).values[:, :number]
    arguments = {"k": k, "batch": batch, "ignore_index": 9}
    torch.testing.assert_close(P.topk_cross_entropy(x, target, weight, **arguments).double(), expected.mean())
    torch.testing.assert_close(
        P.topk_cross_entropy(x, target, weight, reduction="sum", **arguments).double(), expected.sum()
    )
    map_ = P.topk_cross_entropy(x, target, weight, reduction="none", **arguments)
    assert map_.shape == target.shape
    assert (map_ > 0).sum() == expected.numel()
    torch.testing.assert_close(map_.sum().double(), expected.sum())


@pytest.mark.parametrize("min_kept", [1, 50, 10_000])
def test_ohem(min_kept):
    x, target = oracle.draw((2, 3, 8, 7), "multiclass", ignore=9, dtype=torch.float64)
    every = torch.nn.functional.cross_entropy(x.double(), target, ignore_index=9, reduction="none")
    valid = every[target != 9]
    hard = valid > -torch.log(torch.tensor(0.4))
    number = min(max(int(hard.sum()), min_kept), valid.numel())
    expected = valid.sort(descending=True).values[:number]
    arguments = {"threshold": 0.4, "min_kept": min_kept, "ignore_index": 9}
    torch.testing.assert_close(P.ohem_cross_entropy(x, target, **arguments).double(), expected.mean())
    map_ = P.ohem_cross_entropy(x, target, reduction="none", **arguments)
    torch.testing.assert_close(map_.sum().double(), expected.sum())
    doubled = P.ohem_cross_entropy(x, target, [2.0, 2.0, 2.0], **arguments)
    torch.testing.assert_close(doubled.double(), 2 * expected.mean())


CALLS = {
    "cross_entropy": (P.cross_entropy, "multiclass", {}),
    "focal": (P.focal_loss, "multiclass", {"alpha": 0.25, "gamma": 0.5}),
    "sigmoid focal": (P.focal_loss, "multilabel", {"mode": "multilabel", "gamma": 0.5}),
    "weighted": (P.weighted_binary_cross_entropy, "binary", {"beta": 2.0}),
    "smoothed": (P.weighted_binary_cross_entropy, "binary", {"beta": 2.0, "label_smoothing": 0.1}),
    "balanced": (P.balanced_cross_entropy, "multilabel", {"mode": "multilabel"}),
    "topk": (P.topk_cross_entropy, "multiclass", {}),
    "ohem": (P.ohem_cross_entropy, "multiclass", {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_empty(name):
    loss, mode, arguments = CALLS[name]
    x, target = oracle.draw((2, 3, 8, 7), mode)
    nothing = torch.full_like(target, 9)
    partly = torch.cat([nothing[:1], target[1:]])
    for z, t in ((x, nothing), (x[:0], target[:0]), (x, partly), (x * 100, target), (x * 0 + 300, target)):
        for reduction in ("mean", "none"):
            variable = z.clone().requires_grad_()
            value = loss(variable, t, ignore_index=9, reduction=reduction, **arguments)
            (gradient,) = torch.autograd.grad(value.sum(), variable)
            assert value.isfinite().all() and gradient.isfinite().all(), reduction
            if t is nothing or not len(t):
                assert not value.any() and not gradient.any()


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    loss, mode, arguments = CALLS[name]
    x, target = oracle.draw((2, 3, 4, 3), mode, ignore=9, dtype=torch.float64)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda z, reduction=reduction: loss(z, target, ignore_index=9, reduction=reduction, **arguments),
            (x.requires_grad_(),),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    x, target = oracle.draw((2, 3, 8, 7), "multiclass", dtype=dtype)
    for reduction in ("mean", "none"):
        variable = x.clone().requires_grad_()
        value = P.cross_entropy(variable, target, reduction=reduction)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = torch.nn.functional.cross_entropy(x.double(), target, reduction=reduction)
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
        assert torch.autograd.grad(value.sum(), variable)[0].dtype == dtype


def test_border_weights():
    ndimage = pytest.importorskip("scipy.ndimage")
    cells = torch.zeros(2, 20, 24, dtype=torch.int32)
    cells[0, 3:8, 2:9], cells[0, 3:8, 12:20], cells[0, 12:18, 4:15] = 1, 2, 7
    cells[1, 5:9, 5:9] = 3  # one object: no border
    distances = torch.stack(
        [torch.from_numpy(ndimage.distance_transform_edt(cells[0].numpy() != k)) for k in (1, 2, 7)]
    )
    first, second = distances.sort(0).values[:2]
    expected = torch.where(cells[0] == 0, 10 * torch.exp(-((first + second) ** 2) / 50), 0.0)
    weights = P.unet_border_weights(cells)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[0].double(), 1 + expected, rtol=1e-5, atol=1e-6)
    assert (weights[1] == 1).all()
    class_weight = torch.full(cells.shape, 0.5)
    torch.testing.assert_close(P.unet_border_weights(cells, class_weight=class_weight), weights - 0.5)
    wide = P.unet_border_weights(cells[0], w0=2.0, sigma=3.0, spacing=(1.0, 1.0))
    torch.testing.assert_close(
        wide.double(), 1 + expected.clamp_min(1e-300).div(10).pow(25 / 9).mul(2), rtol=1e-4, atol=1e-6
    )


def test_errors():
    x, target = oracle.draw((2, 3, 8, 7), "multiclass")
    with pytest.raises(ValueError, match="topk_cross_entropy: k must be positive, got 0"):
        P.topk_cross_entropy(x, target, k=0)
    with pytest.raises(ValueError, match=r"ohem_cross_entropy: threshold must be in \[0, 1\], got 2"):
        P.ohem_cross_entropy(x, target, threshold=2)
    with pytest.raises(RuntimeError, match=r"ohem_cross_entropy: target must hold labels \[N, \*S\]"):
        P.ohem_cross_entropy(x, x.softmax(1))
    with pytest.raises(ValueError, match="focal_loss: gamma must be >= 0, got -1"):
        P.focal_loss(x, target, gamma=-1)
    with pytest.raises(ValueError, match="weighted_binary_cross_entropy: mode must be 'binary' or 'multilabel'"):
        P.weighted_binary_cross_entropy(x, target, mode="multiclass")
