"""What the tests of blocks share."""

import torch
from torch import nn

TOLERANCE = 1e-4


def settle(model):
    """Batch norms as after training; eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
    return model.eval()


def assert_close(got, expected, tolerance=TOLERANCE):
    """To `tolerance` of the largest magnitude."""
    assert got.shape == expected.shape
    scale = expected.detach().abs().max().item()
    assert (got.detach().cpu() - expected.detach().cpu()).abs().max().item() <= tolerance * scale


def assert_ran(module, inputs, present=(), absent=()):
    """Operators that one call runs, and some that it does not."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(*inputs)
    names = {event.key for event in profile.key_averages()}
    assert set(present) <= names
    assert not set(absent) & names
