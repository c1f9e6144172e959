"""The losses from their definitions, on dense float64 probabilities and targets: oracles of the fused ones."""

import torch
from torch.nn import functional as F

SHAPES = [(2, 4, 9), (2, 3, 8, 7), (1, 4, 5, 4, 6)]


def draw(shape, mode, seed=0, ignore=None, dtype=torch.float32, device="cpu"):
    """Logits [N, C, *S] and labels, or 0/1 targets for multilabel; a fifth of them ignored if asked for."""
    generator = torch.Generator().manual_seed(seed)
    n, c, *size = shape
    c = 1 if mode == "binary" else c
    x = (torch.randn(n, c, *size, generator=generator) * 2).to(dtype)
    target_shape = (n, c, *size) if mode == "multilabel" else (n, *size)
    target = torch.randint(0, c if mode == "multiclass" else 2, target_shape, generator=generator)
    if ignore is not None:
        target[torch.rand(target_shape, generator=generator) < 0.2] = ignore
    return x.to(device), target.to(device)


def dense(x, target, mode, ignore=None, from_logits=True):
    """p, g and which elements count, all [N, C, *S] float64."""
    x = x.double()
    p = x if not from_logits else x.softmax(1) if mode == "multiclass" else x.sigmoid()
    valid = torch.ones_like(target, dtype=torch.bool) if ignore is None else target != ignore
    clean = target.masked_fill(~valid, 0)
    if target.dim() == x.dim():
        g = clean.double()
    elif x.shape[1] == 1:
        g, valid = clean.unsqueeze(1).double(), valid.unsqueeze(1)
    else:
        g, valid = F.one_hot(clean.long(), x.shape[1]).movedim(-1, 1).double(), valid.unsqueeze(1)
    v = valid.double().expand_as(p)
    return p, g * v, v


def smoothed(g, v, epsilon, mode):
    return (g * (1 - epsilon) + epsilon / (g.shape[1] if mode == "multiclass" else 2)) * v


def total(values, batch=False):
    """Sums over the pixels [N, C], or over the batch too [1, C]."""
    sums = values.flatten(2).sum(2)
    return sums.sum(0, keepdim=True) if batch else sums


# Each takes p, g, v and batch, and returns [N, C].


def dice(p, g, v, batch=False, s=1e-5):
    return 1 - (2 * total(p * g * v, batch) + s) / (total(p * v, batch) + total(g, batch) + s)


def dice_squared(p, g, v, batch=False, s=1e-5):
    return 1 - (2 * total(p * g * v, batch) + s) / (total(p * p * v, batch) + total(g * g, batch) + s)


def log_cosh_dice(p, g, v, batch=False):
    return torch.log(torch.cosh(dice(p, g, v, batch)))


def jaccard(p, g, v, batch=False, s=1e-5):
    overlap = total(p * g * v, batch)
    return 1 - (overlap + s) / (total(p * v, batch) + total(g, batch) - overlap + s)


def tversky(p, g, v, batch=False, alpha=0.3, beta=0.7, s=1e-5):
    hit = total(p * g * v, batch)
    return 1 - (hit + s) / (hit + alpha * total(p * (1 - g) * v, batch) + beta * total((1 - p) * g * v, batch) + s)


def focal_tversky(p, g, v, batch=False):
    return tversky(p, g, v, batch) ** 0.75


def sensitivity_specificity(p, g, v, batch=False, r=0.05, s=1e-5):
    error = (g - p) ** 2 * v
    return r * total(error * g, batch) / (total(g, batch) + s) + (1 - r) * total(error * (1 - g), batch) / (
        total((1 - g) * v, batch) + s
    )


def mcc(p, g, v, batch=False, s=1e-5):
    tp, fp = total(p * g * v, batch), total(p * (1 - g) * v, batch)
    fn, tn = total((1 - p) * g * v, batch), total((1 - p) * (1 - g) * v, batch)
    return 1 - (tp * tn - fp * fn) / torch.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + s)


def generalized_dice(p, g, v, batch=False, s=1e-5):
    size = total(g, batch)
    weight = torch.where(size > 0, 1 / size.clamp_min(1) ** 2, 0)
    weight = torch.where(size > 0, weight, weight.amax(1, keepdim=True))
    above = 2 * (weight * total(p * g * v, batch)).sum(1) + s
    return 1 - above / ((weight * (total(p * v, batch) + size)).sum(1) + s)


def jaccard_of_prefixes(errors, g):
    """The Lovasz extension of the Jaccard loss by its definition: sorted errors times what each adds to the loss."""
    errors, order = errors.sort(descending=True, stable=True)
    g = g[order]

    def set_loss(i):  # of predicting wrongly the first i
        wrong = torch.zeros_like(g)
        wrong[:i] = 1
        missed, invented = (wrong * g).sum(), (wrong * (1 - g)).sum()
        union = g.sum() + invented
        return missed * 0 if union == 0 else 1 - (g.sum() - missed) / union

    return sum(errors[i] * (set_loss(i + 1) - set_loss(i)) for i in range(len(g)))
