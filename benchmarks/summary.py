"""Figures derived from the measured ones: ratios, distances to the machine's limit, means over families."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

import machine

HANDED_TO_TORCH = "torch"  # the path of a plan that leaves the work to torch


def complete(record: dict[str, Any], threads: int, rates: dict[str, Any]) -> dict[str, Any]:
    """The record of a case with ratios: times faster than baseline and fastest peer, distance to the limit."""
    timed = {entry["name"]: entry for entry in record["entries"] if entry["status"] == "ok"}
    peers = [entry for entry in timed.values() if not entry["ours"]]
    fastest = min(peers, key=lambda entry: entry["median_ms"], default=None)
    baseline = timed.get(record["baseline"])
    floor = machine.floor_ms(record["flops"], record["bytes"], rates)
    entries = [
        {
            **entry,
            "over_baseline": baseline["median_ms"] / entry["median_ms"] if baseline else None,
            "over_fastest_peer": fastest["median_ms"] / entry["median_ms"] if fastest else None,
            "times_floor": entry["median_ms"] / floor if floor else None,
        }
        if entry["status"] == "ok"
        else entry
        for entry in record["entries"]
    ]
    return {
        **record,
        "threads": threads,
        "floor_ms": floor,
        "fastest_peer": fastest["name"] if fastest else None,
        "entries": entries,
    }


def summarise(cases: list[dict[str, Any]], notes: dict[str, str]) -> list[dict[str, Any]]:
    """One row per group of cases, number of threads and entry of ours."""
    keys = dict.fromkeys(
        (group, case["threads"], entry["name"])
        for case in cases
        for group in case["groups"]
        for entry in case["entries"]
        if entry["ours"]
    )
    # Groups in the order of the cases, and within one the numbers of threads beside each other.
    groups = list(dict.fromkeys(group for group, _, _ in keys))
    ordered = sorted(keys, key=lambda key: (groups.index(key[0]), key[1]))
    return [_row(cases, group, threads, name, notes.get(group, "")) for group, threads, name in ordered]


def refused(results: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(case, entry) of every refused comparison."""
    return [(case, entry) for case in results["cases"] for entry in case["entries"] if entry["status"] == "refused"]


def refused_ours(results: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(case, entry) for case, entry in refused(results) if entry["ours"]]


def geometric_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and value > 0]
    return math.exp(statistics.fmean(map(math.log, known))) if known else None


def _row(cases: list[dict[str, Any]], group: str, threads: int, name: str, note: str) -> dict[str, Any]:
    members = [
        (case, entry)
        for case in cases
        if case["threads"] == threads and group in case["groups"]
        for entry in case["entries"]
        if entry["name"] == name
    ]
    timed = [(case, entry) for case, entry in members if entry["status"] == "ok"]
    own = [entry for _, entry in timed if entry["path"] != HANDED_TO_TORCH]
    compared = [(case, entry) for case, entry in timed if entry["over_fastest_peer"] is not None]
    worst_case, worst = min(compared, key=lambda pair: pair[1]["over_fastest_peer"], default=(None, None))
    return {
        "group": group,
        "threads": threads,
        "entry": name,
        "cases": len(members),
        "refused": len(members) - len(timed),
        "over_baseline": geometric_mean(entry["over_baseline"] for _, entry in timed),
        "over_fastest_peer": geometric_mean(entry["over_fastest_peer"] for _, entry in timed),
        "worst_over_fastest_peer": worst["over_fastest_peer"] if worst else None,
        "worst_case": worst_case["name"] if worst_case else None,
        "times_floor": geometric_mean(entry["times_floor"] for _, entry in timed),
        "handed_to_torch": 1 - len(own) / len(timed) if timed else None,
        "own_over_baseline": geometric_mean(entry["over_baseline"] for entry in own),
        "own_over_fastest_peer": geometric_mean(entry["over_fastest_peer"] for entry in own),
        "worst_peak_over_baseline": max(
            (ratio for case, entry in timed if (ratio := _peak_over_baseline(case, entry)) is not None), default=None
        ),
        "scaling": geometric_mean(_scaling(cases, case, entry) for case, entry in timed) if threads > 1 else None,
        "note": note,
    }


def _peak_over_baseline(case: dict[str, Any], entry: dict[str, Any]) -> float | None:
    for other in case["entries"]:
        if other["name"] == case["baseline"] and other.get("peak_bytes") and entry["peak_bytes"] is not None:
            return entry["peak_bytes"] / other["peak_bytes"]
    return None


def _scaling(cases: list[dict[str, Any]], case: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """How many times faster than the same entry with one thread."""
    for other in cases:
        if other["name"] == case["name"] and other["threads"] == 1:
            for alone in other["entries"]:
                if alone["name"] == entry["name"] and alone["status"] == "ok":
                    return alone["median_ms"] / entry["median_ms"]
    return None
