"""Maps and boxes for the tests of the RoI operators."""

import torch

LAYOUTS = ["contiguous", "channels_last", "strided", "sliced channels", "expanded"]


def make_map(shape, dtype=torch.float32, layout="contiguous", seed=0):
    """Random values, of [N, C, H, W] or [N, C, D, H, W]."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":  # neither rows nor channels side by side
        return x.repeat_interleave(2, -1)[..., ::2].transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced channels":  # channels side by side, with a gap behind each element's
        wide = torch.cat([x, x[:, :1]], 1).movedim(1, -1).contiguous()
        return wide[..., :-1].movedim(-1, 1)
    if layout == "expanded":
        return x[:, :1].expand(shape)
    return x


def make_boxes(count, images, size, *, kind="aligned", dtype=torch.float32, seed=0, least=0.3, beyond=0.2):
    """Rows of [batch index, coordinates] over a map of size (D,) H, W; some reach beyond it."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    extent = torch.tensor([*size], dtype=torch.float64).flip(0)  # x, y, z
    centre = uniform(-beyond, 1 + beyond, count, len(size)) * extent
    length = uniform(0.0, 1.0, count, len(size)) * extent + least
    index = torch.randint(0, images, (count, 1), generator=generator).double()
    if kind == "rotated":
        rows = [index, centre, length, uniform(-360.0, 360.0, count, 1)]
    else:
        rows = [index, centre - length / 2, centre + length / 2]
    return torch.cat(rows, 1).to(dtype)


def on_grid(boxes, step=64):
    """Coordinates with few digits: every type computes the same points of them."""
    return torch.cat([boxes[:, :1], (boxes[:, 1:] * step).round() / step], 1)
