"""Cross-play and evaluation of runs with opponents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preconcert.agents import AgentSettings
from preconcert.agents.codecs import IntentionSettings
from preconcert.core import ConfigError, UnknownNameError
from preconcert.experiments.crossplay import Guests, cross_play, entrants_of, write_cross_play
from preconcert.experiments.evaluation import evaluate
from preconcert.experiments.terminal import arms_table, crossplay_table
from preconcert.prompts import SpanSettings
from preconcert.training.league import LeagueSettings
from preconcert.training.recipe import Recipe
from preconcert.training.run import train
from tests.training.teams import load, recipe_of, settings_of, starter_checkpoint, team_on


def recipe(task: str, league: dict[str, Any] | None, **params: Any) -> Recipe:
    small = recipe_of(iterations=2, seeds=4, policy_spans=("act",), credit={"type": "loo"})
    return Recipe(
        task=task,
        params=params,
        starter=small.starter,
        lora=small.lora,
        warm_start=small.warm_start,
        grpo=small.grpo,
        seed=small.seed,
        agent=AgentSettings(spans=SpanSettings(intend=False, foresee=False, say=False)),
        league=LeagueSettings(**league) if league is not None else None,
        adapters="shared",  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def poker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe("kuhn", {"mode": "crossplay", "every": 1}), tmp_path_factory.mktemp("poker") / "run")


@pytest.fixture(scope="module")
def dilemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe("dilemma", None, rounds=3), tmp_path_factory.mktemp("dilemma") / "run")


def test_the_members_of_a_run(poker: Path, dilemma: Path) -> None:
    assert [each.label for each in entrants_of(poker, 0)] == [
        "counter@1", "counter, trained", "team@0", "team@1", "team, trained",
    ]  # fmt: skip
    assert [(each.label, each.player) for each in entrants_of(dilemma, 1, "x: ")] == [("x: trained", None)]


def test_cross_play_of_poker_is_exact(poker: Path, tmp_path: Path) -> None:
    found = cross_play([poker], ["equilibrium", "honest"])
    assert found.exact
    assert np.abs(found.returns + found.returns.T).max() < 1e-6, "what one wins the other loses"
    assert found.worth["equilibrium"].exploitability == pytest.approx(0, abs=1e-9)
    row = found.labels.index("equilibrium")
    assert (found.returns[row] > -1e-6).all(), "an equilibrium loses to nobody over both seats"
    files = write_cross_play(found, tmp_path)
    content = json.loads(files[0].read_text())
    assert content["labels"] == list(found.labels)
    assert np.array(content["returns"]).shape == (7, 7)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert crossplay_table(found)


def test_cross_play_of_two_runs_is_played(dilemma: Path, poker: Path) -> None:
    found = cross_play([dilemma, dilemma], ["always-defect", "always-cooperate"], episodes=4)
    assert found.labels == (f"{dilemma}: trained",) * 2 + ("always-defect", "always-cooperate")
    assert found.returns[2, 3] == 15.0
    assert found.returns[3, 2] == 0.0
    assert found.returns[2, 2] == 3.0
    assert found.errors is not None
    assert found.errors[2, 3] == 0.0
    assert found.episodes == 4
    with pytest.raises(ConfigError, match="does not"):
        cross_play([dilemma, poker])
    with pytest.raises(UnknownNameError, match="unknown script 'grin'; did you mean 'grim'"):
        cross_play([dilemma], ["grin"])
    with pytest.raises(ConfigError, match="nobody to meet"):
        cross_play([dilemma], [])


def test_runs_that_talk_in_different_forms_do_not_meet(tmp_path: Path) -> None:
    model = load(starter_checkpoint(tmp_path / "starter"))
    own, plans = team_on(model), team_on(
        model, settings_of().model_copy(update={"codec": IntentionSettings()})
    )
    others = ("agent_1",)
    assert Guests([own, own]).message_slots(others) == own.message_slots(others) != ()
    with pytest.raises(ConfigError, match=r"different forms: the first in .* words\), number 2 in "):
        Guests([own, plans]).message_slots(others)


def test_evaluation_says_what_a_strategy_is_worth(poker: Path) -> None:
    found = evaluate(poker, episodes=24)
    arms = {result.arm.name: result for result in found.arms}
    content = found.to_json()
    assert content["exploitability"] == content["arms"]["trained"]["exploitability"] > 0
    assert -2 < content["first_seat_value"] < 2
    assert {"population", "trained-equilibrium", "trained-always-bet"} <= arms.keys()
    assert set(arms["trained"].measures.returns) == {"first", "second"}
    assert arms["trained"].measures.return_mean == pytest.approx(0)
    assert arms["random"].worth is not None
    assert arms["random"].worth.exploitability == pytest.approx(11 / 48)
    assert arms["trained-honest"].worth is None
    assert arms["trained-honest"].measures.generated_tokens < arms["trained"].measures.generated_tokens
    assert arms["warm-greedy"].worth is not None
    assert arms["population"].worth is not None
    assert arms_table(found)


def test_opponents_are_met_by_runs_without_a_league(dilemma: Path) -> None:
    found = evaluate(dilemma, episodes=8)
    arms = {result.arm.name: result for result in found.arms}
    assert "population" not in arms
    met = arms["trained-always-cooperate"].measures
    assert met.return_mean >= 9.0, "at least the reward, whatever it does"
    assert set(met.returns) == {"agent_0", "agent_1"}
    assert "exploitability" not in found.to_json()
