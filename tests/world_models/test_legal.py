"""What agents may do at imagined moments."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from preconcert.agents import ChannelSettings
from preconcert.core import Episode
from preconcert.envs import make_env
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.world_models import LegalActions


def played(task: str, seeds: range) -> list[Episode]:
    return rollout([EpisodeSpec(task, {}, seed) for seed in seeds], ScriptedPolicy("random"), ChannelSettings(), 0)


@pytest.mark.parametrize(
    ("task", "by_step", "by_view"), [("rendezvous", False, False), ("signal", True, False), ("kuhn", True, True)]
)
def test_what_was_legal_is_legal_in_other_games(task: str, by_step: bool, by_view: bool) -> None:
    """On a grid everything is; speakers only talk and listeners pick; cards leave a move to whose turn it is."""
    everything = make_env(task, {}, 0).language.actions
    legal = LegalActions.of(played(task, range(400)), everything)
    assert bool(legal.by_step) == by_step
    assert bool(legal.by_view) == by_view
    again = LegalActions.from_json(json.loads(json.dumps(legal.to_json())))
    assert again == legal
    seen = [
        turn.observation
        for episode in played(task, range(500, 530))
        for trajectory in episode.trajectories.values()
        for turn in trajectory.turns
    ]
    assert [again.at(view.agent, view.step, view.text) for view in seen] == [view.legal_actions for view in seen]
    assert any(view.legal_actions != everything for view in seen) == by_step


def test_where_nothing_is_known() -> None:
    """An unknown view has what is usual at its step, later steps what the last had, an unknown agent everything."""
    episodes = played("signal", range(4))
    everything = make_env("signal", {}, 0).language.actions
    legal = LegalActions.of(episodes, everything)
    agent, steps = next(iter(legal.by_step.items()))
    assert legal.at(agent, 0, "never seen") == steps[0]
    assert legal.at(agent, 99, "never seen") == steps[-1]
    assert legal.at("nobody", 0, "") == everything
    few = replace(legal, by_view={agent: {"seen": everything[:1]}})
    assert few.at(agent, 0, "seen") == everything[:1]
