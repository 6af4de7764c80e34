"""The rollout source: which credit reaches which token, what is counted, and what is kept between iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preconcert.agents import AgentSettings, ChannelHarm, Context
from preconcert.core import ConfigError, Episode, TrainingError, UnknownNameError, load_episodes
from preconcert.models import TransformersModel
from preconcert.training.credit import Score, TurnKey, estimate
from preconcert.training.rows import GrammarTable, build_rows
from preconcert.training.source import GameSource
from tests.training.teams import AGENTS, PARAMS, load, play, recipe_of, rows_of, settings_of, team_on

HORIZON: int = PARAMS["horizon"]


def luck(episodes: Sequence[Episode]) -> tuple[Episode, ...]:
    """Rewards that depend on what was sampled, since an untrained team earns next to nothing."""

    found = []
    for one in episodes:
        trajectories = dict(one.trajectories)
        for agent, mine in trajectories.items():
            turns = tuple(replace(turn, reward=float(sum(turn.completion_ids) % 2)) for turn in mine.turns)
            trajectories[agent] = replace(mine, turns=turns)
        found.append(replace(one, trajectories=trajectories))
    return tuple(found)


def source_on(model: TransformersModel, folder: Path | None = None, **grpo: Any) -> GameSource:
    return GameSource(recipe_of(**grpo), team_on(model), GrammarTable(), frozenset(AGENTS), folder)


@pytest.fixture
def lucky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source here pays for luck."""
    play_of = GameSource._play

    def paid(self: GameSource, iteration: int) -> Any:
        found = play_of(self, iteration)
        return replace(found, episodes=luck(found.episodes), whole=luck(found.whole), lines=luck(found.lines))

    monkeypatch.setattr(GameSource, "_play", paid)


def test_a_source_counts_the_steps_of_its_worlds(starter: TransformersModel) -> None:
    found = source_on(starter).collect(0)
    assert found.metrics["environment_steps"] == 2 * 2 * HORIZON == sum(one.steps for one in found.episodes)
    assert found.returns is None
    assert "values_s" not in found.metrics


@pytest.mark.parametrize("context", Context)
@pytest.mark.parametrize("score", Score)
def test_only_candidate_turns_learn(
    starter: TransformersModel, tmp_path: Path, lucky: None, score: Score, context: Context
) -> None:
    credit = {"type": "agent-turn", "lines": 2, "score": score}
    recipe = recipe_of(credit=credit, group=3, hindsight_weight=0.5, hindsight_fraction=1.0, loss="grpo")
    team = team_on(starter, settings_of(context))
    found = GameSource(recipe, team, GrammarTable(), frozenset(AGENTS), tmp_path).collect(0)
    moments = 2 * 2 * HORIZON
    branches = moments * 3
    per_branch = (HORIZON + 1) / 2 if score is Score.ROLLOUT else 1
    assert len(found.episodes) == branches
    assert found.metrics["environment_steps"] == branches * per_branch
    assert found.metrics["generated_tokens"] == sum(
        len(turn.completion_ids) for one in found.episodes for t in one.trajectories.values() for turn in t.turns
    )
    assert 0.0 <= found.metrics["line_success"] <= 1.0
    assert found.metrics["episode_steps"] == HORIZON
    learning = [row for row in found.rows if row.policy.any()]
    assert len(learning) == branches * len(AGENTS)
    assert found.policy_tokens == sum(int(row.policy.sum()) for row in learning)
    assert not any(row.advantages[~row.policy].any() for row in found.rows)
    # One number per first turn, of mean zero over the branches of a moment, apart for each agent.
    advantages = [float(row.advantages[row.policy][0]) for row in learning]
    assert all(len(set(row.advantages[row.policy].tolist())) == 1 for row in learning)
    by_moment = np.array(advantages).reshape(moments, 3, len(AGENTS))
    assert np.abs(by_moment.mean(axis=1)).max() < 1e-6
    assert np.abs(by_moment).max() > 0.5
    taught = [row for row in found.rows if (row.targets >= 0).any()]
    assert taught
    if score is Score.IMMEDIATE:  # a branch that was cut does not know what came next
        assert not any(row.policy.any() for row in taught)
        assert all((row.joint == -1).all() for row in taught)
    stored = load_episodes(tmp_path / "episodes.jsonl").episodes
    assert len(stored) == 2 * 2 + branches
    assert {one.steps for one in stored[:4]} == {HORIZON}


def test_an_iteration_played_again_is_the_same(starter: TransformersModel, lucky: None) -> None:
    one, other = (source_on(starter, credit={"type": "agent-turn"}).collect(3) for _ in range(2))
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.completion_ids == b.completion_ids
        assert np.array_equal(a.advantages, b.advantages)


def test_the_role_baselines_are_kept(starter: TransformersModel, lucky: None) -> None:
    first = source_on(starter, credit="role")
    assert first.state_dict() == {"credit": {}}
    episodes = first.collect(0).episodes
    state = first.state_dict()
    assert set(state["credit"]) == set(AGENTS)
    assert state["credit"] == estimate(episodes, "role").state
    resumed = source_on(starter, credit="role")
    resumed.load_state_dict(state)
    one, other = first.collect(1), resumed.collect(1)
    assert [row.advantages.tolist() for row in one.rows] == [row.advantages.tolist() for row in other.rows]
    fresh = source_on(starter, credit="role").collect(1)
    assert [row.advantages.tolist() for row in one.rows] != [row.advantages.tolist() for row in fresh.rows]


