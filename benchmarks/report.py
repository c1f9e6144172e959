"""Tables and a plot from the JSON that run.py wrote: python benchmarks/report.py benchmarks/results/quick.json."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import summary

NONE = "–"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args().results:
        written = write(json.loads(path.read_text()), path)
        print("wrote " + ", ".join(str(path) for path in written))
    return 0


def write(results: dict[str, Any], path: Path) -> list[Path]:
    """The Markdown page and the plot beside `path`; where matplotlib is missing, the page alone."""
    page, picture = path.with_suffix(".md"), path.with_suffix(".png")
    drawn = plot(results, picture)
    page.write_text(markdown(results, picture.name if drawn else None))
    return [page, picture] if drawn else [page]


# ---- text ----


def markdown(results: dict[str, Any], picture: str | None = None) -> str:
    parts = [
        "# Benchmark results",
        provenance(results),
        "Higher ratios are better: how many times faster than the baseline (torch as models run today: eager, NCHW) "
        "and than the fastest peer of each case. [README.md](README.md) explains every column.",
        summary_table(results),
        notes_list(results),
        f"![Speed-ups by family]({picture})" if picture else "",
        "## Refused comparisons",
        refused_list(results),
        "## Cases",
        cases_table(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(results: dict[str, Any]) -> str:
    box, versions = results["machine"], results["versions"]
    rates = "; ".join(
        f"{_threads(int(threads))}: sgemm {rate['sgemm_gflops']:.0f} GFLOP/s, streams "
        f"{max(rate['stream_gbs'].values()):.0f} to {min(rate['stream_gbs'].values()):.0f} GB/s by footprint"
        for threads, rate in results["rates"].items()
    )
    return (
        f"`{results['command']}`, {results['date']}, {box['cores']} cores of {box['cpu']} "
        f"({results['capability']} kernels), {', '.join(f'{name} {version}' for name, version in versions.items())}. "
        f"Measured in the same run, {rates}."
    )


def summary_table(results: dict[str, Any], pattern: str = "") -> str:
    """One row per family, number of threads and entry of ours, of the families that `pattern` finds."""
    rows = [row for row in results["summary"] if re.search(pattern, row["group"])]
    return _table(
        [
            "family", "threads", "entry", "cases", "over baseline", "over fastest peer", "worst case", "times floor",
            "left to torch", "ours alone, over fastest peer", "peak memory over baseline's, at most",
            "scaling from 1 thread",
        ],
        [
            [
                row["group"],
                str(row["threads"]),
                row["entry"],
                str(row["cases"]) + (f" ({row['refused']} refused)" if row["refused"] else ""),
                _ratio(row["over_baseline"]),
                _ratio(row["over_fastest_peer"]),
                _ratio(row["worst_over_fastest_peer"]),
                _ratio(row["times_floor"]),
                _percent(row["handed_to_torch"]),
                _ratio(row["own_over_fastest_peer"]),
                _ratio(row["worst_peak_over_baseline"]),
                _ratio(row["scaling"]),
            ]
            for row in rows
        ],
    )  # fmt: skip


def cases_table(results: dict[str, Any], pattern: str = "") -> str:
    """One row per timed contender, of the cases whose name `pattern` finds."""
    rows = []
    for case in results["cases"]:
        if not re.search(pattern, case["name"]):
            continue
        for entry in case["entries"]:
            if entry["status"] != "ok":
                continue
            rows.append(
                [
                    case["name"].removeprefix("atrous_conv2d/"),
                    str(case["threads"]),
                    f"**{entry['name']}**" if entry["ours"] else entry["name"],
                    _milliseconds(entry["median_ms"]),
                    f"{_milliseconds(entry['quartile1_ms'])} to {_milliseconds(entry['quartile3_ms'])}",
                    _ratio(entry["over_baseline"]),
                    _ratio(entry["over_fastest_peer"]),
                    _ratio(entry["times_floor"]),
                    _mebibytes(entry["peak_bytes"]),
                    _mebibytes(entry["cached_bytes"]),
                    f"{entry['difference']:.0e}",
                    entry["path"] or "",
                ]
            )
    header = [
        "case", "threads", "entry", "median, ms", "middle half, ms", "over baseline", "over fastest peer",
        "times floor", "peak, MiB", "cached, MiB", "difference", "path",
    ]  # fmt: skip
    return _table(header, rows)


def readme_summary(results: dict[str, Any], pattern: str = "") -> str:
    """The summary's main columns, of the families that `pattern` finds."""
    return _table(
        ["family", "threads", "entry", "over baseline", "over fastest peer", "worst case", "scaling from 1 thread"],
        [
            [
                row["group"],
                str(row["threads"]),
                row["entry"],
                _ratio(row["over_baseline"]),
                _ratio(row["over_fastest_peer"]),
                _ratio(row["worst_over_fastest_peer"]),
                _ratio(row["scaling"]),
            ]
            for row in results["summary"]
            if re.search(pattern, row["group"])
        ],
    )


