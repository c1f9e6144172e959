"""Inputs for the tests of the operators on segmentation maps."""

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "channels_last", "strided")
# Of a sum's largest magnitude: what sums in float32 lose; float64 loses less.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-6}
# Of a gradient's largest element: rounding of the result.
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def in_layout(x, layout):
    """[N, C, *S] with the values of x."""
    if layout == "strided":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "channels_last" and x.dim() > 3:
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x


def make_logits(shape, dtype=torch.float32, activation="softmax", layout="contiguous", seed=0):
    x = torch.randn(shape, generator=generator(seed)) * 2
    if activation == "none":
        x = x.sigmoid() * 0.96 + 0.02
    return in_layout(x.to(dtype), layout)


def make_labels(shape, activation="softmax", dtype=torch.int64, ignore=None, seed=1):
    """[N, *S] for logits of `shape`; a fifth of them `ignore`."""
    n, c, *size = shape
    limit = 2 if c == 1 and activation != "softmax" else c
    labels = torch.randint(limit, (n, *size), generator=generator(seed)).to(dtype)
    if ignore is not None:
        labels[torch.rand(labels.shape, generator=generator(seed + 1)) < 0.2] = ignore
    return labels


def make_dense(shape, dtype=torch.float32, ignore=None, layout="contiguous", seed=1):
    if dtype.is_floating_point:
        g = torch.rand(shape, generator=generator(seed)).to(dtype)
    else:
        g = torch.randint(2, shape, generator=generator(seed)).to(dtype)
        if ignore is not None:
            g[torch.rand(shape, generator=generator(seed + 1)) < 0.2] = ignore
    return in_layout(g, layout)


def assert_near(got, expected, tolerance, what=""):
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan()), what
    error = (got - expected).nan_to_num().abs().max().item() if got.numel() else 0.0
    assert error <= tolerance * max(0.3, expected.nan_to_num().abs().max().item() if got.numel() else 0), (what, error)
