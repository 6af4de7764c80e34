"""The reactive team with a planner's budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from preconcert.agents.planners import Choice, SameTokensTeam, samples_for
from preconcert.core import ConfigError, TurnRequest, derive_seed
from preconcert.envs import make_env
from preconcert.models import TransformersModel
from tests.training.teams import PARAMS, TASK, load, starter_checkpoint, team_on


@pytest.fixture
def starter(tmp_path: Path) -> TransformersModel:
    return load(starter_checkpoint(tmp_path / "starter"))


def requests() -> list[TurnRequest]:
    env = make_env(TASK, PARAMS, 0)
    views = env.reset()
    return [
        TurnRequest("e", agent, views[agent], (), tuple(a for a in env.agents if a != agent), env.language, 5, env)
        for agent in env.agents
    ]


def test_budgets() -> None:
    assert samples_for(1000, 14) == 71
    assert samples_for(3, 14) == 1
    with pytest.raises(ConfigError):
        samples_for(1000, 0)
    with pytest.raises(ConfigError):
        SameTokensTeam(None, 0)  # type: ignore[arg-type]


def test_the_likeliest_of_its_turns_is_taken(starter: TransformersModel) -> None:
    team = team_on(starter)
    asked = requests()
    turns = SameTokensTeam(team, 6).decide(asked)
    for request, turn in zip(asked, turns, strict=True):
        seeds = [5, *(derive_seed(5, "candidate", draw) for draw in range(1, 6))]
        drawn = team_on(starter).decide([replace(request, seed=seed, episode=f"e{seed}") for seed in seeds])
        assert sum(turn.logprobs) == pytest.approx(max(sum(each.logprobs) for each in drawn))


def test_the_commonest_of_its_turns_is_taken(starter: TransformersModel) -> None:
    """By action and message together; a turn that was drawn, with its own tokens."""
    asked = requests()
    turns = SameTokensTeam(team_on(starter), 24, Choice.COMMONEST).decide(asked)
    for request, turn in zip(asked, turns, strict=True):
        seeds = [5, *(derive_seed(5, "candidate", draw) for draw in range(1, 24))]
        drawn = team_on(starter).decide([replace(request, seed=seed, episode=f"e{seed}") for seed in seeds])
        counts = Counter((each.action, each.message.payload) for each in drawn if each.message is not None)
        assert turn.message is not None
        assert counts[turn.action, turn.message.payload] == max(counts.values()) > 1
        assert turn.completion_ids in [each.completion_ids for each in drawn]


def test_one_turn_is_the_teams_own(starter: TransformersModel) -> None:
    reactive = team_on(starter)
    best = SameTokensTeam(reactive, 1)
    assert best.decide(requests()) == team_on(starter).decide(requests())
    assert best.decisions == 2
    assert best.tokens_generated == reactive.tokens_generated == 2 * 14
    assert reactive.recall("e", "agent_0").actions
    best.finish("e")
    assert not reactive._memories
