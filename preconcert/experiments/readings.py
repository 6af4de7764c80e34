"""Cells as reports read them: figures by arm, task and seed; estimates of them; families of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preconcert.experiments.experiment import CellResult
from preconcert.experiments.report import Entry, Finding, ReportTable
from preconcert.experiments.statistics import Comparison, Estimate, Statistic, compare, estimate, holm, iqm, p_shown

Reading = Callable[[CellResult], float | None]
"""One figure of a cell; None where it has none."""
SIGNIFICANT = 0.05


def measure_named(name: str) -> Reading:
    """The reading of a measure."""
    return lambda cell: cell.measures.get(name)


class Readings:
    """The complete cells of an experiment.

    Args:
        cells: complete or not; those that failed are counted by `failed` and have no figure.
        seed: of all resampling.
    """

    def __init__(self, cells: Sequence[CellResult], seed: int = 0) -> None:
        self.cells = cells
        self.seed = seed

    def of(self, arm: str, task: str | None = None) -> list[CellResult]:
        """An arm's complete cells."""
        return [
            each
            for each in self.cells
            if each.cell.arm == arm and task in (None, each.cell.task) and each.error is None
        ]

    def failed(self, arm: str, task: str | None = None) -> int:
        """How many of an arm's cells are missing."""
        return sum(
            each.cell.arm == arm and task in (None, each.cell.task) and each.error is not None for each in self.cells
        )

    def values(self, arm: str, read: Reading, task: str | None = None) -> dict[str, dict[int, float]]:
        """Figures by seed by task."""
        found: dict[str, dict[int, float]] = {}
        for each in self.of(arm, task):
            value = read(each)
            if value is not None:
                found.setdefault(each.cell.task, {})[each.cell.seed] = value
        return found

    def estimate(self, arm: str, read: Reading, task: str | None = None, statistic: Statistic = iqm) -> Estimate | None:
        """Over seeds, and over tasks unless one is named."""
        values = self.values(arm, read, task)
        return estimate({key: list(seeds.values()) for key, seeds in values.items()}, self.seed, statistic=statistic)

    def compare(self, first: str, second: str, read: Reading, task: str | None = None) -> Comparison | None:
        """Two arms on the seeds that both have."""
        return compare(self.values(first, read, task), self.values(second, read, task), self.seed)


@dataclass(frozen=True, slots=True)
class Contrast:
    """A comparison that is planned before the runs."""

    first: str
    second: str
    title: str
    """For people: what is held against what, e.g. `agent-wise – global, shared adapter`."""


def comparisons_table(
    readings: Readings, contrasts: Sequence[Contrast], read: Reading, what: str
) -> tuple[ReportTable, list[Finding]]:
    """A family of comparisons, corrected together, and what it allows to say.

    A difference counts as clear if the interval of the paired difference excludes 0, that of the probability of
    improvement excludes one half, and the p-value after Holm's correction is below 0.05.

    Args:
        readings: the cells.
        contrasts: all of the experiment's.
        read: the figure that is compared; more is better.
        what: its name.
    """
    compared = [(each, readings.compare(each.first, each.second, read)) for each in contrasts]
    # The family is what was planned: a comparison that could not be made still counts.
    adjusted = holm([1.0 if found is None else found.p_value for _, found in compared])
    rows: list[tuple[Entry, ...]] = []
    findings: list[Finding] = []
    for (contrast, found), p_value in zip(compared, adjusted, strict=True):
        if found is None:
            rows.append((contrast.title, 0, None, None, None, "not compared"))
            continue
        clear = found.verdict != 0 and p_value < SIGNIFICANT
        says = ("worse", "not told apart", "better")[found.verdict + 1] if clear else "not told apart"
        rows.append(
            (contrast.title, found.difference.count, found.difference, found.improvement, p_shown(p_value), says)
        )
        if clear:
            difference = found.difference
            findings.append(
                Finding(
                    f"{contrast.title}: {what} differs by {difference.value:+.3f} "
                    f"(95%: {difference.low:+.3f} to {difference.high:+.3f}), p after Holm {p_shown(p_value)}.",
                    True,
                )
            )
    unclear = len(rows) - len(findings)
    if unclear:
        note = f"{unclear} of {len(rows)} planned comparisons of {what} could not be told apart."
        hopeless = sum(found is None or found.p_floor * len(rows) >= SIGNIFICANT for _, found in compared)
        if hopeless:
            note += f" {hopeless} of them had too few pairs: no outcome of theirs could have passed the correction."
        findings.append(Finding(note, False))
    table = ReportTable(
        "comparisons",
        f"Planned comparisons of {what}",
        ("first – second", "pairs", "paired difference (95%)", "P(first better) (95%)", "p (Holm)", "first is"),
        tuple(rows),
        "Interquartile mean of the differences on the same task and seed, all tasks together; the bootstrap resamples "
        "seeds within tasks. p by sign flips of the paired differences, Holm's correction over this table. Told apart "
        "if both intervals agree and p < 0.05.",
    )
    return table, findings
