"""The quick cases under pytest-benchmark, with 1 thread: python -m pytest benchmarks --benchmark-group-by=param:case.

For statistics and comparisons between commits (--benchmark-autosave, --benchmark-compare). Contenders do not take turns
here, so the figures that the project quotes come from run.py.
"""

import contextlib

import pytest
import torch

import cases

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

QUICK = {case.name: case for case in cases.all_cases() if case.quick}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(name, contender.name) for name, case in QUICK.items() for contender in case.build().contenders]
    metafunc.parametrize("case, contender", pairs)


def test_speed(benchmark, case: str, contender: str) -> None:
    chosen = QUICK[case]
    (make,) = [other.make for other in chosen.build().contenders if other.name == contender]
    torch._dynamo.reset()
    torch.set_num_threads(1)
    prepared = make()
    with torch.inference_mode() if chosen.inference else contextlib.nullcontext():
        prepared.call()  # what the first call allocates or builds is not measured
        benchmark.extra_info["path"] = prepared.path
        benchmark(prepared.call)