def readme_cases(results: dict[str, Any], pattern: str = "") -> str:
    """One row per case that `pattern` finds: baseline, the fastest peer and the fastest entry of ours."""
    rows = []
    for case in results["cases"]:
        if not re.search(pattern, case["name"]):
            continue
        timed = {entry["name"]: entry for entry in case["entries"] if entry["status"] == "ok"}
        ours = min((e for e in timed.values() if e["ours"]), key=lambda entry: entry["median_ms"], default=None)
        baseline, peer = timed.get(case["baseline"]), timed.get(case["fastest_peer"])
        rows.append(
            [
                case["name"],
                str(case["threads"]),
                _milliseconds(baseline["median_ms"]) if baseline else NONE,
                f"{_milliseconds(peer['median_ms'])} ({peer['name']})" if peer else NONE,
                f"{_milliseconds(ours['median_ms'])} ({ours['name']})" if ours else "refused",
                _ratio(ours["over_baseline"]) if ours else NONE,
                _ratio(ours["over_fastest_peer"]) if ours else NONE,
            ]
        )
    header = [
        "case", "threads", "baseline, ms", "fastest peer, ms", "pyseg, ms", "over baseline", "over fastest peer"
    ]  # fmt: skip
    return _table(header, rows)


def notes_list(results: dict[str, Any]) -> str:
    notes = dict.fromkeys(
        [(row["group"], row["note"]) for row in results["summary"] if row["note"]]
        + [(case["name"], case["note"]) for case in results["cases"] if case["note"]]
    )
    return "\n".join(f"- {subject}: {note}" for subject, note in notes)


def refused_list(results: dict[str, Any]) -> str:
    lines = [
        f"- {case['name']}, {_threads(case['threads'])}, {entry['name']}: {entry['reason']}"
        for case, entry in summary.refused(results)
    ]
    return "\n".join(lines) or "None: all contenders ran, and all results agree."


def case_lines(case: dict[str, Any]) -> str:
    """A case as it is shown while the benchmark runs."""
    lines = []
    width = max(len(entry["name"]) for entry in case["entries"])
    for entry in case["entries"]:
        if entry["status"] == "refused":
            lines.append(f"  {entry['name']:{width}}  refused: {entry['reason']}")
            continue
        spread = entry["quartile3_ms"] - entry["quartile1_ms"]
        lines.append(
            f"  {entry['name']:{width}} {entry['median_ms']:10.3f} ms, spread {spread:8.3f}, "
            f"{_ratio(entry['over_baseline'])} over baseline, {_ratio(entry['over_fastest_peer'])} over fastest peer, "
            f"{_ratio(entry['times_floor'])} of floor, peak {_mebibytes(entry['peak_bytes'])} MiB, "
            f"difference {entry['difference']:.0e}" + (f", {entry['path']}" if entry["path"] else "")
        )
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _ratio(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}x"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}"


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mebibytes(value: int | None) -> str:
    return NONE if value is None else f"{value / 2**20:.1f}"


# ---- plot ----


def plot(results: dict[str, Any], path: Path) -> bool:
    """Speed-ups of every case, a line per row of the summary, with the geometric means. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in results["summary"] if row["over_fastest_peer"] is not None]
    figure = Figure(figsize=(11, 1.8 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for line, row in enumerate(rows):
        members = [
            (case, entry)
            for case in results["cases"]
            for entry in case["entries"]
            if row["group"] in case["groups"] and row["threads"] == case["threads"]
            if row["entry"] == entry["name"] and entry["status"] == "ok"
        ]
        for key, colour, offset, label in (
            ("over_baseline", "tab:blue", -0.15, "over torch eager NCHW"),
            ("over_fastest_peer", "tab:orange", 0.15, "over the fastest peer"),
        ):
            ratios = [entry[key] for _, entry in members if entry[key] is not None]
            axes.scatter(ratios, [line + offset] * len(ratios), s=14, alpha=0.35, color=colour, linewidths=0)
            if row[key] is not None:
                axes.scatter(
                    [row[key]], [line + offset], s=60, marker="|", linewidths=3, color=colour,
                    label=label if line == 0 else None,
                )  # fmt: skip
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(rows)), [f"{row['group']}, {_threads(row['threads'])}: {row['entry']}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("times faster (dots: cases; bars: geometric means)")
    axes.set_title(f"pyseg beside its peers, {results['machine']['cpu']}, torch {results['versions'].get('torch', '')}")
    if rows:
        figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    return True


if __name__ == "__main__":
    sys.exit(main())
