"""Measures pyseg beside its peers: python benchmarks/run.py [--full | --filter REGEX] [--threads 1,2].

The cases lie in benchmarks/cases. Each number of threads has a process of its own, pinned to as many cores, in which
the contenders of a case take turns. Writes JSON, a Markdown table and a plot; benchmarks/results/README.md says what
the figures mean and how they were made. Exits with 1 where a result of pyseg was refused.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import cases
import harness
import machine
import report
import summary

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
# By default glibc maps every block above 32 MiB afresh and the kernel clears it page by page, which takes longer than
# many of the kernels measured. So: never map, never give back. No caches of small blocks either: they keep the scraps
# beside large aligned blocks, which then never rejoin. One arena: the main one, no other can hold blocks that large.
MALLOC_TUNING = {"mmap_max": 0, "trim_threshold": 1 << 40, "tcache_count": 0, "mxfast": 0, "arena_max": 1}
PROGRESS, STARTED, RATES, CRASHED = "record", "started", "rates", "process died"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        work(options.worker)
        return 0
    plan = select(cases.all_cases(), options)
    if options.list:
        print(
            "\n".join(f"{case.name}, {count_threads(threads)}" for threads, chosen in plan.items() for case in chosen)
        )
        return 0
    if not any(plan.values()):
        print("no case matches", file=sys.stderr)
        return 2
    budget = harness.Budget(seconds=options.seconds)
    out = options.out or RESULTS / f"{'full' if options.full else 'filtered' if options.filter else 'quick'}.json"
    results = run(plan, budget, options.malloc_tuning, command_line(arguments))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    written = report.write(results, out)
    print(f"\n{report.summary_table(results)}\n{report.refused_list(results)}")
    print(f"{results['seconds']:.0f} s; wrote {', '.join(path.name for path in (out, *written))}")
    return 1 if summary.refused_ours(results) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--full", action="store_true", help="all cases; takes hours")
    chosen.add_argument("--filter", metavar="REGEX", help="of all cases those whose name this regular expression finds")
    parser.add_argument("--threads", type=thread_counts, metavar="N,N", help="numbers of threads (default: 1 and 2)")
    parser.add_argument("--seconds", type=float, default=harness.Budget.seconds, help="of timing a case (%(default)s)")
    parser.add_argument("--no-malloc-tuning", dest="malloc_tuning", action="store_false", help="leave glibc as it is")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write (default: benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="name the chosen cases and stop")
    parser.add_argument("--worker", type=int, metavar="FD", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def thread_counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("numbers of threads start at 1")
    return counts


def count_threads(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def command_line(arguments: list[str] | None) -> str:
    """As one would type it in the project's folder; where the result was written to is left out."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    kept = [
        text
        for before, text in zip(["", *arguments], arguments, strict=False)
        if before != "--out" and not text.startswith("--out")
    ]
    return shlex.join(["python", "benchmarks/run.py", *kept])


def select(every: list[harness.Case], options: argparse.Namespace) -> dict[int, list[harness.Case]]:
    """The cases to run, by number of threads."""
    cores = len(os.sched_getaffinity(0))
    wanted = options.threads or [1, 2]
    if max(wanted) > cores:
        print(f"this machine offers {cores} core(s): {count_threads(max(wanted))} left out", file=sys.stderr)
    plan: dict[int, list[harness.Case]] = {}
    for threads in wanted:
        if threads > cores:
            continue
        if options.full:
            plan[threads] = every
        elif options.filter:
            plan[threads] = [case for case in every if re.search(options.filter, case.name)]
        else:
            plan[threads] = [case for case in every if threads in case.quick]
    return plan


# ---- the process that starts the others ----


def run(
    plan: dict[int, list[harness.Case]], budget: harness.Budget, malloc_tuning: bool, command: str
) -> dict[str, Any]:
    start = time.time()
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "date": machine.now(),
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
        "capability": "",
        "settings": {**asdict(budget), "malloc_tuning": MALLOC_TUNING if malloc_tuning else None},
        "rates": {},
        "cases": [],
    }
    if results["machine"]["load"] > 0.5:
        print(f"something else is running here (load {results['machine']['load']}): figures will be noisy")
    total, done = sum(map(len, plan.values())), 0
    for threads, chosen in plan.items():
        remaining, records, rates = list(chosen), [], None
        while remaining:
            for kind, value in messages(threads, remaining, budget, malloc_tuning):
                if kind == RATES:
                    rates = machine.better_of(rates, value["rates"]) if rates else value["rates"]
                    results["capability"] = value["capability"]
                elif kind == STARTED:
                    done += 1
                    print(f"\n[{done}/{total}] {value}, {count_threads(threads)}", flush=True)
                elif kind == PROGRESS:
                    records.append(value)
                    remaining.pop(0)
                    print(report.case_lines(summary.complete(value, threads, rates)), flush=True)
                else:
                    if rates is None or not remaining:
                        raise RuntimeError(f"the benchmark process failed outside the cases: {value}")
                    records.append(crashed(remaining.pop(0), value))
                    print(f"  refused: {value}", flush=True)
        if rates is not None:
            results["rates"][str(threads)] = rates
            # Again: the rates measured after the cases may be better.
            results["cases"] += [summary.complete(record, threads, rates) for record in records]
    results["summary"] = summary.summarise(results["cases"], cases.family_notes())
    results["seconds"] = round(time.time() - start)
    return results


def crashed(case: harness.Case, reason: str) -> dict[str, Any]:
    """The record of a case that took its process with it: which contender did it is unknown, so all are refused."""
    workload = case.build()
    return harness.record(case, [harness.refused(contender, reason) for contender in workload.contenders])


def messages(threads: int, chosen: list[harness.Case], budget: harness.Budget, malloc_tuning: bool):
    """(kind, value) as one process reports them; if it dies, the last is CRASHED with the reason."""
    reading, writing = os.pipe()
    environment = worker_environment(threads, malloc_tuning)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(writing)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[writing], text=True)
    os.close(writing)
    assert process.stdin is not None
    job = {"threads": threads, "cases": [case.name for case in chosen], "budget": asdict(budget)}
    with process.stdin as pipe:
        pipe.write(json.dumps(job))
    with os.fdopen(reading) as lines:
        for line in lines:
            yield json.loads(line)
    status = process.wait()
    if status:
        yield CRASHED, f"{CRASHED}, " + (f"signal {-status}" if status < 0 else f"exit status {status}")


def worker_environment(threads: int, malloc_tuning: bool) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if malloc_tuning:
        tunables = [f"glibc.malloc.{name}={value}" for name, value in MALLOC_TUNING.items()]
        environment["GLIBC_TUNABLES"] = ":".join([*filter(None, [os.environ.get("GLIBC_TUNABLES")]), *tunables])
    return environment


# ---- the process that measures ----


def work(descriptor: int) -> None:
    job = json.load(sys.stdin)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    torch.set_num_threads(job["threads"])
    by_name = {case.name: case for case in cases.all_cases()}
    budget = harness.Budget(**job["budget"])

    with os.fdopen(descriptor, "w") as pipe:

        def tell(kind: str, value: Any) -> None:
            print(json.dumps([kind, value]), file=pipe, flush=True)

        def tell_rates() -> None:
            tell(RATES, {"rates": machine.measure_rates(), "capability": machine.capability()})

        tell_rates()
        for name in job["cases"]:
            tell(STARTED, name)
            tell(PROGRESS, harness.measure(by_name[name], budget))
        tell_rates()


if __name__ == "__main__":
    sys.exit(main())
