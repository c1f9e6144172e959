"""Writes the benchmark tables into Markdown pages, between marker comments, from the results' JSON.

    <!-- benchmark: summary benchmarks/results/quick.json dense, forward -->
    | family | ...
    <!-- benchmark end -->

The first word is a kind of table (summary, cases, provenance), the second the results, the rest an optional
regular expression that selects rows. `python tools/readme_tables.py` rewrites README.md; `--check` only says whether it
is current, and fails where it is not.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402

BLOCK = re.compile(
    r"(?P<begin><!-- benchmark: (?P<kind>\S+) (?P<results>\S+)(?: (?P<pattern>[^\n]*?))? -->\n)"
    r"(?P<table>.*?)"
    r"(?P<end><!-- benchmark end -->)",
    re.DOTALL,
)
TABLES: dict[str, Callable[[dict[str, Any], str], str]] = {
    "summary": report.readme_summary,
    "cases": report.readme_cases,
    "provenance": lambda results, _: report.provenance(results),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is not current")
    parser.add_argument("pages", type=Path, nargs="*", default=[ROOT / "README.md"])
    options = parser.parse_args(arguments)
    current = True
    for page in options.pages:
        before = page.read_text()
        try:
            after = rewrite(before)
        except (ValueError, OSError) as error:
            print(f"{page.name}: {error}", file=sys.stderr)
            return 2
        if after == before:
            continue
        current = False
        if options.check:
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), page.name, "as measured", lineterm="")
            print("\n".join(lines))
        else:
            page.write_text(after)
            print(f"rewrote the tables of {page.name}")
    return 1 if options.check and not current else 0


def rewrite(text: str) -> str:
    """`text` with every table made anew."""

    def table(block: re.Match[str]) -> str:
        kind, pattern = block["kind"], block["pattern"] or ""
        if kind not in TABLES:
            raise ValueError(f"unknown table {kind}, expected one of {', '.join(TABLES)}")
        results = json.loads((ROOT / block["results"]).read_text())
        return block["begin"] + TABLES[kind](results, pattern) + "\n" + block["end"]

    if text.count("<!-- benchmark: ") != len(BLOCK.findall(text)):
        raise ValueError("a benchmark marker has no end, or is not followed by a line of its own")
    return BLOCK.sub(table, text)


if __name__ == "__main__":
    sys.exit(main())
