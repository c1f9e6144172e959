"""The benchmark driver with toy cases: what it measures, refuses, derives, writes and shows."""

import importlib
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def modules():
    """benchmarks/ as its own programs see it, and what was imported from there forgotten afterwards."""
    before, folders = set(sys.modules), [str(ROOT / "benchmarks"), str(ROOT / "tools")]
    sys.path[:0] = folders
    names = ("cases", "harness", "machine", "report", "run", "summary", "readme_tables")
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path[:] = [folder for folder in sys.path if folder not in folders]
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(tuple(folders)):
            del sys.modules[name]


RATES = {"sgemm_gflops": 100.0, "stream_gbs": {"1": 50.0, "64": 10.0}}


class Clock:
    """time.perf_counter_ns, moved on by the calls themselves."""

    def __init__(self, monkeypatch, harness):
        self.now = 0
        self.order: list[str] = []
        monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now / 1e9)

    def call(self, name, milliseconds, result):
        durations = iter(milliseconds) if isinstance(milliseconds, list) else None

        def call():
            self.order.append(name)
            self.now += int(1e6 * (next(durations) if durations else milliseconds))
            return result

        return call


def toy(modules, contenders, **changes):
    """A case whose exact result is [1, 2]; contenders: (name, ours, call or exception)."""
    harness = modules.harness

    def contender(name, ours, call):
        def make():
            if isinstance(call, Exception):
                raise call
            return harness.Prepared(call, cached_bytes=8, path="direct" if ours else "")

        return harness.Contender(name, make, ours)

    values = {
        "name": "toy/sum",
        "groups": ("toy", "toy, small"),
        "build": lambda: harness.Workload(
            [contender(*each) for each in contenders], lambda: [torch.tensor([1.0, 2.0], dtype=torch.float64)]
        ),
        "params": {"size": 2},
        "baseline": "slow",
        "tolerance": 1e-5,
        "least": lambda: (10**8, 10**6),
        **changes,
    }
    return harness.Case(**values)


RIGHT = torch.tensor([1.0, 2.0])


def entries_of(record):
    return {entry["name"]: entry for entry in record["entries"]}


def test_contenders_take_turns_in_rotating_order(modules, monkeypatch):
    clock = Clock(monkeypatch, modules.harness)
    names = ["slow", "fast", "ours"]
    case = toy(modules, [(name, name == "ours", clock.call(name, 200.0, RIGHT)) for name in names])
    monkeypatch.setattr(modules.harness, "extra_peak", lambda call, estimate: 0)
    modules.harness.measure(case, modules.harness.Budget(seconds=0, min_rounds=4))
    warm_up, rounds = clock.order[:6], clock.order[6:]
    assert warm_up == ["slow", "slow", "fast", "fast", "ours", "ours"]
    assert [rounds[i : i + 3] for i in range(0, len(rounds), 3)] == [
        ["slow", "fast", "ours"],
        ["fast", "ours", "slow"],
        ["ours", "slow", "fast"],
        ["slow", "fast", "ours"],
    ]


def test_median_and_quartiles_ignore_an_outlier(modules, monkeypatch):
    clock = Clock(monkeypatch, modules.harness)
    monkeypatch.setattr(modules.harness, "extra_peak", lambda call, estimate: 0)
    call = clock.call("slow", [500.0, 500.0, 130.0, 110.0, 9000.0, 120.0, 140.0], RIGHT)
    record = modules.harness.measure(
        toy(modules, [("slow", False, call)]), modules.harness.Budget(seconds=0, min_rounds=5)
    )
    entry = entries_of(record)["slow"]
    assert entry["samples"] == 5
    assert entry["median_ms"] == 130.0
    assert (entry["quartile1_ms"], entry["quartile3_ms"]) == (120.0, 140.0)
    assert entry["min_ms"] == 110.0


