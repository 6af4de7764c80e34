"""The world-model experiment's report on cells whose outcome is known, and its data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from preconcert.agents import ChannelSettings, SlotsSettings, codec_of
from preconcert.core import Episode, Move
from preconcert.envs import make_env
from preconcert.experiments.experiment import Cell, CellResult, Scale, cells_of
from preconcert.experiments.registry import experiment_named
from preconcert.experiments.report import ReportTable
from preconcert.experiments.world_data import (
    Mixture,
    coverage,
    env_at,
    heldout_cases,
    imitated_with,
    mixed_play,
    shared_play,
    valued_by,
)
from preconcert.experiments.world_model import STANDARD, WORLD_MODEL, Subject
from preconcert.experiments.world_model_report import FIGURES, report
from preconcert.training.imitation import scripted_episodes
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Silent
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.training.warm_start import WarmStartSettings
from preconcert.training.world_settings import WorldModelSettings
from preconcert.world_models.consistency import Recital

ERRORS = {
    "token": 0.001, "token-free": 0.002, "token-untold": 0.002, "token-wordless": 0.002,
    "token-recalling": 0.0005,
    "recurrent": 0.02, "copy-last": 0.03, "count-table": 0.01, "shuffled": 0.05,
}  # fmt: skip
RECIPE = Recipe(task="rendezvous", params={"size": 3, "landmarks": 2, "horizon": 5})


def cells_like(error: Callable[[str, str, int], float], exact: float = 0.995) -> list[CellResult]:
    """A cell for every arm, task and seed; errors grow with the horizon."""
    found = []
    for seed in range(5):
        for arm in STANDARD.arms:
            for task in STANDARD.tasks:
                if arm.tasks and task.name not in arm.tasks:
                    continue
                cell = Cell(arm.name, task.name, seed, "nowhere:nothing", RECIPE, {"arm": arm.name, "task": task.name})
                noise = np.random.default_rng(seed).uniform(0.9, 1.1)
                measures: dict[str, float | None] = {}
                curves = {}
                for mode in "ab":
                    for name, _ in FIGURES:
                        for h in (1, 5, 10, 20):
                            value = error(arm.name, task.name, h) * noise
                            measures[f"{name}_{mode}_{h}"] = exact if name == "determined" else value
                    measures[f"drift_{mode}"] = 0.01
                    curves[f"mse_{mode}"] = [error(arm.name, task.name, h) * noise for h in range(1, 21)]
                    curves[f"exact_{mode}"] = [0.5] * 20
                for part, values in (("said", [0.3, 0.8]), ("was", [0.4, 0.7]), ("count", [10.0, 30.0])):
                    curves[f"reliability_{part}_1"] = values
                measures |= {"free_ratio": 0.97, "inside_ratio": 0.6}
                measures |= {"played_agreement": 0.9, "seen_views": 0.25, "fit_s": 3.0}
                found.append(CellResult(cell, measures, curves, None, {}))
    return found


def test_targets_that_are_met_are_said_to_be() -> None:
    found = report(STANDARD, cells_like(lambda arm, _, h: ERRORS[arm] * h))
    texts = [finding.text for finding in found.findings]
    assert sum(text.startswith("Target met") for text in texts) == 3 + 6 + 3  # exactness, comparisons, consistency
    assert not any(text.startswith("Target missed") for text in texts)
    assert [figure.name for figure in found.figures] == ["mse", "exact", "reliability"]
    names = [table.name for table in found.tables]
    assert names == [
        "comparisons",
        *(f"{kind}-{task.name}{mode}" for task in STANDARD.tasks for kind, mode in (
            ("fidelity", "-a"), ("fidelity", "-b"), ("consistency", ""),
        )),
    ]  # fmt: skip
    table = next(table for table in found.tables if table.name == "fidelity-pursuit-a")
    assert len(table.rows) == (len(STANDARD.arms) - 2) * 4  # all but those of being told and of own words
    (told,) = (text for text in texts if "told whose play" in text)
    assert told.startswith("rendezvous: ")
    assert "untold, " in told
    wordless = [text.split(":")[0] for text in texts if "told what the agent itself said last" in text]
    assert wordless == ["rendezvous", "box-push"]
    recalled = [text for text in texts if "shown three earlier moments" in text]
    assert [text.split(":")[0] for text in recalled] == ["rendezvous", "pursuit"]
    assert all("differs by -0.0005" in text for text in recalled)
    assert "25% of the views" in next(table for table in found.tables if table.name == "consistency-pursuit").note


def test_targets_that_are_missed_are_said_to_be() -> None:
    """The token model is worse than copying at 20 steps, and one step of it is not exact."""
    cells = cells_like(lambda arm, _, h: 2.0 if arm == "token" and h == 20 else ERRORS[arm] * h, exact=0.9)
    texts = [finding.text for finding in report(STANDARD, cells).findings]
    missed = [text for text in texts if text.startswith("Target missed")]
    assert sum("determined fields" in text for text in missed) == 3
    assert sum("at 20 steps" in text for text in missed) == 2
    assert any("copy last at 20 steps is lower than the token model's" in text for text in missed)


def test_one_task_that_goes_the_other_way_is_named() -> None:
    cells = cells_like(lambda arm, task, h: ERRORS[arm] * h * (100 if arm == "token" and task == "pursuit" else 1))
    texts = [finding.text for finding in report(STANDARD, cells).findings if "Holm" in finding.text]
    assert len(texts) == 6
    assert all("not clearly higher on pursuit" in text for text in texts)


def test_failed_cells_leave_a_report() -> None:
    cells = [
        CellResult(each.cell, {}, {}, "it broke", {}) if each.cell.arm == "token" else each
        for each in cells_like(lambda arm, _, h: ERRORS[arm] * h)
    ]
    found = report(STANDARD, cells)
    texts = [finding.text for finding in found.findings]
    assert [text.split(" ")[0] for text in texts] == ["Target"] * 6 + ["Not"] * 3, "comparisons, consistency"
    assert not any(finding.clear for finding in found.findings)
    table: ReportTable = next(table for table in found.tables if table.name == "consistency-box-push")
    assert table.rows[0][1] == "0 (5 failed)"


def test_a_seed_in_which_nothing_succeeds_inside_is_no_success() -> None:
    cells = [
        CellResult(each.cell, {**each.measures, "free_ratio": None}, each.curves, None, {})
        if (each.cell.arm, each.cell.seed, each.cell.task) == ("token", 3, "pursuit")
        else each
        for each in cells_like(lambda arm, _, h: ERRORS[arm] * h)
    ]
    found = {f.text: f.clear for f in report(STANDARD, cells).findings if "as often as inside" in f.text}
    missed = [text for text in found if text.startswith("Target missed")]
    assert [text.split(":")[0] for text in missed] == ["Target missed on pursuit"]
    assert "in 1 of 5 seeds nothing succeeds inside it" in missed[0]
    assert not found[missed[0]]


def test_earlier_moments_are_worth_what_all_long_horizons_say() -> None:
    def errors(arm: str, task: str, h: int) -> float:
        worse = arm == "token-recalling" and task == "pursuit" and h == 20
        return ERRORS[arm] * h * (10 if worse else 1)

    found = {
        finding.text.split(":")[0]: finding.clear
        for finding in report(STANDARD, cells_like(errors)).findings
        if "shown three earlier moments" in finding.text
    }
    assert found == {"rendezvous": True, "pursuit": False}


def test_cells_differ_by_their_subject_alone() -> None:
    assert experiment_named("world-model") is WORLD_MODEL
    cells = cells_of(WORLD_MODEL, Scale.STANDARD)
    assert len(cells) == len({cell.digest for cell in cells}) == 6 * 3 * 5 + 5 + 2 * 5 + 2 * 5
    assert {cell.options["subject"] for cell in cells} == set(Subject)
    assert len({cell.recipe.model_dump_json() for cell in cells if cell.seed == 0}) == 3 + 1 + 2 + 2, "told and untold"


@pytest.fixture(scope="module")
def held() -> list[Episode]:
    return mixed_play(RECIPE, ScriptedPolicy("expert"), Mixture(2, 1, 3), "heldout", 0, Silent())


def test_mixed_play_is_what_was_asked_for(held: list[Episode]) -> None:
    assert len(held) == 6
    assert {each.split for each in held} == {"heldout"}
    assert all(each.success for each in held[3:])
    again = mixed_play(RECIPE, ScriptedPolicy("expert"), Mixture(2, 1, 3), "heldout", 0, Silent())
    assert held == again


def test_rivals_see_what_the_base_was_shown() -> None:
    """The episodes of the warm start come last, the very ones, and who played each of a mixture is known."""
    recipe = RECIPE.model_copy(
        update={"world_model": WorldModelSettings(), "warm_start": WarmStartSettings(episodes=3, steps=1)}
    )
    assert (imitated_with(recipe), imitated_with(RECIPE)) == (3, 0)
    mixture = Mixture(1, 1, 1, imitated_with(recipe))
    played = mixed_play(recipe, ScriptedPolicy("expert"), mixture, "train", 0, Silent())
    assert (mixture.total, len(played)) == (6, 6)
    assert mixture.players == ["random", "scripted", "learner", *["scripted"] * 3]
    assert valued_by(recipe, mixture) == [False, True, True, True, True, True]
    language = make_env(RECIPE.task, RECIPE.params, 0, "train").language
    warm = scripted_episodes(recipe, codec_of(SlotsSettings(), language, recipe.agent.spans), 3, Silent())
    for mine, theirs in zip(played[3:], warm, strict=True):
        assert [turn.action for turn in mine.trajectories["agent_0"].turns] == [
            turn.action for turn in theirs.trajectories["agent_0"].turns
        ]
        assert mine.seed == theirs.seed


def test_shared_play_is_made_once(tmp_path: Path) -> None:
    class Once(ScriptedPolicy):
        calls = 0

        def decide(self, requests):  # type: ignore[no-untyped-def]
            Once.calls += 1
            return super().decide(requests)

    found = [
        shared_play(RECIPE, Once("scripted"), Mixture(1, 1, 2), tmp_path / name, tmp_path / "warm", Silent())
        for name in "ab"
    ]
    assert Once.calls == 5
    assert found[0] == found[1]
    assert not (tmp_path / "a" / "play").exists()


def test_cases_are_moments_of_the_world(held: list[Episode]) -> None:
    cases = heldout_cases(held, (1, 5), 2)
    assert len(cases) == 6 * 2 * 2
    for case in cases:
        env = copy.deepcopy(case.request.env)  # the agents of a moment share it
        result = env.step({case.request.agent: case.moves[0].action, **(case.moves[0].others or {})})
        assert result.observations[case.request.agent] == case.outcomes[0].observation
    assert env_at(held[0], 2).state() == held[0].states[2]


def test_a_plan_is_carried_out_whatever_is_seen(held: list[Episode]) -> None:
    """Another agent's real moves, recited among the same teammates, lead to the same end."""
    specs = [EpisodeSpec(each.task, each.params, each.seed, each.split, sample=n) for n, each in enumerate(held)]
    policy = ScriptedPolicy("scripted")
    real = rollout(specs, policy, ChannelSettings(), 3)
    first = next(iter(real[0].trajectories))
    plans = {
        spec.name: (
            first,
            [Move(t.action, t.message and t.message.payload) for t in each.trajectories[first].turns],
        )
        for spec, each in zip(specs, real, strict=True)
    }
    again = rollout(specs, Recital(policy, plans), ChannelSettings(), 3)
    assert [each.states for each in again] == [each.states for each in real]
    silent = {name: (agent, [Move("stay")] * 2) for name, (agent, _) in plans.items()}
    still = rollout(specs, Recital(policy, silent), ChannelSettings(), 3)
    for each in still:
        assert {turn.action for turn in each.trajectories[first].turns} == {"stay"}
        assert not any(turn.message for turn in each.trajectories[first].turns)
        others = [mine for agent, mine in each.trajectories.items() if agent != first]
        assert any(turn.message for mine in others for turn in mine.turns)


def test_coverage_counts_what_was_met(held: list[Episode]) -> None:
    cases = heldout_cases(held, (1,), 2)
    assert coverage(held, cases) == {"seen_views": 1.0, "seen_transitions": 1.0}
    specs = [EpisodeSpec("rendezvous", RECIPE.params, 5, "train")]
    other = rollout(specs, ScriptedPolicy("random"), ChannelSettings(), 0)
    assert coverage(other, cases)["seen_views"] < 0.5
