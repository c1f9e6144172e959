"""Measures the contenders of one case beside each other: agreement first, then interleaved timing, then memory."""

import contextlib
import ctypes
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESOLUTION_NS = 50_000  # shorter calls are timed several at a time
BLOCK_NS = 20_000_000  # how long a contender runs before the next one's turn
COLD_NS = 100_000_000  # calls shorter than this get an untimed call when their turn comes, to refill the caches
MAX_SAMPLES_PER_BLOCK = 50


@dataclass
class Prepared:
    """A contender ready to run: everything that a user does once (packing, compiling) is done."""

    call: Callable[[], Any]  # returns the results: a tensor or a sequence of tensors
    cached_bytes: int = 0  # kept between calls beyond inputs and weights
    path: str = ""  # ours: which of our paths runs; "torch" where our plan hands the work to torch


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[[], Prepared]
    ours: bool = False


@dataclass(frozen=True)
class Workload:
    contenders: list[Contender]
    expected: Callable[[], Iterable[Tensor]]  # in float64, or exact


@dataclass(frozen=True)
class Case:
    name: str
    groups: tuple[str, ...]  # the rows of the summary that this case counts in; the first is its family
    build: Callable[[], Workload]
    params: dict[str, Any]
    baseline: str  # name of the contender that stands for how models run today
    tolerance: float  # largest difference allowed, relative to the largest magnitude expected
    # (floating point operations of the direct method, those with zeros outside the map left out; bytes, with each input
    # read once and each output written once)
    least: Callable[[], tuple[int, int]]
    inference: bool = True
    quick: tuple[int, ...] = ()  # numbers of threads at which the quick run includes this case
    note: str = ""


@dataclass(frozen=True)
class Budget:
    seconds: float = 1.5  # of timing a case; exceeded where min_rounds take longer
    min_rounds: int = 3
    max_rounds: int = 15
    one_call_seconds: float = 8.0  # a contender whose first call takes longer is timed by it alone


@dataclass
class _Running:
    contender: Contender
    prepared: Prepared
    difference: float
    estimate_ns: int
    samples_ns: list[float] = field(default_factory=list)


def measure(case: Case, budget: Budget) -> dict[str, Any]:
    """The record of one case. Contenders that raise or disagree are refused: recorded with the reason, not timed."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what other cases compiled must not count against this one's recompilation limit
    workload = case.build()
    expected = list(workload.expected())
    entries: dict[str, dict[str, Any]] = {}
    running: list[_Running] = []
    with _mode(case):
        for contender in workload.contenders:
            entry = entries[contender.name] = refused(contender, "")
            try:
                ready = _warm_up(case, contender, expected, budget)
            except Exception as error:  # whatever a peer raises is its result
                entry["reason"] = describe(error)
                continue
            entry["difference"] = ready.difference
            if not ready.difference <= case.tolerance:  # also where it is NaN
                entry["reason"] = f"difference {ready.difference:.1e} exceeds {case.tolerance:.1e}"
                continue
            running.append(ready)
        _time_interleaved(running, budget)
        for ready in running:
            entry = entries[ready.contender.name]
            entry.update(_statistics(ready), peak_bytes=extra_peak(ready.prepared.call, ready.estimate_ns), status="ok")
    return record(case, list(entries.values()))


def refused(contender: Contender, reason: str) -> dict[str, Any]:
    return {"name": contender.name, "ours": contender.ours, "status": "refused", "reason": reason}


def record(case: Case, entries: list[dict[str, Any]]) -> dict[str, Any]:
    flops, bytes_ = case.least()
    return {
        "name": case.name,
        "groups": list(case.groups),
        "params": case.params,
        "baseline": case.baseline,
        "tolerance": case.tolerance,
        "flops": flops,
        "bytes": bytes_,
        "note": case.note,
        "entries": entries,
    }


def difference(actual: Any, expected: list[Tensor]) -> float:
    """Largest difference relative to the largest magnitude expected, over all results."""
    results = [actual] if isinstance(actual, Tensor) else list(actual)
    if len(results) != len(expected):
        raise ValueError(f"{len(results)} results instead of {len(expected)}")
    worst = 0.0
    for result, reference in zip(results, expected, strict=True):
        if result.shape != reference.shape:
            raise ValueError(f"result of shape {list(result.shape)} instead of {list(reference.shape)}")
        if reference.numel() == 0:
            continue
        error = (result.detach().to(reference.dtype) - reference).abs().max().item()
        scale = reference.abs().max().item()
        relative = error / scale if scale else error
        if not relative <= worst:  # lets NaN through, which `max` might lose
            worst = relative
        if math.isnan(worst):
            break
    return worst


def describe(error: BaseException) -> str:
    """One line without this machine's paths."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"(?:~|/[^\s/:'\"]+)?(?:/[^\s/:'\"]+)+/", "", lines[0] if lines else "")
    return f"{type(error).__name__}: {text}"[:300]