def test_repetitions_follow_the_length_of_the_call(modules, monkeypatch):
    clock = Clock(monkeypatch, modules.harness)
    monkeypatch.setattr(modules.harness, "extra_peak", lambda call, estimate: 0)
    lengths = {"tiny": 0.01, "short": 2.0, "long": 300.0, "endless": 20_000.0}
    case = toy(modules, [(name, False, clock.call(name, length, RIGHT)) for name, length in lengths.items()])
    record = modules.harness.measure(case, modules.harness.Budget(seconds=0, min_rounds=2))
    counts = {name: clock.order.count(name) for name in lengths}
    samples = {name: entry["samples"] for name, entry in entries_of(record).items()}
    # Two warm-up calls; in each round one untimed call of those below 100 ms, and 20 ms, or 50 samples.
    assert samples == {"tiny": 2 * 50, "short": 2 * 10, "long": 2, "endless": 1}
    assert counts == {"tiny": 2 + 2 * (1 + 50 * 5), "short": 2 + 2 * 11, "long": 2 + 2, "endless": 1}
    assert {name: entry["median_ms"] for name, entry in entries_of(record).items()} == pytest.approx(lengths)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (torch.tensor([1.0, 2.001]), "difference 5.0e-04 exceeds 1.0e-05"),
        (torch.tensor([1.0, float("nan")]), "difference nan exceeds 1.0e-05"),
        (torch.tensor([[1.0, 2.0]]), "ValueError: result of shape [1, 2] instead of [2]"),
        ([RIGHT, RIGHT], "ValueError: 2 results instead of 1"),
    ],
)
def test_a_wrong_result_is_refused_and_not_timed(modules, result, reason):
    case = toy(modules, [("slow", False, lambda: RIGHT), ("wrong", False, lambda: result)])
    entry = entries_of(modules.harness.measure(case, modules.harness.Budget(seconds=0)))["wrong"]
    assert (entry["status"], entry["reason"]) == ("refused", reason)
    assert "median_ms" not in entry


def test_what_raises_is_refused_without_this_machines_paths(modules):
    error = OSError("cannot open /home/someone/lib/libx.so.1: no such file\nmore")
    case = toy(modules, [("slow", False, lambda: RIGHT), ("broken", False, error)])
    entry = entries_of(modules.harness.measure(case, modules.harness.Budget(seconds=0)))["broken"]
    assert entry["reason"] == "OSError: cannot open libx.so.1: no such file"


