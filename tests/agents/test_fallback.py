"""A silent team to fall back on acts where nothing is heard, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from preconcert.agents import AgentSettings, ChannelSettings, Context, FallbackTeam, GenerativeTeam
from preconcert.agents.planners import SameTokensTeam
from preconcert.core import ConfigError, Episode, Turn, TurnRequest
from preconcert.envs import make_env
from preconcert.models import TransformersModel
from preconcert.prompts import SpanSettings
from preconcert.training.rollout import ScriptedPolicy, rollout
from tests.training.teams import AGENTS, PARAMS, TASK, load, specs, starter_checkpoint

MUTE = AgentSettings(spans=SpanSettings(say=False))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TransformersModel:
    folder = starter_checkpoint(tmp_path_factory.mktemp("fallback") / "starter")
    return load(folder, (*AGENTS, "mute"), deviation=0.5)


def team(model: TransformersModel, settings: AgentSettings, *adapters: str) -> GenerativeTeam:
    language = make_env(TASK, PARAMS, 0).language
    return GenerativeTeam(model, language, settings, dict(zip(AGENTS, adapters, strict=True)))


def both(model: TransformersModel, patience: int = 1) -> FallbackTeam:
    return FallbackTeam(team(model, AgentSettings(), *AGENTS), team(model, MUTE, "mute", "mute"), patience)


def play(policy: Any, **channel: Any) -> list[Episode]:
    return rollout(specs(4, 2), policy, ChannelSettings(**channel), 0)


def turns_of(episodes: Sequence[Episode]) -> list[Turn]:
    return [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]


class Spy:
    """Keeps what a policy was asked."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.version = policy.version
        self.asked: list[TurnRequest] = []

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        self.asked += requests
        return self.policy.decide(requests)

    def finish(self, episode: str) -> None:
        self.policy.finish(episode)


@pytest.mark.parametrize("patience", [1, 2])
def test_where_nothing_arrives_the_silent_team_acts_and_the_talking_one_speaks(
    model: TransformersModel, patience: int
) -> None:
    policy = both(model, patience)
    spy = Spy(policy)
    turns = {(turn.agent, number, turn.step): turn for number, e in enumerate(play(spy, drop=1.0))
             for t in e.trajectories.values() for turn in t.turns}
    alone, mute = team(model, AgentSettings(), *AGENTS), team(model, MUTE, "mute", "mute")
    names = [spec.name for spec in specs(4, 2)]
    differ = 0
    for request in spy.asked:
        turn = turns[request.agent, names.index(request.episode), request.observation.step]
        (talking,), (silent,) = alone.decide([request]), mute.decide([request])
        late = request.observation.step >= patience
        acted = silent if late else talking
        assert (turn.action, turn.completion_ids, turn.adapter) == (acted.action, acted.completion_ids, acted.adapter)
        assert turn.message is not None
        assert talking.message is not None
        assert (turn.message.sender, turn.message.payload) == (talking.message.sender, talking.message.payload)
        differ += late and silent.action != talking.action
    assert differ, "the two teams must differ for this to say anything"
    assert policy.fallen_back == sum(turn.step >= patience for turn in turns.values())
    assert policy.decisions == len(turns)


def test_over_a_channel_that_works_it_is_the_talking_team(model: TransformersModel) -> None:
    policy = both(model)
    assert turns_of(play(policy)) == turns_of(play(team(model, AgentSettings(), *AGENTS)))
    assert policy.fallen_back == 0


def test_who_has_heard_something_once_goes_on_talking(model: TransformersModel) -> None:
    for turn in turns_of(play(both(model), drop=0.5)):
        assert (turn.adapter == "mute") == (not turn.inbox and turn.step >= 1)


@pytest.mark.parametrize(
    ("talking", "silent", "patience", "says"),
    [
        (AgentSettings(memory=1), MUTE, 1, "agent.memory=0"),
        (AgentSettings(context=Context.TRANSCRIPT), MUTE, 1, "agent.context=turn"),
        (AgentSettings(), AgentSettings(), 1, "writes messages itself"),
        (AgentSettings(), MUTE, 0, "patience = 0"),
    ],
)
def test_refusals(
    model: TransformersModel, talking: AgentSettings, silent: AgentSettings, patience: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        FallbackTeam(team(model, talking, *AGENTS), team(model, silent, "mute", "mute"), patience)


def test_teams_of_other_agents_are_refused(model: TransformersModel) -> None:
    language = make_env(TASK, PARAMS, 0).language
    alone = GenerativeTeam(model, language, MUTE, {"agent_0": "mute"})
    with pytest.raises(ConfigError, match="has agents"):
        FallbackTeam(team(model, AgentSettings(), *AGENTS), alone)


def test_the_two_teams_may_have_a_model_each(tmp_path: Path) -> None:
    one, other = (load(starter_checkpoint(tmp_path / name), (*AGENTS, "mute")) for name in ("one", "other"))
    policy = FallbackTeam(team(one, AgentSettings(), *AGENTS), team(other, MUTE, "mute", "mute"), 1)
    assert {turn.adapter for turn in turns_of(play(policy, drop=1.0))} == {*AGENTS, "mute"}


def test_the_channel_hears_of_the_form_of_messages(model: TransformersModel) -> None:
    """A team around a team says what the inner one writes; a planned number of turns changes nothing of it."""
    own = team(model, AgentSettings(), *AGENTS)
    slots = own.message_slots(["agent_1"])
    assert slots
    assert both(model).message_slots(["agent_1"]) == slots
    assert SameTokensTeam(own, 3).message_slots(["agent_1"]) == slots
    assert SameTokensTeam(ScriptedPolicy("random"), 3).message_slots(["agent_1"]) is None
