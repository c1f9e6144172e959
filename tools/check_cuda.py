"""Checks the CUDA kernels on any machine that has nvcc, GPU or not: `make check-cuda`.

Runs fakegpu's own tests and the cuda half of the operator tests on the fake GPU for each compute capability and block
order, reads the compiler's output, prints one table, and ends with status 1 if a rule of check_cuda.toml or of the
list below is broken:
  - a test fails, a kernel breaks a rule of the CUDA model;
  - a kernel of the library that no test ran;
  - spills, local memory, a stack frame, too low an occupancy, no tensor-core instruction where one is promised.
Kernels outside namespace pyseg (CUB's) are left out. What this cannot show: speed, weak memory ordering, the tensor
core's last bits.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from check_cuda_binary import Kernel, demangle, occupancy, read_machine_code, shorten

ROOT = Path(__file__).resolve().parents[1]
FAKEGPU = ROOT / "tests" / "fakegpu"
RULES = Path(__file__).with_suffix(".toml")
NAMESPACE = "pyseg"
MACHINE_CODE = (80, 90)  # capabilities whose machine code is judged
CAPABILITIES = (75, 80, 90)  # capabilities that the tests run on


# ------------------------------------------------------------------------------------------ running


def find_module() -> Path:
    sys.path.insert(0, str(ROOT))
    package = importlib.util.find_spec(NAMESPACE)
    for folder in package.submodule_search_locations if package else []:
        for path in Path(folder).glob("_C_cuda*.so"):
            return path
    raise SystemExit(f"check-cuda: {NAMESPACE} was built without CUDA ({NAMESPACE}._C_cuda is missing)")


@dataclass
class Job:
    """A command that runs beside others; its output is shown when it fails."""

    name: str
    command: list[str]
    settings: dict[str, str] = field(default_factory=dict)
    ok_statuses: tuple[int, ...] = (0,)

    def run(self) -> list[str]:
        start = time.monotonic()
        environment = dict(os.environ, **self.settings)
        done = subprocess.run(
            self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        good = done.returncode in self.ok_statuses
        lines = [line for line in done.stdout.strip().splitlines() if not line.startswith("make")]
        print(f"{self.name}: {lines[-1].strip('= ') if lines else ''} ({time.monotonic() - start:.0f} s)", flush=True)
        if not good:
            print(f"{'-' * 40} the end of its output\n{done.stdout[-8000:]}{'-' * 40}", flush=True)
        return [] if good else [f"{self.name} failed"]


def run_everything(folder: Path, self_tests: bool, pytest_arguments: list[str]) -> list[str]:
    """Leaves report_SM.jsonl and budget_SM.jsonl in the folder; returns what failed."""
    make = ["make", "-C", str(FAKEGPU), f"PYTHON={sys.executable}"]
    if trouble := Job("building fakegpu", [*make, f"-j{os.cpu_count()}"]).run():
        return trouble
    jobs = [Job("fakegpu's own tests", [*make, "check"])] if self_tests else []
    for sm in CAPABILITIES:
        settings = {
            "PYSEG_FAKEGPU": "1",
            "FAKEGPU_REPORT_FILE": str(folder / f"report_{sm}.jsonl"),
            "PYSEG_BUDGET_FILE": str(folder / f"budget_{sm}.jsonl"),
        }
        options = f"-q -m cuda --cuda-sm={sm} --cuda-orders=forward,reverse,random -p no:cacheprovider".split()
        options += ["--tb=short", "--show-capture=stderr"]
        command = [sys.executable, "-m", "pytest", *options, *(pytest_arguments or ["tests"])]
        # 5: no test is meant for this capability
        jobs.append(Job(f"operator tests on sm_{sm}", command, settings, ok_statuses=(0, 5)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for trouble in pool.map(Job.run, jobs) for line in trouble]


# ------------------------------------------------------------------------------------------ what was run


@dataclass
class Runs:
    """Everything that the tests made one kernel do."""

    orders: set[str] = field(default_factory=set)
    shapes: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)  # capability -> grid, block, dynamic shared
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, entry: dict) -> None:
        self.orders.add(entry["order"])
        self.shapes.setdefault(entry["sm"], set()).update(tuple(shape[:7]) for shape in entry["shapes"])
        for key, value in entry.items():
            if isinstance(value, int | float):
                self.totals[key] = self.totals.get(key, 0) + value

    def ratio(self, above: str, below: str, scale: float = 1) -> float | None:
        """None where the denominator is zero."""
        return self.totals[above] / (scale * self.totals[below]) if self.totals.get(below) else None


def read_runs(files: list[Path]) -> dict[str, Runs]:
    """By mangled name."""
    runs: dict[str, Runs] = {}
    for file in files:
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            runs.setdefault(entry["name"], Runs()).add(entry)
    return runs


def read_budgets(files: list[Path]) -> list[dict]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------------ the gate


@dataclass
class Facts:
    """What is judged."""

    code: dict[int, dict[str, Kernel]]  # capability -> mangled name -> machine code, the namespace's kernels only
    runs: dict[str, Runs]
    names: dict[str, str]  # mangled -> demangled
    rules: dict

    def rule(self, table: str, name: str) -> dict | None:
        return next((rule for rule in self.rules.get(table, []) if re.search(rule["kernels"], self.names[name])), None)

    def short(self, name: str) -> str:
        return shorten(self.names[name], NAMESPACE)

    def occupancies(self, capability: int, name: str) -> list[float]:
        """Of every launch of the tests on this capability."""
        kernel = self.code[capability][name]
        shapes = self.runs[name].shapes.get(capability, ()) if name in self.runs else ()
        return [
            occupancy(capability, kernel.registers, kernel.shared + dynamic, x * y * z)
            for _, _, _, x, y, z, dynamic in shapes
        ]


def gather(code: dict[int, dict[str, Kernel]], runs: dict[str, Runs], rules: dict) -> Facts:
    prefix = f"_ZN{len(NAMESPACE)}{NAMESPACE}"
    code = {sm: {n: k for n, k in kernels.items() if n.startswith(prefix)} for sm, kernels in code.items()}
    names = sorted({name for kernels in code.values() for name in kernels})
    return Facts(code, {n: r for n, r in runs.items() if n in names}, demangle(names) if names else {}, rules)


def problems(facts: Facts) -> list[str]:
    found = [f"the module has no machine code for sm_{sm}" for sm in MACHINE_CODE if not facts.code.get(sm)]
    for sm in MACHINE_CODE:
        for name, kernel in sorted(facts.code.get(sm, {}).items()):
            found += [f"sm_{sm}: {facts.short(name)}: {what}" for what in code_problems(facts, sm, kernel)]
            if not facts.runs.get(name, Runs()).shapes.get(sm) and sm in capabilities_of(facts, name):
                found.append(f"sm_{sm}: {facts.short(name)}: no test ran it")
    for rule in facts.rules.get("runs_only_on", []):
        for name in facts.names:
            if not re.search(rule["kernels"], facts.names[name]):
                continue
            for sm in set(rule["capabilities"]) - set(MACHINE_CODE):
                if not facts.runs.get(name, Runs()).shapes.get(sm):
                    found.append(f"sm_{sm}: {facts.short(name)}: no test ran it")
    for name, runs in sorted(facts.runs.items()):
        if count := int(runs.totals.get("violations", 0)):
            found.append(f"{facts.short(name)}: {count} violation(s) of the CUDA model")
    for table, rules in facts.rules.items():
        for rule in rules if isinstance(rules, list) else []:
            if not any(re.search(rule["kernels"], demangled) for demangled in facts.names.values()):
                found.append(f"{RULES.name}: [[{table}]] {rule['kernels']!r} matches no kernel")
    return found


def capabilities_of(facts: Facts, name: str) -> tuple[int, ...]:
    rule = facts.rule("runs_only_on", name)
    return tuple(rule["capabilities"]) if rule else MACHINE_CODE


def code_problems(facts: Facts, sm: int, kernel: Kernel) -> list[str]:
    found = []
    frame = facts.rule("stack_frame", kernel.name)
    allowed = frame["bytes"] if frame else 0
    if kernel.local:
        found.append(f"{kernel.local} bytes of local memory")
    if kernel.stack > allowed:
        found.append(f"a stack frame of {kernel.stack} bytes, {allowed} allowed (spilled registers or a local array)")
    if kernel.spills and not frame:
        found.append(f"{kernel.spills} loads and stores of local memory (spilled registers or a local array)")
    core = facts.rule("tensor_core", kernel.name)
    if core and sm in capabilities_of(facts, kernel.name):
        if not kernel.count(core["instruction"]):
            found.append(f"no {core['instruction']} in its machine code")
        if kernel.name in facts.runs and not facts.runs[kernel.name].totals.get("mma_instructions"):
            found.append("ran without a tensor-core instruction")
    rule = facts.rule("occupancy_floor", kernel.name)
    floor = rule["floor"] if rule else facts.rules["occupancy"]
    lowest = min(facts.occupancies(sm, kernel.name), default=None)
    if lowest is not None and lowest < floor:
        found.append(f"occupancy {lowest:.1%}, at least {floor:.1%} wanted ({kernel.registers} registers)")
    return found


# ------------------------------------------------------------------------------------------ the table

COLUMNS = ["kernel", "sm", "orders", "shapes", "launches", "violations", "load", "store", "bytes", "bank", "mma", "fma"]
COLUMNS += ["regs", "spills", "stack", "shared", "occupancy"]
LEGEND = """\
sm, orders (f forward, r reverse, x random), shapes (different grids, blocks, shared memory), launches: what tests ran.
load, store: bytes asked for over bytes of the sectors touched. bank: shared-memory passes over the fewest possible.
bytes, mma, fma: done over needed, the worst of the budgets that tests declare; (n): the count where none does.
regs, spills, stack, shared, occupancy: on sm_80 / sm_90, occupancy for the launches of the tests."""


def table(facts: Facts, budgets: list[dict]) -> str:
    rows = [COLUMNS, *(row(facts, budgets, name) for name in sorted(facts.names, key=facts.short))]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(COLUMNS))]
    widths[0] = -widths[0]  # to the left
    lines = [
        "  ".join(f"{cell:{'<' if w < 0 else '>'}{abs(w)}}" for cell, w in zip(r, widths, strict=True)) for r in rows
    ]
    return "\n".join([*lines, "", LEGEND])


def row(facts: Facts, budgets: list[dict], name: str) -> list[str]:
    runs = facts.runs.get(name, Runs())
    total = runs.totals
    declared = [budget for budget in budgets if re.search(budget["kernels"], facts.names[name])]

    def over_need(what: str, count: float = 0) -> str:
        ratios = [budget[what] for budget in declared if what in budget]
        return f"{max(ratios):.2f}" if ratios else f"({si(count)})" if count else "-"

    def both(value) -> str:
        values = [str(value(facts.code[sm][name])) if name in facts.code.get(sm, {}) else "-" for sm in MACHINE_CODE]
        return values[0] if len(set(values)) == 1 else "/".join(values)

    def resident(sm: int) -> str:
        lowest = min(facts.occupancies(sm, name), default=None) if name in facts.code.get(sm, {}) else None
        return "-" if lowest is None else f"{lowest:.0%}"

    return [
        facts.short(name),
        ",".join(str(sm) for sm in sorted(runs.shapes)) or "-",
        "".join(
            letter for order, letter in (("forward", "f"), ("reverse", "r"), ("random", "x")) if order in runs.orders
        ),
        str(len(set().union(*runs.shapes.values()))),
        str(int(total.get("launches", 0))),
        str(int(total.get("violations", 0))),
        percent(runs.ratio("global_load_bytes", "global_load_sectors", 32)),
        percent(runs.ratio("global_store_bytes", "global_store_sectors", 32)),
        over_need("bytes"),
        number(runs.ratio("shared_wavefronts", "shared_wavefronts_ideal")),
        over_need("mma", total.get("mma_flops", 0) / 2),
        over_need("fma", total.get("fma_lanes", 0) + total.get("fma64_lanes", 0)),
        both(lambda kernel: kernel.registers),
        both(lambda kernel: kernel.spills),
        both(lambda kernel: kernel.stack),
        both(lambda kernel: kernel.shared),
        "/".join(resident(sm) for sm in MACHINE_CODE),
    ]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def si(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-self-tests", action="store_true", help="leave fakegpu's own tests out")
    parser.add_argument("--output", type=Path, help="where to write the table too")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest (default: tests)")
    arguments = parser.parse_args()
    start = time.monotonic()
    module = find_module()
    with tempfile.TemporaryDirectory(prefix="pyseg-check-cuda-") as name:
        folder = Path(name)
        found = run_everything(folder, not arguments.no_self_tests, arguments.pytest)
        runs = read_runs(sorted(folder.glob("report_*.jsonl")))
        budgets = read_budgets(sorted(folder.glob("budget_*.jsonl")))
    facts = gather(read_machine_code(module), runs, tomllib.loads(RULES.read_text()))
    found += problems(facts)
    text = table(facts, budgets)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(f"\n{text}\n")
    for problem in found:
        print(f"check-cuda: {problem}")
    print(f"check-cuda: {len(facts.names)} kernels, {len(found)} problem(s), {time.monotonic() - start:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