def test_difference_of_several_results_is_the_worst(modules):
    expected = [torch.tensor([0.0, -4.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    close, far = torch.tensor([0.0, -4.0]), torch.tensor([1.25])
    assert modules.harness.difference([close, far], expected) == 0.25
    assert modules.harness.difference([torch.tensor([2.0, -4.0]), torch.tensor([1.0])], expected) == 0.5
    empty = torch.empty(0)
    assert modules.harness.difference([empty], [empty.double()]) == 0.0


def test_peak_counts_what_a_call_allocates_and_frees(modules):
    def call():
        torch.ones(16 << 20)  # 64 MiB, freed before the result is made
        return torch.ones(4 << 20)

    peak = modules.harness.extra_peak(call, 1)
    if peak is None:
        pytest.skip("this kernel has no /proc/self/clear_refs")
    assert 60 << 20 < peak < 90 << 20


def fake_record(baseline_ms, peer_ms, ours_ms, name="toy/a", path="direct"):
    def entry(kind, ours, milliseconds):
        if milliseconds is None:
            return {"name": kind, "ours": ours, "status": "refused", "reason": "difference 1.0e+00 exceeds 1.0e-05"}
        return {
            "name": kind, "ours": ours, "status": "ok", "reason": "", "difference": 1e-7, "median_ms": milliseconds,
            "quartile1_ms": milliseconds, "quartile3_ms": milliseconds, "min_ms": milliseconds, "samples": 3,
            "cached_bytes": 0, "path": path if ours else "", "peak_bytes": 3 if ours else 2,
        }  # fmt: skip

    entries = [entry("slow", False, baseline_ms), entry("peer", False, peer_ms), entry("ours", True, ours_ms)]
    return {
        "name": name, "groups": ["toy"], "params": {}, "baseline": "slow", "tolerance": 1e-5, "flops": 10**8,
        "bytes": 10**6, "note": "", "entries": entries,
    }  # fmt: skip


def test_ratios_and_floor(modules):
    case = modules.summary.complete(fake_record(8.0, 4.0, 2.0), 1, RATES)
    ours = entries_of(case)["ours"]
    assert case["fastest_peer"] == "peer"
    assert (ours["over_baseline"], ours["over_fastest_peer"]) == (4.0, 2.0)
    assert case["floor_ms"] == pytest.approx(1.0)  # 1e8 operations at 100 GFLOP/s, longer than 1e6 bytes take
    assert ours["times_floor"] == pytest.approx(2.0)


@pytest.mark.parametrize(("footprint", "milliseconds"), [(10**6, 0.02), (2 * 10**6, 0.2), (10**9, 100.0)])
def test_floor_takes_the_stream_rate_of_the_footprint(modules, footprint, milliseconds):
    assert modules.machine.floor_ms(0, footprint, RATES) == pytest.approx(milliseconds)


def test_summary(modules):
    complete = modules.summary.complete
    cases = [
        complete(fake_record(8.0, 4.0, 2.0, "toy/a"), 1, RATES),
        complete(fake_record(8.0, 4.0, 8.0, "toy/b", path="torch"), 1, RATES),
        complete(fake_record(4.0, 2.0, None, "toy/c"), 1, RATES),
        complete(fake_record(4.0, 2.0, 1.25, "toy/a"), 2, RATES),
    ]
    one, two = modules.summary.summarise(cases, {"toy": "because"})
    assert (one["threads"], one["cases"], one["refused"], one["note"]) == (1, 3, 1, "because")
    assert one["over_baseline"] == pytest.approx(2.0)  # of 4 and 1
    assert one["over_fastest_peer"] == pytest.approx(1.0)  # of 2 and 0.5
    assert (one["worst_case"], one["worst_over_fastest_peer"]) == ("toy/b", 0.5)
    assert one["handed_to_torch"] == 0.5
    assert (one["own_over_baseline"], one["own_over_fastest_peer"]) == (4.0, 2.0)
    assert one["worst_peak_over_baseline"] == 1.5
    assert one["scaling"] is None
    assert two["scaling"] == pytest.approx(1.6)


def test_a_refused_baseline_leaves_no_ratio(modules):
    case = modules.summary.complete(fake_record(None, 4.0, 2.0), 1, RATES)
    assert entries_of(case)["ours"]["over_baseline"] is None
    (row,) = modules.summary.summarise([case], {})
    assert row["over_baseline"] is None and row["over_fastest_peer"] == 2.0


@pytest.fixture
def toy_family(modules, monkeypatch, tmp_path):
    """A family of toy cases that also the measuring process finds: its folder stands in for benchmarks/cases."""
    family = tmp_path / "cases"
    family.mkdir()
    (family / "__init__.py").write_text((ROOT / "benchmarks" / "cases" / "__init__.py").read_text())
    (family / "toy.py").write_text(TOY_FAMILY)
    for file in (ROOT / "benchmarks").glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    # Runs the copy, so that its folder comes first on the measuring process's path.
    monkeypatch.setattr(modules.run, "__file__", str(tmp_path / "run.py"))
    return tmp_path


TOY_FAMILY = """
import os
import torch
from harness import Case, Contender, Prepared, Workload


def cases():
    return [case("toy/fine"), case("toy/crash", crash=True), case("toy/wrong", wrong=True)]


def case(name, crash=False, wrong=False):
    x = torch.ones(4)

    def contenders():
        yield Contender("slow", lambda: Prepared(lambda: x + 1))
        yield Contender("other", lambda: Prepared(os.abort if crash else lambda: x + 2 if wrong else x + 1))
        yield Contender("ours", lambda: Prepared(lambda: 1 + x), ours=True)

    build = lambda: Workload(list(contenders()), lambda: [x.double() + 1])
    return Case(name, ("toy",), build, {}, "slow", 1e-6, lambda: (4, 32), quick=(1,))
"""


@pytest.fixture(scope="module")
def toy_cases(modules):
    namespace: dict = {}
    exec(TOY_FAMILY, namespace)
    return namespace["cases"]()


def test_driver_end_to_end(modules, toy_family, toy_cases, monkeypatch, capfd, tmp_path):
    """A wrong peer and a dead process are printed, and the JSON has what the tables need."""
    monkeypatch.setattr(modules.run.cases, "all_cases", lambda: toy_cases)
    monkeypatch.setattr(modules.run.cases, "family_notes", dict)
    out = tmp_path / "toy.json"
    status = modules.run.main(["--seconds", "0", "--threads", "1", "--out", str(out)])
    shown = capfd.readouterr().out
    assert status == 1  # the crash took our entry with it
    assert "refused: difference 5.0e-01 exceeds 1.0e-06" in shown
    assert "toy/crash, 1 thread, ours: process died, signal 6" in shown

    text = out.read_text()
    results = json.loads(text)
    assert str(tmp_path) not in text and str(ROOT) not in text
    assert results["schema"] == modules.run.SCHEMA
    assert results["command"] == "python benchmarks/run.py --seconds 0 --threads 1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", results["date"])
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert results["settings"]["malloc_tuning"] == modules.run.MALLOC_TUNING
    assert results["rates"]["1"]["sgemm_gflops"] > 0
    assert [case["name"] for case in results["cases"]] == ["toy/fine", "toy/crash", "toy/wrong"]
    assert {entry["status"] for entry in results["cases"][0]["entries"]} == {"ok"}
    assert {entry["status"] for entry in results["cases"][1]["entries"]} == {"refused"}
    assert entries_of(results["cases"][2])["ours"]["status"] == "ok"
    assert [row["group"] for row in results["summary"]] == ["toy"]

    page = out.with_suffix(".md").read_text()
    assert "- toy/wrong, 1 thread, other: difference 5.0e-01 exceeds 1.0e-06" in page


def test_selection(modules):
    every = modules.cases.all_cases()
    names = [case.name for case in every]
    assert len(set(names)) == len(names)
    assert all(case.baseline and case.groups for case in every)

    def select(*arguments):
        return modules.run.select(every, modules.run.parse([*arguments, "--threads", "1"]))[1]

    assert select("--full") == every
    assert 0 < len(select()) < 100
    assert {case.name for case in select("--filter", "^models/")} == {
        name for name in names if name.startswith("models")
    }


def test_least_of_atrous_conv2d_counts_the_taps_inside(modules):
    """Against the sum over all taps and pixels, from the definition."""
    shape_type = importlib.import_module("cases.atrous_conv2d").Shape
    for size, rate, depthwise in [(7, 2, False), (5, 5, False), (5, 9, False), (6, 1, True)]:
        shape = shape_type(4, 4, size, rate, batch=2, depthwise=depthwise)
        inside = sum(
            0 <= y + rate * u < size and 0 <= x + rate * v < size
            for y in range(size) for x in range(size) for u in (-1, 0, 1) for v in (-1, 0, 1)
        )  # fmt: skip
        assert shape.flops == 2 * 2 * 4 * (1 if depthwise else 4) * inside


@pytest.fixture
def page(modules, tmp_path, monkeypatch):
    results = {
        "cases": [modules.summary.complete(fake_record(8.0, 4.0, 2.0), 1, RATES)],
        "summary": modules.summary.summarise([modules.summary.complete(fake_record(8.0, 4.0, 2.0), 1, RATES)], {}),
    }
    (tmp_path / "r.json").write_text(json.dumps(results))
    monkeypatch.setattr(modules.readme_tables, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- benchmark: cases r.json toy -->\nold\n<!-- benchmark end -->\nafter\n")
    return page


def test_readme_tables(modules, page, capsys):
    main = modules.readme_tables.main
    assert main(["--check", str(page)]) == 1
    assert "-old" in capsys.readouterr().out
    assert main([str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmark: cases r.json toy -->\n| case |") and text.endswith("-->\nafter\n")
    assert "| toy/a | 1 | 8 | 4 (peer) | 2 (ours) | 4.00x | 2.00x |" in text
    assert main(["--check", str(page)]) == 0


@pytest.mark.parametrize(
    "text",
    ["<!-- benchmark: cases r.json -->\nno end\n", "<!-- benchmark: nonsense r.json -->\n<!-- benchmark end -->\n"],
)
def test_readme_tables_refuse_broken_markers(modules, page, text):
    page.write_text(text)
    assert modules.readme_tables.main([str(page)]) == 2
    assert page.read_text() == text