def _mode(case: Case) -> contextlib.AbstractContextManager[Any]:
    return torch.inference_mode() if case.inference else contextlib.nullcontext()


def _warm_up(case: Case, contender: Contender, expected: list[Tensor], budget: Budget) -> _Running:
    with torch.inference_mode(False):  # weights are normal tensors, as in a model
        prepared = contender.make()
    result, nanoseconds = _timed(prepared.call)
    ready = _Running(contender, prepared, difference(result, expected), nanoseconds)
    del result
    if nanoseconds > budget.one_call_seconds * 1e9:
        ready.samples_ns.append(nanoseconds)
    else:
        ready.estimate_ns = _timed(prepared.call)[1]  # the first call may have allocated or built something
    return ready


def _timed(call: Callable[[], Any]) -> tuple[Any, int]:
    start = time.perf_counter_ns()
    result = call()
    return result, max(time.perf_counter_ns() - start, 1)


def _time_interleaved(running: list[_Running], budget: Budget) -> None:
    """Rounds in which every contender has one block; the order rotates, so that none always follows the same one."""
    timed = [ready for ready in running if not ready.samples_ns]
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for round_ in range(budget.max_rounds):
            if round_ >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
                break
            shift = round_ % len(timed) if timed else 0
            for ready in timed[shift:] + timed[:shift]:
                _time_block(ready)
    finally:
        gc.enable()


def _time_block(ready: _Running) -> None:
    call, clock = ready.prepared.call, time.perf_counter_ns
    calls = range(math.ceil(RESOLUTION_NS / ready.estimate_ns))
    samples = BLOCK_NS // (ready.estimate_ns * len(calls))
    if ready.estimate_ns < COLD_NS:
        call()
    for _ in range(min(max(samples, 1), MAX_SAMPLES_PER_BLOCK)):
        start = clock()
        for _ in calls:
            call()
        ready.samples_ns.append((clock() - start) / len(calls))


def _statistics(ready: _Running) -> dict[str, Any]:
    samples = ready.samples_ns
    low, middle, high = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (samples[0],) * 3
    )
    return {
        "median_ms": middle / 1e6,
        "quartile1_ms": low / 1e6,
        "quartile3_ms": high / 1e6,
        "min_ms": min(samples) / 1e6,
        "samples": len(samples),
        "cached_bytes": ready.prepared.cached_bytes,
        "path": ready.prepared.path,
    }


# ---- memory ----


def extra_peak(call: Callable[[], Any], estimate_ns: int) -> int | None:
    """Bytes by which one call, its result included, raises the process's resident memory at most.

    Freed memory is given back to the system first, so that all that the call allocates counts, whoever allocates it
    (torch's allocator, oneDNN, a kernel of ours). None where the kernel does not offer /proc/self/clear_refs.
    """
    repetitions = 3 if estimate_ns < 300_000_000 else 1
    try:
        return min(_peak_of_call(call) for _ in range(repetitions))
    except OSError:
        return None


def _peak_of_call(call: Callable[[], Any]) -> int:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        raise OSError("no malloc_trim")
    trim(ctypes.c_size_t(0))
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM") - before
    del result
    return max(peak, 0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key}")
