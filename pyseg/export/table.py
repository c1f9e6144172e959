"""The table from operators to what stands in for them, filled by the other files of this folder."""

from collections.abc import Callable
from typing import Any

import torch

import pyseg._ops  # noqa: F401  registers the operators

Decomposition = Callable[..., Any]
TABLE: dict[torch._ops.OpOverload, Decomposition] = {}


def decomposes(name: str) -> Callable[[Decomposition], Decomposition]:
    """Enters a function, with the arguments of pyseg's operator of this name, as its decomposition into ATen's."""
    return replaces(getattr(torch.ops.pyseg, name).default)


def replaces(operator: torch._ops.OpOverload) -> Callable[[Decomposition], Decomposition]:
    """The same for any operator."""

    def enter(function: Decomposition) -> Decomposition:
        TABLE[operator] = function
        return function

    return enter


def cannot(op: str, what: str) -> RuntimeError:
    """The error of an operator, or of a way to use it, that other runtimes have no operators for."""
    return RuntimeError(f"{op}: {what}; docs/export.md says what can be exported")
