"""Images, labels and parameters for the tests of warps, and comparisons."""

import torch

from pyseg import reference

FLOAT, DOUBLE = torch.float32, torch.float64
FLOATS = [FLOAT, DOUBLE, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.uint8]
BORDERS = ["reflect", "replicate", "constant"]
LAYOUTS = ["contiguous", "channels_last", "strided", "expanded"]
ROUNDING = {FLOAT: 2e-5, DOUBLE: 1e-12, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make_image(shape, dtype=FLOAT, layout="contiguous", seed=0):
    """From 0 to 1, or to 255."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    x = (x * 256).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2].transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[:, :1].expand(shape)
    return x


def make_labels(shape, dtype=torch.int64, seed=1):
    most = 2 if dtype == torch.bool else 100
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_warp(images, size, grid=None, strength=0.3, seed=2):
    """affine near the identity and displacement, float32, for images of this size."""
    generator = torch.Generator().manual_seed(seed)
    axes = len(size)
    affine = torch.eye(axes, axes + 1) + strength * torch.randn(images, axes, axes + 1, generator=generator)
    affine[..., -1] *= min(size) / 4
    displacement = torch.randn(images, axes, *(grid or [3, 4, 2][:axes]), generator=generator)
    return affine, displacement * strength * min(size) / 3


def make_factors(images, channels, seed=3):
    """gain and bias."""
    factors = torch.rand(2, images, channels, generator=torch.Generator().manual_seed(seed))
    return factors[0] + 0.5, factors[1]


def assert_near(actual, expected, scale=1.0):
    tolerance = ROUNDING[actual.dtype] * max(1.0, expected.abs().max().item()) * scale
    torch.testing.assert_close(actual.detach().cpu().double(), expected.detach().double(), rtol=0, atol=tolerance)


def assert_labels(actual, expected, affine, displacement, size, cubic=-0.5):
    """The same but where a place is as near to two elements, to rounding."""
    places = reference.warp_places(affine, displacement, size, cubic)
    tied = ((places - 0.5 - (places - 0.5).round()).abs() < 1e-3).any(1)
    assert torch.equal(actual.cpu()[~tied], expected[~tied])
    assert tied.double().mean() < 0.05
