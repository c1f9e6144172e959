"""Asserts what CUDA kernels did, so that a scalar loop cannot pass for the tensor-core path:

with cuda_budget("atrous_conv2d_dense", min_bytes=x.nbytes + w.nbytes + y.nbytes, mma=macs, max_fma=4 * y.numel()):
    y = torch.ops.pyseg.atrous_conv2d(x, w, ...)
"""

import dataclasses
import json
import os
import re

import pytest

from devices import fake_gpu


@dataclasses.dataclass
class cuda_budget:
    """What the kernels whose demangled name matches the regular expression `kernels` may do inside the block.

    Counts come from the fake GPU; elsewhere (CPU, real GPU) it does nothing, so a test needs no special case.
    `make check-cuda` shows the ratios of what was done to what was needed in its table.
    """

    kernels: str
    _: dataclasses.KW_ONLY
    # Exact number of launches; at least one is needed in any case.
    launches: int | None = None
    # Bytes of device memory that must be read and written at the least, each input and output once. What is moved, in
    # 32-byte sectors and as if there were no cache, must lie in [1, bytes_ratio] times that.
    min_bytes: float | None = None
    bytes_ratio: float = 1.5
    # Multiply-adds needed on the tensor cores; those executed must lie in [1, mma_ratio] times that. 0 means none.
    mma: float | None = None
    mma_ratio: float = 1.25
    # Multiply-adds needed in ordinary float32 and float64 arithmetic, likewise.
    fma: float | None = None
    fma_ratio: float = 1.25
    # The most ordinary multiply-adds allowed (an epilogue needs some).
    max_fma: float | None = None
    # The largest factor of shared-memory passes over the fewest possible.
    bank_conflicts: float | None = None

    def __enter__(self) -> None:
        self._before = self._totals()

    def __exit__(self, exception, *_) -> None:
        __tracebackhide__ = True
        if fake_gpu() is None or exception is not None:
            return
        after = self._totals()
        used = {key: value - self._before.get(key, 0) for key, value in after.items()}
        if not used.get("launches"):
            pytest.fail(f"no kernel that matches {self.kernels!r} was launched; this process has run: {_kernels_run()}")
        bytes_moved = 32 * (used["global_load_sectors"] + used["global_store_sectors"] + used["atomic_sectors"])
        mma, fma = used["mma_flops"] / 2, used["fma_lanes"] + used["fma64_lanes"]
        conflicts = used["shared_wavefronts"] / max(1, used["shared_wavefronts_ideal"])
        bounds = [  # what, measured, at least, at most or None for no check
            ("launches", used["launches"], self.launches, self.launches),
            ("bytes moved", bytes_moved, self.min_bytes, _times(self.min_bytes, self.bytes_ratio)),
            ("tensor-core multiply-adds", mma, self.mma, _times(self.mma, self.mma_ratio)),
            ("ordinary multiply-adds", fma, self.fma, _times(self.fma, self.fma_ratio)),
            ("ordinary multiply-adds", fma, 0, self.max_fma),
            ("shared-memory passes over the fewest possible", conflicts, 0, self.bank_conflicts),
        ]
        needed = {"bytes": (bytes_moved, self.min_bytes), "mma": (mma, self.mma), "fma": (fma, self.fma)}
        self._record({what: got / least for what, (got, least) in needed.items() if least})
        wrong = [
            f"{what}: {got:g}, expected {low:g}" + (f" to {high:g}" if high != low else "")
            for what, got, low, high in bounds
            if high is not None and not low <= got <= high
        ]
        if wrong:
            pytest.fail("\n  ".join([f"kernels {self.kernels!r} left their budget", *wrong]))

    def _totals(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for entry in fake_gpu().counters() if fake_gpu() else []:
            if re.search(self.kernels, entry["kernel"]):
                for key, value in entry.items():
                    if isinstance(value, int | float):
                        totals[key] = totals.get(key, 0) + value
        return totals

    def _record(self, ratios: dict[str, float]) -> None:
        """For the table of `make check-cuda`."""
        if path := os.environ.get("PYSEG_BUDGET_FILE"):
            with open(path, "a") as file:
                file.write(json.dumps({"kernels": self.kernels, **ratios}) + "\n")


def _times(value: float | None, ratio: float) -> float | None:
    return None if value is None else value * ratio


def _kernels_run() -> str:
    names = {re.sub(r"[<(].*", "", entry["kernel"]).split(" ")[-1] for entry in fake_gpu().counters()}
    return ", ".join(sorted(names)) or "none"
