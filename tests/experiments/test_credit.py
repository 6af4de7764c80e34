"""The credit experiment's report on cells whose outcome is known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from preconcert.experiments.credit import CREDIT, STANDARD, at_budget, budgets, contrasts
from preconcert.experiments.experiment import Scale, seeds_of
from preconcert.experiments.page import PAGE, RESULT, Result, write_result
from preconcert.experiments.report import ReportTable, show
from preconcert.experiments.statistics import Estimate
from tests.experiments.fabricated import cell_of, cells_like


def outcome(arm: str, task: str, seed: int) -> float | None:
    """Agent-wise credit is better by far, everything else is alike; one arm never gets through."""
    if arm.startswith("ppo-sequential"):
        return None
    level = 0.2 if arm == "warm" else 0.8 if arm.startswith("agent.") else 0.5
    return level + 0.01 * seed + (0.1 if task == "rendezvous" else 0.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = cells_like(STANDARD, outcome)
    made = {"commit": "0" * 40, "versions": {"torch": "1"}, "machine": {"cores": 2, "gpu": None}, "at": "now"}
    report = CREDIT.report(STANDARD, cells)
    command = "preconcert experiment credit"
    result = Result(CREDIT, Scale.STANDARD, STANDARD, seeds_of(STANDARD), cells, report, command, made)
    out = tmp_path_factory.mktemp("credit")
    write_result(result, out)
    return out


def test_what_is_clear_is_found_and_what_is_not_is_not() -> None:
    report = CREDIT.report(STANDARD, cells_like(STANDARD, outcome))
    clear = [finding.text for finding in report.findings if finding.clear]
    assert len(clear) == 2
    for text, adapters in zip(clear, ("one adapter", "adapter each"), strict=True):
        assert text.startswith(f"agent-wise, {adapters} – global, {adapters}: ")
        assert "differs by +0.300" in text
    table = next(table for table in report.tables if table.name == "comparisons")
    assert len(table.rows) == len(contrasts(STANDARD)) == 21
    verdicts = [row[-1] for row in table.rows]
    # The arm that failed is held against `global` twice, and once against itself with the other adapters.
    assert {each: verdicts.count(each) for each in verdicts} == {"better": 2, "not told apart": 16, "not compared": 3}


def test_failed_cells_are_counted() -> None:
    report = CREDIT.report(STANDARD, cells_like(STANDARD, outcome))
    table = next(table for table in report.tables if table.name == "outcome-rendezvous")
    rows = {str(row[0]): row for row in table.rows}
    assert len(rows) == len(STANDARD.arms)
    assert rows["PPO, sequential, one adapter"][1:] == ("0 (5 failed)", *[None] * 6)
    assert rows["global, one adapter"][1] == "5"
    found = rows["global, one adapter"][2]
    assert isinstance(found, Estimate)
    assert found.value == pytest.approx(0.62)


def test_the_budget_is_what_every_cell_has() -> None:
    cells = [cell_of("a", "t", 0, 0.5, 3000.0), cell_of("b", "t", 0, 0.5, 2000.0), cell_of("warm", "t", 0, 0.5)]
    assert budgets([*cells, cell_of("c", "t", 0, None)]) == {"t": 2000.0}
    assert budgets(cells[2:]) == {}
    curves = {"env_steps": [10.0, 20.0, 30.0, 40.0], "success": [0.0, 0.2, None, 1.0]}
    assert at_budget(curves, "success", 30.0, width=2) == pytest.approx(0.1)
    assert at_budget(curves, "success", 100.0, width=1) == 1.0
    assert at_budget(curves, "success", 5.0) is None
    assert at_budget(curves, "return", 100.0) is None


def test_nothing_at_all_still_makes_a_report() -> None:
    report = CREDIT.report(STANDARD, cells_like(STANDARD, lambda *_: None))
    assert [finding.clear for finding in report.findings] == [False]
    assert "21 of 21" in report.findings[0].text
    assert all(row[2:-1] == (None,) * (len(row) - 3) for table in report.tables for row in table.rows)


def test_the_page_stands_alone(written: Path) -> None:
    html = (written / PAGE).read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    assert "<script" not in html
    assert html.count("data:image/png;base64,") == len(list((written / "figures").glob("*.png"))) == 3
    for part in ("it &lt;did&gt; not work", "What this does not show", "preconcert experiment credit", "0" * 40):
        assert part in html


def test_no_infinity_gets_into_the_numbers(written: Path) -> None:
    text = (written / RESULT).read_text()
    assert not re.search(r"\b(NaN|Infinity)\b", text)


def test_rows_fit_their_columns() -> None:
    with pytest.raises(ValueError, match="row of 1 entries under 2"):
        ReportTable("t", "t", ("a", "b"), ((1.0,),))


def test_numbers_as_people_read_them() -> None:
    values = [0.0, 0.1 + 0.2 - 0.3, -1e-17, 0.004, 0.25, 12345.6]
    assert [show(value)[0] for value in values] == ["0.00", "0.00", "0.00", "0.004", "0.25", "12,346"]
