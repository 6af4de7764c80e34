"""A team asked for its probabilities says what its play shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from preconcert.agents import AgentSettings, GenerativeTeam, behaviour
from preconcert.core import ConfigError, TurnRequest
from preconcert.envs import decision_points, make_env
from preconcert.prompts import SpanSettings
from tests.training.teams import load, starter_checkpoint

AGENTS = ("agent_0", "agent_1")
ACT = SpanSettings(intend=False, foresee=False, say=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return starter_checkpoint(tmp_path_factory.mktemp("kuhn") / "starter", "kuhn", {})


def team_of(folder: Path, settings: AgentSettings, temperature: float = 1.0) -> GenerativeTeam:
    model = load(folder, ("main", "past"), deviation=0.5)
    language = make_env("kuhn", {}, 0).language
    return GenerativeTeam(model, language, settings, dict.fromkeys(AGENTS, "main"), temperature)


def requests(player: str | None = None) -> list[TurnRequest]:
    return [
        TurnRequest("", "agent_0", point.observation, (), ("agent_1",), point.env.language, 5, point.env, player)
        for point in decision_points("agent_0")
    ]


def test_probabilities_are_exact_and_those_of_play(folder: Path) -> None:
    team = team_of(folder, AgentSettings(spans=ACT))
    found = behaviour(team, requests())
    assert found.samples is None
    assert all(sum(actions.values()) == pytest.approx(1.0, abs=1e-5) for actions in found.actions)
    count = 800
    for request, actions in zip(requests(), found.actions, strict=True):
        asked = [replace(request, episode=str(number), seed=number) for number in range(count)]
        taken = Counter(turn.action for turn in team.decide(asked))
        assert taken["bet"] / count == pytest.approx(actions["bet"], abs=4 * 0.5 / count**0.5)


def test_every_adapter_has_its_own(folder: Path) -> None:
    team = team_of(folder, AgentSettings(spans=ACT))
    mine, others = behaviour(team, requests()), behaviour(team, requests("past"))
    assert max(abs(a["bet"] - b["bet"]) for a, b in zip(mine.actions, others.actions, strict=True)) > 0.01
    assert behaviour(team, requests("main")) == mine


def test_greedy_play_is_certain(folder: Path) -> None:
    exact = behaviour(team_of(folder, AgentSettings(spans=ACT)), requests())
    found = behaviour(team_of(folder, AgentSettings(spans=ACT), temperature=0.0), requests())
    assert found.samples is None
    for greedy, actions in zip(found.actions, exact.actions, strict=True):
        assert greedy[max(actions, key=lambda action: actions[action])] == 1.0


def test_behind_other_spans_turns_are_counted(folder: Path) -> None:
    settings = AgentSettings(spans=SpanSettings(intend=False, foresee=True, say=False))
    found = behaviour(team_of(folder, settings), requests()[:2], samples=50)
    assert found.samples == 50
    assert all(round(each * 50, 6).is_integer() for actions in found.actions for each in actions.values())
    team = team_of(folder, settings)
    behaviour(team, requests()[:1], samples=3)
    assert not team._memories


def test_a_memory_makes_views_incomplete(folder: Path) -> None:
    with pytest.raises(ConfigError, match="remembers"):
        behaviour(team_of(folder, AgentSettings(spans=ACT, memory=2)), requests())
