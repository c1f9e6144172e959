"""What the tests of the dense CRF share."""

import contextlib

import numpy as np
import skimage.data
import torch
from PIL import Image

PHOTOS = ("astronaut", "coffee", "chelsea")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def photo(name, width=64, height=48):
    """[1, 3, height, width] uint8."""
    image = Image.fromarray(getattr(skimage.data, name)()).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()


def noisy_unary(classes, height, width, smooth=4.0, seed=0):
    """[1, C, H, W] energies of blobs of classes, as a network's output is."""
    from scipy.ndimage import gaussian_filter

    logits = gaussian_filter(np.random.default_rng(seed).standard_normal((classes, height, width)), (0, smooth, smooth))
    return -torch.from_numpy(logits / logits.std() * 2)[None].log_softmax(1)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_each_number_of_threads(function):
    """Results of `function`, tensors, for 1, 2 and 3 threads: checked to have the same bits."""
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append([tensor for tensor in function() if tensor is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
