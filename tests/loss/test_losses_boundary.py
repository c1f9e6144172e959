"""Losses on boundaries against their definitions over scipy's distance transform."""

import functools

import loss_oracles as oracle
import numpy as np
import pytest
import torch

import pyseg.functional as P

ndimage = pytest.importorskip("scipy.ndimage")
MODES = ["multiclass", "multilabel", "binary"]


def blobs(shape, mode, seed=0, ignore=None, dtype=torch.float32):
    """Smooth maps: random ones have distances of 1 only."""
    generator = np.random.default_rng(seed)
    n, c, *size = shape
    c = 1 if mode == "binary" else c
    smooth = lambda: np.stack([  # noqa: E731
        [ndimage.gaussian_filter(generator.normal(size=size), 1.5) for _ in range(c)] for _ in range(n)
    ])  # fmt: skip
    x = torch.from_numpy(smooth()).mul(8).to(dtype)
    target = torch.from_numpy(smooth())
    target = target.argmax(1) if mode == "multiclass" else (target > 0).long()
    target = target.squeeze(1) if mode == "binary" else target
    if ignore is not None:
        target[..., :2, :] = ignore
    return x, target


def both_sides(mask, spacing=None):
    """The distance to the nearest element of the other value, 0 where there is none."""
    mask = mask.numpy() > 0.5
    if mask.all() or not mask.any():
        return torch.zeros(mask.shape, dtype=torch.float64)
    edt = ndimage.distance_transform_edt
    return torch.from_numpy(edt(mask, sampling=spacing) + edt(~mask, sampling=spacing))


def table_of(value, p, g, v):
    """The mean of value(p, g) over the valid pixels of each map."""
    rows = [[value(p[n, c], g[n, c]) * v[n, c] for c in range(p.shape[1])] for n in range(p.shape[0])]
    return torch.stack([torch.stack([m.sum() / v[n, c].sum().clamp_min(1) for c, m in enumerate(row)])
                        for n, row in enumerate(rows)])  # fmt: skip


def hausdorff(alpha=2.0, one_sided=False, spacing=None):
    def value(p, g):
        distance = both_sides(g, spacing) ** alpha
        if not one_sided:
            distance = distance + both_sides(p.detach(), spacing) ** alpha
        return (p - g) ** 2 * distance

    return value


def kervadec(spacing=None):
    def value(p, g):
        distance = both_sides(g, spacing)
        return p * torch.where((g > 0.5) & (distance > 0), 1 - distance, distance)

    return value


def check(loss, value, x, target, mode, ignore=None, **arguments):
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    table = loss(ours, target, mode=mode, ignore_index=ignore, reduction="none", **arguments)
    p, g, v = oracle.dense(theirs, target, mode, ignore)
    expected = table_of(value, p * v, g, v)
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-6)
    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(table, ours, factor.to(table))
    (wanted,) = torch.autograd.grad(expected, theirs, factor)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ignore", [None, 9])
def test_hausdorff(mode, ignore):
    x, target = blobs((2, 3, 14, 13), mode, ignore=ignore)
    check(P.hausdorff_dt_loss, hausdorff(), x, target, mode, ignore)
    check(P.hausdorff_dt_loss, hausdorff(1.5, one_sided=True), x, target, mode, ignore, alpha=1.5, one_sided=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ignore", [None, 9])
def test_boundary(mode, ignore):
    x, target = blobs((2, 3, 14, 13), mode, ignore=ignore)
    check(P.boundary_loss, kervadec(), x, target, mode, ignore)


@pytest.mark.parametrize("spacing", [None, (2.0, 0.5, 1.5)])
def test_volumes_and_spacing(spacing):
    x, target = blobs((1, 2, 7, 9, 8), "multiclass")
    check(P.hausdorff_dt_loss, hausdorff(spacing=spacing), x, target, "multiclass", spacing=spacing)
    check(P.boundary_loss, kervadec(spacing), x, target, "multiclass", spacing=spacing)


def test_device(device):
    """On CUDA as on the CPU."""
    x, target = blobs((2, 3, 9, 8), "multiclass")
    for loss in (P.hausdorff_dt_loss, P.boundary_loss):
        expected, variable = x.clone().requires_grad_(), x.to(device).requires_grad_()
        values = [loss(expected, target), loss(variable, target.to(device))]
        torch.testing.assert_close(values[1].cpu(), values[0])
        gradients = [torch.autograd.grad(v, z)[0].cpu() for v, z in zip(values, (expected, variable), strict=True)]
        torch.testing.assert_close(*gradients)


def test_reductions_and_log():
    x, target = blobs((2, 3, 14, 13), "multiclass")
    for loss in (P.hausdorff_dt_loss, functools.partial(P.hausdorff_er_loss, erosions=2), P.boundary_loss):
        table = loss(x, target, reduction="none")
        torch.testing.assert_close(loss(x, target), table.mean())
        torch.testing.assert_close(loss(x, target, reduction="sum"), table.sum())
        torch.testing.assert_close(loss(x, target, reduction="none", batch=True), table.mean(0))
        torch.testing.assert_close(loss(x, target, include_background=False, reduction="none"), table[:, 1:])
        torch.testing.assert_close(loss(x, target, classes=[2], reduction="none"), table[:, 2:])
        weight = torch.tensor([1.0, 2.0, 0.5])
        torch.testing.assert_close(loss(x, target, weight), ((table * weight).sum(1) / weight.sum()).mean())
    torch.testing.assert_close(P.hausdorff_dt_loss(x, target, log=True), P.hausdorff_dt_loss(x, target).log1p())


@pytest.mark.parametrize("loss", [P.hausdorff_dt_loss, P.hausdorff_er_loss, P.boundary_loss])
def test_gradcheck(loss):
    x, target = blobs((1, 2, 5, 4), "multiclass", dtype=torch.float64)
    arguments = {"erosions": 2, "classes": [1]} if loss is P.hausdorff_er_loss else {}
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, target, reduction="none", **arguments), (x,), eps=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    x, target = blobs((2, 3, 14, 13), "multiclass", dtype=dtype)
    for loss in (P.hausdorff_dt_loss, P.boundary_loss):
        wide, narrow = x.float().requires_grad_(), x.clone().requires_grad_()
        values = loss(wide, target), loss(narrow, target)
        assert values[1].dtype == torch.float32
        torch.testing.assert_close(*values)
        (expected,), (gradient,) = torch.autograd.grad(values[0], wide), torch.autograd.grad(values[1], narrow)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected.to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("loss", [P.hausdorff_dt_loss, P.hausdorff_er_loss, P.boundary_loss, P.shape_aware_loss])
