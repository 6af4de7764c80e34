"""The foresight experiment's report on cells whose outcome is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from preconcert.experiments.experiment import CellResult, ExperimentArm, Plan
from preconcert.experiments.foresight import FORESIGHT, STANDARD
from preconcert.experiments.foresight_arms import ANNEALED, CONTRASTS, HINDSIGHT, IMAGINED, PAID, PASSES, PLAIN, REAL
from preconcert.experiments.foresight_report import report, step_ratios, steps_to
from preconcert.experiments.judgement import course, curves_of
from preconcert.experiments.readings import Readings
from preconcert.experiments.statistics import Estimate
from preconcert.training.recipe import Recipe
from tests.experiments.fabricated import cell_of

ACCURACY = {PLAIN: 0.6, PAID: 0.8, ANNEALED: 0.6, HINDSIGHT: 0.9}
PREDICTING = replace(STANDARD, arms=tuple(arm for arm in STANDARD.arms if arm.name in ("warm", *ACCURACY)))
IMAGINING = Plan(tuple(ExperimentArm(name, name) for name in (REAL, PASSES, IMAGINED)), STANDARD.tasks[:1], 5)
TASK = STANDARD.tasks[0].name


def predicting(arm: str, seed: int, task: str = TASK) -> CellResult:
    """Rewards raise accuracy by 0.2; annealed ones cost a tenth of success."""
    found = cell_of(arm, task, seed, 0.7 + 0.01 * seed - 0.1 * (arm == ANNEALED))
    more = {
        "prediction/top": ACCURACY.get(arm, 0.5) + 0.01 * seed, "prediction/brier": 0.7,
        "predictability/by_own_view": 0.6, "predictability/by_view": 0.5, "predictability/entropy_bits": 1.5,
    }  # fmt: skip
    return replace(found, measures={**found.measures, **more})


def imagining(arm: str, seed: int, curve: Mapping[int, float], budget: int = 20) -> CellResult:
    """A cell with a success curve: the value from each iteration (from 1) on; 100 steps an iteration."""
    found = cell_of(arm, TASK, seed, 0.8)
    values = [max((v for at, v in curve.items() if at <= i), default=0.0) for i in range(1, budget + 1)]
    return replace(found, curves={"env_steps": [100.0 * i for i in range(1, budget + 1)], "success": values})


def cells_of_predictions(seeds: int = 12) -> list[CellResult]:
    return [predicting(arm.name, seed) for seed in range(seeds) for arm in PREDICTING.arms]


def test_what_rewards_raise_and_what_they_cost_is_said() -> None:
    found = report(PREDICTING, cells_of_predictions())
    tables = {table.name: table for table in found.tables}
    verdicts = {row[0]: row[-1] for row in tables["comparisons-accuracy"].rows}
    assert len(verdicts) == len(CONTRASTS)
    assert verdicts["prediction rewards – nothing"] == "better"
    assert verdicts["annealed rewards – nothing"] == "not told apart"
    assert verdicts["prediction rewards – cross-entropy"] == "worse"
    kept = {row[0]: row[-1] for row in tables["kept"].rows}
    assert kept == {
        "prediction rewards – nothing": "is not worse",
        "annealed rewards – nothing": "is worse",
        "cross-entropy – nothing": "is not worse",
    }
    said = [finding.text for finding in found.findings]
    assert any("teammate-action accuracy differs by +0.200" in text for text in said)
    assert any("annealed rewards – nothing: held-out success is worse by more than 2%" in text for text in said)
    predictable = tables[f"predictable-{TASK}"]
    assert predictable.columns[-1] == "by the agents themselves"
    assert f"predictable-{STANDARD.tasks[1].name}" not in tables  # nothing was played there
    assert [row[0] for row in predictable.rows] == [arm.title for arm in PREDICTING.arms]
    assert {figure.name for figure in found.figures} == {"predictions", "course"}


def test_steps_are_counted_to_the_running_mean() -> None:
    cell = imagining(REAL, 0, {1: 0.0, 6: 1.0})
    assert steps_to(cell, 0.0) == 500.0  # a mean over fewer than five is none
    assert steps_to(cell, 0.2) == 600.0
    assert steps_to(cell, 1.0) == 1000.0
    assert steps_to(cell, 1.1) is None


@pytest.mark.parametrize(("first", "says"), [(3, ", at most half"), (9, "not shown to be at most half")])
def test_half_the_steps_is_told_from_more(first: int, says: str) -> None:
    cells = [
        cell
        for seed in range(5)
        for cell in (
            imagining(REAL, seed, {16: 0.8}),  # 0.8 on average of five at 2000 steps
            imagining(PASSES, seed, {17: 0.8}),  # never
            imagining(IMAGINED, seed, {first: 0.8}),
        )
    ]
    readings = Readings(cells)
    assert step_ratios(readings, TASK, REAL) == (dict.fromkeys(range(5), 1.0), 0)
    assert step_ratios(readings, TASK, PASSES) == (dict.fromkeys(range(5), 1.0), 5)
    assert step_ratios(readings, TASK, IMAGINED) == (dict.fromkeys(range(5), (first + 4) / 20), 0)
    found = report(IMAGINING, cells)
    (said,) = [finding for finding in found.findings if "imagined games" in finding.text]
    assert says in said.text
    assert said.clear == (first == 3)
    table = next(table for table in found.tables if table.name == "steps")
    ratio = table.rows[2][4]
    assert isinstance(ratio, Estimate)
    assert ratio.value == pytest.approx((first + 4) / 20)
    assert [figure.name for figure in found.figures] == ["imagination"]


def test_cells_that_failed_leave_gaps() -> None:
    empty = [cell_of(arm.name, TASK, seed, None) for seed in range(3) for arm in STANDARD.arms]
    found = report(STANDARD, empty)
    assert not any(finding.clear for finding in found.findings)
    for plan in FORESIGHT.plans.values():
        report(plan, [])


def test_curves_hold_what_was_imagined_beside_the_rest() -> None:
    recipe = Recipe.model_validate({"task": "rendezvous", "grpo": {"seeds": 2, "group": 2}})
    line = {"environment_steps": 32, "generated_tokens": 100, "episode_steps": 8, "success": 0.5}
    dreams = {"imagination/policy_tokens": 50.0, "imagination/world_tokens": 70.0, "imagination/malformed": 0.1}
    curves = curves_of([line, {**line, **dreams}, {**line, **dreams}], recipe)
    assert curves["env_steps"] == [32.0, 64.0, 96.0]
    assert curves["imagined_tokens"] == [0.0, 120.0, 240.0]
    assert curves["success"] == [0.5, 0.5, 0.5]
    assert curves["imagination/malformed"] == [None, 0.1, 0.1]
    assert course(curves)["imagined_tokens"] == 240.0
    assert course(curves_of([line], recipe))["imagined_tokens"] is None
