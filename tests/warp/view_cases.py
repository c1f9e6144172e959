"""Cameras and depth maps for the tests of warp_to_view, and comparisons."""

import math

import torch

DOUBLE = torch.float64
DTYPES = [torch.float32, DOUBLE, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "strided", "sliced channels", "every other channel"]
ROUNDING = {torch.float32: 3e-6, DOUBLE: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_scores(shape, dtype=torch.float32, layout="contiguous", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # neither rows nor channels side by side
        return x.repeat_interleave(2, -1)[..., ::2].transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced channels":  # channels side by side, with a gap behind each pixel's
        return torch.cat([x, x[:, :1]], 1).movedim(1, -1).contiguous()[..., :-1].movedim(-1, 1)
    if layout == "every other channel":  # of a channels_last map: torch's reading of its strides is channels_last too
        return x.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2]
    return x


def make_geometry(images, key_size, size, seed=0, angle=0.25, shift=0.25):
    """depth, key_intrinsics, source_intrinsics, pose and source_depth: of float64, with some of everything invalid.

    About half of the pixels are seen: with an absolute tolerance of 0.6.
    """
    g = torch.Generator().manual_seed(seed)
    depth = 2 + torch.rand(images, *key_size, generator=g, dtype=DOUBLE)
    flat = depth.flatten()
    for i, wrong in enumerate((0.0, math.nan, -1.0, math.inf)):
        if flat.numel() > 8:
            flat[(5 * i + 3) % flat.numel()] = wrong
    poses = torch.eye(4, dtype=DOUBLE).repeat(images, 1, 1)
    for pose in poses:
        axis = torch.randn(3, generator=g, dtype=DOUBLE)
        x, y, z = (angle * axis / axis.norm()).tolist()
        pose[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=DOUBLE))
        pose[:3, 3] = shift * torch.randn(3, generator=g, dtype=DOUBLE)
    measured = 2.5 + 0.5 * torch.randn(images, *size, generator=g, dtype=DOUBLE)
    measured.view(-1)[::17] = 0
    return depth, intrinsics(images, *key_size), intrinsics(images, *size), poses, measured


def intrinsics(images, height, width):
    matrix = [[0.8 * width, 0.05 * width, width / 2 - 0.4], [0, 0.8 * height, height / 2 - 0.6], [0, 0, 1]]
    return torch.tensor(matrix, dtype=DOUBLE).repeat(images, 1, 1)


def assert_near(actual, expected, terms=1.0):
    """`terms`: how many products of numbers about one are summed, the difference growing with its root."""
    tolerance = ROUNDING[actual.dtype] * max(1.0, expected.abs().max().item()) * terms**0.5
    torch.testing.assert_close(
        actual.detach().cpu().double(), expected.detach().double(), rtol=tolerance, atol=tolerance
    )
