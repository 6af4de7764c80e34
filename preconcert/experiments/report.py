"""What an experiment reports: tables, figures and findings, in plain values that the page and result.json both take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from preconcert.experiments.statistics import Estimate

Entry = str | float | int | Estimate | None
"""What stands in a table's cell."""


@dataclass(frozen=True, slots=True)
class ReportTable:
    """Rows of entries under a title."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    note: str = ""
    """Below the table: how to read it."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name!r}: a row of {len(row)} entries under {len(self.columns)} columns")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        rows = [[asdict(entry) if isinstance(entry, Estimate) else entry for entry in row] for row in self.rows]
        return {"name": self.name, "title": self.title, "columns": list(self.columns), "rows": rows, "note": self.note}

    def shown(self) -> list[list[tuple[str, str]]]:
        """The rows as text: every entry, and its interval where it has one."""
        return [[show(entry) for entry in row] for row in self.rows]


@dataclass(frozen=True, slots=True)
class ReportFigure:
    """A drawing and what it shows."""

    name: str
    """Of its file, without the ending."""
    caption: str
    figure: Figure


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence that the numbers allow."""

    text: str
    clear: bool
    """Does it hold by the rule that was fixed beforehand? Otherwise it says that nothing could be told."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that an experiment says."""

    findings: Sequence[Finding]
    tables: Sequence[ReportTable]
    figures: Sequence[ReportFigure]


def show(entry: Entry) -> tuple[str, str]:
    """An entry as text, and its interval or nothing."""
    if isinstance(entry, Estimate):
        return _number(entry.value), f"{_number(entry.low)} to {_number(entry.high)}"
    if isinstance(entry, float):
        return _number(entry), ""
    return "–" if entry is None else str(entry), ""


_NOTHING = 1e-12
"""What rounding leaves of a difference of equal numbers is smaller."""


def _number(value: float) -> str:
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size < _NOTHING:
        return "0.00"
    return f"{value:.2f}" if size >= 0.01 else f"{value:.2g}"
