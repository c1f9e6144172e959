"""Maps for the tests of interpolation, and comparisons."""

import torch

FLOAT, DOUBLE = torch.float32, torch.float64
DTYPES = [FLOAT, DOUBLE, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "strided", "sliced channels", "expanded"]
ROUNDING = {FLOAT: 2e-6, DOUBLE: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make_map(shape, dtype=FLOAT, layout="contiguous", seed=0):
    """Random values."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # neither rows nor channels side by side
        return x.repeat_interleave(2, -1)[..., ::2].transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced channels":  # channels side by side, with a gap behind each pixel's
        wide = torch.cat([x, x[:, :1]], 1).movedim(1, -1).contiguous()
        return wide[..., :-1].movedim(-1, 1)
    if layout == "expanded":
        return x[:, :1].expand(shape)
    return x


def make_pyramid(shapes, dtype=FLOAT, layout="contiguous", images=2, device="cpu"):
    return [make_map((images, *shape), dtype, layout, seed).to(device) for seed, shape in enumerate(shapes)]


def make_filters(rates, channels, dtype=FLOAT, device="cpu"):
    """weight, scale, shift."""
    shapes = ((rates, channels, 3, 3), (rates, channels), (rates, channels))
    return [make_map(shape, dtype, seed=20 + i).to(device) for i, shape in enumerate(shapes)]


def assert_near(actual, expected, terms=1.0):
    """`terms`: how many products of numbers about one are summed, the difference growing with its root."""
    rounding = ROUNDING[actual.dtype] * max(1.0, expected.abs().max().item())
    tolerance = rounding + (1e-14 if actual.dtype == DOUBLE else 1e-6) * terms**0.5
    got, want = actual.detach().cpu().double(), expected.detach().double()
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def doubles(tensors):
    return [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in tensors]