def test_empty(loss):
    x, target = blobs((2, 3, 9, 8), "multiclass")
    arguments = {"erosions": 2} if loss is P.hausdorff_er_loss else {}
    nothing = torch.full_like(target, 9)
    for z, t in ((x, nothing), (x[:0], target[:0]), (x, target * 0), (x * 0, target), (x * 300, target)):
        for reduction in ("mean", "none"):
            variable = z.clone().requires_grad_()
            value = loss(variable, t, ignore_index=9, reduction=reduction, **arguments)
            (gradient,) = torch.autograd.grad(value.sum(), variable)
            assert value.isfinite().all() and gradient.isfinite().all()
            if t is nothing:
                assert not value.any() and not gradient.any()


# ---- shape-aware ----


def curve(labels):
    """Pixels with a 4-neighbour of another label, one by one."""
    labels = labels.numpy()
    out = np.zeros(labels.shape, bool)
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            for u, v in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= u < height and 0 <= v < width and labels[u, v] != labels[y, x]:
                    out[y, x] = True
    return out


@pytest.mark.parametrize("mode", ["multiclass", "binary"])
@pytest.mark.parametrize("ignore", [None, 9])
def test_shape_aware(mode, ignore):
    x, target = blobs((2, 3, 12, 11), mode, ignore=ignore)
    valid = torch.ones_like(target, dtype=torch.bool) if ignore is None else target != ignore
    predicted = (x.argmax(1) if mode == "multiclass" else (x[:, 0] > 0).long()) * valid
    true = target * valid
    weights = []
    for n in range(2):
        distance = ndimage.distance_transform_edt(~curve(true[n]))
        mean = distance[curve(predicted[n])].mean()
        weights.append(1 + 0.5 * mean * (predicted[n] != true[n]))
    weights = torch.stack(weights)

    def map_(z):
        if mode == "multiclass":
            return valid * weights * torch.nn.functional.cross_entropy(z, true, reduction="none")
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], true.double(), reduction="none")
        return valid * weights * entropy

    arguments = {"scale": 0.5, "mode": mode, "ignore_index": ignore}
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    for reduction, divisor in (("mean", valid.sum()), ("sum", 1)):
        value, expected = (
            P.shape_aware_loss(ours, target, reduction=reduction, **arguments),
            map_(theirs).sum() / divisor,
        )
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        (gradient,), (wanted,) = torch.autograd.grad(value, ours), torch.autograd.grad(expected, theirs)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)
    wide = x.double()
    torch.testing.assert_close(P.shape_aware_loss(wide, target, reduction="none", **arguments), map_(wide))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float32])
def test_target_dtypes(dtype):
    x, target = blobs((2, 1, 9, 8), "binary")
    for loss in (P.hausdorff_dt_loss, P.boundary_loss, P.shape_aware_loss):
        assert torch.equal(loss(x, target.to(dtype), mode="binary"), loss(x, target, mode="binary"))
        assert torch.equal(loss(x, target.unsqueeze(1).to(dtype), mode="binary"), loss(x, target, mode="binary"))


def test_labels_outside():
    x, target = blobs((2, 3, 9, 8), "multiclass")
    for bad in (3, -1):
        with pytest.raises(
            RuntimeError, match=rf"boundary_loss: target must be in \[0, 3\) or ignore_index, got {bad}"
        ):
            P.boundary_loss(x, target.masked_fill(target == 1, bad))


def test_errors():
    x, target = blobs((2, 3, 9, 8), "multiclass")
    with pytest.raises(ValueError, match=r"hausdorff_dt_loss: spacing must have 2 values, got \[1.0\]"):
        P.hausdorff_dt_loss(x, target, spacing=[1.0])
    with pytest.raises(ValueError, match="hausdorff_dt_loss: alpha must be positive, got 0"):
        P.hausdorff_dt_loss(x, target, alpha=0)
    with pytest.raises(ValueError, match="hausdorff_er_loss: erosions must be at least 1, got 0"):
        P.hausdorff_er_loss(x, target, erosions=0)
    with pytest.raises(RuntimeError, match=r"boundary_loss: input must be \[N, C, H, W\] or \[N, C, D, H, W\]"):
        P.boundary_loss(x[..., 0], target[..., 0])
