"""What accelerate() did, as a table and as data."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Row:
    """One convolution or part of a detector. Times are medians of one call on one of the example's inputs."""

    name: str
    original: str
    became: str  # "" where it was left as it was
    shape: tuple[int, ...] | None = None  # of its input, at its largest
    path: str = ""  # how pyseg.nn.AtrousConv2d.plan computes it
    before_ms: float | None = None  # with the batch norm and ReLU that the new form includes
    after_ms: float | None = None
    difference: float | None = None  # of the outputs, relative to their largest magnitude
    reason: str = ""


@dataclass
class Report:
    """What accelerate() did to a model. `print` it, or use `rows`, `to_dict()`, `to_markdown()`."""

    rows: list[Row]
    memory_format: str = "unchanged"
    before_ms: float | None = None  # the whole model, on the example inputs
    after_ms: float | None = None
    difference: float | None = None  # of the model's outputs, relative to the largest magnitude of each
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        header, *body = self._cells()
        lines = [header, ["---"] * len(header), *body]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{table}\n\n" + "\n".join(f"- {line}" for line in self._summary())

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        numeric = {"ms before", "ms after", "ratio", "difference"}

        def line(row: list[str]) -> str:
            aligned = [
                cell.rjust(width) if title in numeric else cell.ljust(width)
                for cell, width, title in zip(row, widths, cells[0], strict=True)
            ]
            return "  ".join(aligned).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([line(cells[0]), rule, *map(line, cells[1:]), "", *self._summary()])

    def _cells(self) -> list[list[str]]:
        """Header and rows; without the columns that nothing was measured for."""
        measured = any(row.before_ms is not None for row in self.rows)
        titles = ["module", "was", "became"]
        titles += ["input", "ms before", "ms after", "ratio", "difference"] if measured else []
        lines = [[*titles, "how and why"]]
        for row in self.rows:
            line = [row.name or "(the model)", row.original, row.became or "(unchanged)"]
            if measured:
                line += [
                    "x".join(map(str, row.shape)) if row.shape else "",
                    _ms(row.before_ms),
                    _ms(row.after_ms),
                    _ratio(row.before_ms, row.after_ms),
                    "" if row.difference is None else f"{row.difference:.1e}",
                ]
            lines.append([*line, ": ".join(filter(None, (row.path, row.reason)))])
        return lines

    def _summary(self) -> list[str]:
        changed = sum(bool(row.became) for row in self.rows)
        lines = [f"{changed} of {len(self.rows)} modules accelerated, memory format {self.memory_format}"]
        if self.before_ms is not None and self.after_ms is not None:
            times = f"{_ms(self.before_ms)} ms before, {_ms(self.after_ms)} ms after"
            lines.append(f"whole model: {times}, {_ratio(self.before_ms, self.after_ms)} times as fast")
        if self.difference is not None:
            lines.append(f"outputs differ by {self.difference:.1e} of the largest magnitude")
        return lines + self.notes


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}" if before and after else ""