@pytest.mark.parametrize("level", ["turn", "token"])
def test_values_reach_the_estimator_and_returns_the_critic(starter: TransformersModel, level: str) -> None:
    def values(episodes: Sequence[Episode]) -> dict[TurnKey, Any]:
        return {
            TurnKey(position, agent, index): np.linspace(0.1, 0.9, len(turn.completion_ids))
            for position, one in enumerate(episodes)
            for agent, trajectory in one.trajectories.items()
            for index, turn in enumerate(trajectory.turns)
        }

    credit = {"type": "gae", "level": level, "normalise": "none", "lam": 1.0}
    recipe = recipe_of().model_copy(update={"grpo": recipe_of().grpo.model_copy(update={"loss": "grpo"})})
    credit_settings = type(recipe.grpo).model_validate({"credit": credit}).credit
    recipe = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"credit": credit_settings})})
    source = GameSource(recipe, team_on(starter), GrammarTable(), frozenset(AGENTS), None, values=values)
    found = source.collect(0)
    assert found.returns is not None
    assert "values_s" in found.metrics
    assert len(found.returns) == 2 * 2 * len(AGENTS) * HORIZON
    turns = [(k, a, i) for k, e in enumerate(found.episodes) for a in e.trajectories for i in range(e.steps)]
    for (position, agent, index), row in zip(turns, found.rows, strict=True):
        to_go = sum(turn.reward for turn in found.episodes[position].trajectories[agent].turns[index:])
        assert np.allclose(found.returns[TurnKey(position, agent, index)], to_go)
        value = np.linspace(0.1, 0.9, len(row.completion_ids)) if level == "token" else 0.1
        assert np.allclose(row.advantages, np.where(row.policy, to_go - value, 0.0))
    with pytest.raises(ConfigError, match=r"grpo\.credit=gae needs a critic's values"):
        GameSource(recipe, team_on(starter), GrammarTable(), frozenset(AGENTS), None)


def test_rewards_scaled_for_nobody_are_refused(starter: TransformersModel) -> None:
    with pytest.raises(UnknownNameError, match="unknown agent 'agent_9'"):
        source_on(starter, rewards={"scale": {"agent_9": 2.0}})


@pytest.mark.parametrize("context", Context)
def test_advantages_per_token_stay_on_their_tokens(starter: TransformersModel, context: Context) -> None:
    team = team_on(starter, settings_of(context))
    episodes = play(team, seeds=1, group=2)
    plain, table = rows_of(team, episodes, lambda number: number + 1.0)
    keys = list(estimate(episodes).advantages)
    lengths = [len(episodes[k.episode].trajectories[k.agent].turns[k.index].completion_ids) for k in keys]
    per_token = {key: np.arange(n) / 100 + i + 1.0 for i, (key, n) in enumerate(zip(keys, lengths, strict=True))}
    settings = source_on(starter).settings
    rows = build_rows(episodes, per_token, team, table, settings)
    assert len(rows) == len(plain)
    for row, other in zip(rows, plain, strict=True):
        assert np.array_equal(np.floor(row.advantages), np.floor(other.advantages) * row.policy)
        assert len(set(row.advantages[row.policy].tolist())) == row.policy.sum()
    short = {**per_token, keys[0]: per_token[keys[0]][:-1]}
    with pytest.raises(TrainingError, match=f"{lengths[0] - 1} advantages for the {lengths[0]} tokens of turn 0"):
        build_rows(episodes, short, team, table, settings)


def test_memory_reaches_branches(checkpoint: Any) -> None:
    model = load(checkpoint("starter"))
    team = team_on(model, AgentSettings(memory=1))
    recipe = recipe_of(credit={"type": "agent-turn"})
    found = GameSource(recipe, team, GrammarTable(), frozenset(AGENTS), None).collect(0)
    assert found.metrics["environment_steps"] == 2 * 2 * HORIZON * (HORIZON + 1) / 2


HARMS = {"fine": ChannelHarm(weight=1.0), "dead": ChannelHarm(drop=1.0)}


def lost(episode: Episode) -> set[bool]:
    """Was what was heard in it nothing?"""
    return {not turn.inbox for mine in episode.trajectories.values() for turn in mine.turns if turn.step}


@pytest.mark.parametrize("branching", [False, True])
def test_a_group_shares_what_is_wrong_with_its_channel(starter: TransformersModel, branching: bool) -> None:
    credit: Any = {"type": "agent-turn", "lines": 1} if branching else "agent"
    recipe = recipe_of(seeds=4, group=2, credit=credit).model_copy(update={"channels": HARMS})
    source = GameSource(recipe, team_on(starter), GrammarTable(), frozenset(AGENTS), None)
    found = source.collect(0)
    harms = source.harms(0)
    assert sorted(harms) == ["dead", "dead", "fine", "fine"]
    seeds = list(dict.fromkeys(spec.seed for spec in source.specs(0)))
    of = dict(zip(seeds, harms, strict=True))
    heard = {(of[one.seed], deaf) for one in found.episodes for deaf in lost(one)}
    assert heard == {("dead", True), ("fine", False)}
    assert {name for name in found.metrics if name.startswith("channel/")} == {
        "channel/dead/success", "channel/fine/success"
    }  # fmt: skip
    assert found.metrics["success"] == pytest.approx(
        (found.metrics["channel/dead/success"] + found.metrics["channel/fine/success"]) / 2
    )
    assert {source.harms(iteration) for iteration in range(12)} > {harms}, "drawn anew every time"


def test_a_channel_with_nothing_wrong_changes_nothing(starter: TransformersModel) -> None:
    recipe = recipe_of(seeds=2)
    found = [
        GameSource(each, team_on(starter), GrammarTable(), frozenset(AGENTS), None).collect(0).episodes
        for each in (recipe, recipe.model_copy(update={"channels": {"fine": ChannelHarm()}}))
    ]
    assert found[0] == found[1]
