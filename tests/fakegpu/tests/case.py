"""Registers cases, runs them and prints 'PASS name' or 'FAIL name: why' for each."""

import traceback

import torch

CASES = {}
generator = torch.Generator().manual_seed(5)


def case(f):
    CASES[f.__name__] = f
    return f


def run_cases(names):
    """Those named, or all."""
    for name in names or list(CASES):
        try:
            CASES[name]()
            print("PASS", name, flush=True)
        except Exception as e:
            if not isinstance(e, AssertionError):
                traceback.print_exc()
            print(f"FAIL {name}: {e}", flush=True)


def rand(*shape):
    return torch.rand(*shape, generator=generator) * 2 - 1


def close(a, b, rtol=1e-5, atol=1e-6):
    a, b = a.cpu(), b.cpu()
    if not torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True):
        raise AssertionError(f"max difference {(a.double() - b.double()).abs().max().item()}")


def equal(a, b):
    a, b = a.cpu(), b.cpu()
    if not torch.equal(a, b):
        bad = (a != b).nonzero()
        at = tuple(bad[0])
        raise AssertionError(f"{len(bad)} different, first at {bad[0].tolist()}: {a[at]} instead of {b[at]}")
