"""The planning experiment: its work on a tiny run, arm by arm, and its report on cells whose outcome is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from preconcert.experiments.experiment import Cell, CellResult, Scale, cells_of
from preconcert.experiments.planning import (
    BEAM,
    BEST,
    COMMONEST,
    ORACLE,
    PLANNING,
    REACTIVE,
    SAME,
    SHUFFLED,
    STANDARD,
    TREE,
    gap_share,
    report,
)
from preconcert.experiments.planning_work import plan_and_judge
from preconcert.experiments.readings import Readings
from preconcert.training.reporter import Silent
from tests.experiments.fabricated import cell_of

TASKS = [task.name for task in STANDARD.tasks]
SUCCESS = {
    REACTIVE: 0.4, SAME: 0.45, COMMONEST: 0.5, BEST: 0.65, BEAM: 0.65, TREE: 0.48, "recurrent": 0.5,
    SHUFFLED: 0.38, ORACLE: 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warm")


@pytest.mark.parametrize("cell", cells_of(PLANNING, Scale.SMOKE), ids=lambda cell: cell.arm)
def test_the_work_of_every_arm(cell: Cell, warm: Path, tmp_path: Path) -> None:
    """All arms share one run; what an arm is asked for decides what is written and measured."""
    found = plan_and_judge(cell.recipe, tmp_path, cell.options, warm, Silent()).measures
    assert len([path for path in warm.glob("run-*") if path.is_dir()]) == 1
    assert found["decisions"] == 8 * 4 * 2
    success, tokens = found["success"], found["tokens_per_decision"]
    assert success is not None
    assert tokens is not None
    assert 0 <= success <= 1
    if cell.arm == REACTIVE:
        assert tokens == pytest.approx(14)
        assert found["success_greedy"] is not None
    else:
        assert tokens > 14
    assert (found.get("samples") is not None) == (cell.arm in (SAME, COMMONEST))
    assert (found.get("candidates") is not None) == (cell.arm not in (REACTIVE, SAME, COMMONEST))


def cells(success: Mapping[str, float], seeds: int = 5) -> list[CellResult]:
    found: list[CellResult] = []
    for arm in STANDARD.arms:
        for task in TASKS:
            for seed in range(seeds):
                value = success[arm.name] + 0.01 * seed
                made = cell_of(arm.name, task, seed, value)
                measures = {"success": value, "return": value, "tokens_per_decision": 14.0, "seconds_per_decision": 0.1}
                found.append(replace(made, measures=measures, curves={}))
    return found


def test_targets_that_are_met() -> None:
    made = report(STANDARD, cells(SUCCESS))
    first, second, third = made.findings[:3]
    assert first.clear
    assert "Met: best-of-k on rendezvous, box-push, pursuit; beam on" in first.text
    assert "tree" not in first.text
    assert second.clear
    assert "best-of-k on rendezvous (0.62)" in second.text
    assert "Holds: the difference is -0.020" in third.text
    tables = {table.name: table for table in made.tables}
    rows = {row[0]: row for row in tables["success-pursuit"].rows}
    assert rows["reactive"][-1] is None
    assert rows["best-of-K, token model"][-1].value == pytest.approx(0.625)  # type: ignore[union-attr]
    assert [figure.name for figure in made.figures] == ["success"]


def test_targets_that_are_missed_are_said_so() -> None:
    bad = {**SUCCESS, BEST: 0.46, BEAM: 0.45, SHUFFLED: 0.6}
    first, second, third = report(STANDARD, cells(bad)).findings[:3]
    assert not first.clear
    assert "Not met: none on any task" in first.text
    assert not second.clear
    assert "FAILS" in third.text
    assert third.clear
    undecided = cells({**SUCCESS, SHUFFLED: 0.4})
    for number, each in enumerate(undecided):
        if each.cell.arm == SHUFFLED:
            moved = (each.measures["success"] or 0.0) + (0.2 if number % 2 else -0.1)
            undecided[number] = replace(each, measures={**each.measures, "success": moved})
    third = report(STANDARD, undecided).findings[2]
    assert "Not found to be better: " in third.text
    assert not third.clear


def test_shares_of_the_gain_are_counted_by_task() -> None:
    """One way of planning must reach the share on every task where there is something to gain."""
    by_task = {TASKS[0]: {**SUCCESS, BEAM: 0.45}, TASKS[1]: {**SUCCESS, BEST: 0.45}, TASKS[2]: {**SUCCESS, ORACLE: 0.4}}
    mixed = [each for name, success in by_task.items() for each in cells(success) if each.cell.task == name]
    second = report(STANDARD, mixed).findings[1]
    assert not second.clear
    assert f"Not met on all tasks where the oracle's gain is clear ({TASKS[0]}, {TASKS[1]})" in second.text
    nothing = report(STANDARD, cells({**SUCCESS, ORACLE: 0.4})).findings[1]
    assert "Not judged: the oracle's gain is clear on no task" in nothing.text


def test_a_single_seed_shows_nothing() -> None:
    broken = [each if each.cell.seed == 0 else replace(each, error="it broke", measures={}) for each in cells(SUCCESS)]
    first, second, third = report(STANDARD, broken).findings[:3]
    assert not first.clear
    assert not second.clear
    assert "Not met: none on any task (72 of their cells failed)" in first.text
    assert "Not judged" in second.text
    assert third.text.startswith("Control")


def test_no_share_of_a_gain_that_is_not_there() -> None:
    readings = Readings(cells({**SUCCESS, ORACLE: 0.4}))
    assert gap_share(readings, BEST, TASKS[0]) is None
    assert gap_share(Readings(cells(SUCCESS)), SAME, TASKS[0]).value == pytest.approx(0.125)  # type: ignore[union-attr]


def test_an_unfinished_experiment_can_be_read() -> None:
    some = [each for each in cells(SUCCESS, 2) if each.cell.arm in (REACTIVE, BEST)]
    made = report(STANDARD, some)
    assert any("Not met" in finding.text for finding in made.findings)
