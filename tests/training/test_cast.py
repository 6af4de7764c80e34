"""Casts: who plays what in a batch of episodes that each have players of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from preconcert.agents import AgentSettings, ChannelMode, ChannelSettings, GenerativeTeam
from preconcert.core import Episode, UnknownNameError
from preconcert.envs import make_env
from preconcert.models import GenerateRequest, TransformersModel
from preconcert.prompts import SpanSettings
from preconcert.training.credit import AgentCredit, GlobalCredit, RoleCredit, TurnKey, estimate, ledger_of
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.training.rows import GrammarTable, RowSettings, build_rows
from tests.training.episodes import episode, turn
from tests.training.teams import ALL_SPANS, load, starter_checkpoint

ACT = AgentSettings(spans=SpanSettings(intend=False, foresee=False, say=False))
OTHERS: tuple[dict[str, str], ...] = (
    {},
    {"agent_0": "main", "agent_1": "past"},
    {"agent_0": "past", "agent_1": "main"},
    {"agent_1": "script:always-bet"},
    {"agent_0": "script:honest", "agent_1": "past"},
    {"agent_0": "script:random", "agent_1": "script:equilibrium"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return starter_checkpoint(tmp_path_factory.mktemp("kuhn") / "starter", "kuhn", {})


@pytest.fixture
def team(folder: Path) -> GenerativeTeam:
    model = load(folder, ("main", "past"), deviation=0.5)
    found = GenerativeTeam(model, make_env("kuhn", {}, 0).language, ACT, dict.fromkeys(("agent_0", "agent_1"), "main"))
    found.version, found.versions["past"] = 7, 3
    return found


def specs(seeds: int = 5) -> list[EpisodeSpec]:
    return [EpisodeSpec("kuhn", {}, seed, "train", 0, 0, cast) for cast in OTHERS for seed in range(seeds)]


def choices(played: Episode) -> list[Any]:
    turns = [turn for trajectory in played.trajectories.values() for turn in trajectory.turns]
    return [(turn.agent, turn.adapter, turn.action, turn.completion_ids) for turn in turns]


def test_a_mixed_batch_is_the_episodes_played_apart(team: GenerativeTeam) -> None:
    together = rollout(specs(), team, ChannelSettings(), 1)
    apart = [rollout([spec], team, ChannelSettings(), 1)[0] for spec in specs()]
    assert [choices(each) for each in together] == [choices(each) for each in apart]
    for one, other in zip(together, apart, strict=True):
        for agent in one.trajectories:
            for a, b in zip(one.trajectories[agent].turns, other.trajectories[agent].turns, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_everyone_plays_what_the_cast_says(team: GenerativeTeam) -> None:
    for spec, played in zip(specs(), rollout(specs(), team, ChannelSettings(), 1), strict=True):
        for agent, trajectory in played.trajectories.items():
            player = spec.cast.get(agent, "main")
            assert {each.adapter for each in trajectory.turns} == {player}
            assert trajectory.policy_version == (-1 if player.startswith("script:") else {"main": 7, "past": 3}[player])
            assert all(bool(each.completion_ids) != player.startswith("script:") for each in trajectory.turns)
            if player == "script:always-bet":
                assert {each.action for each in trajectory.turns} <= {"bet", "wait"}


def test_adapters_decide_differently_and_scripts_alike(team: GenerativeTeam) -> None:
    """An adapter plays as if the whole team were it; a script as if nobody else were there."""
    for name in ("main", "past"):
        alone = GenerativeTeam(team.model, team.language, ACT, dict.fromkeys(("agent_0", "agent_1"), name))
        cast = dict.fromkeys(("agent_0", "agent_1"), name)
        mine = [EpisodeSpec("kuhn", {}, seed, cast=cast) for seed in range(8)]
        for one, other in zip(rollout(mine, alone, ChannelSettings(), 2), rollout(mine, team, ChannelSettings(), 2),
                              strict=True):
            assert choices(one) == choices(other)
    honest = dict.fromkeys(("agent_0", "agent_1"), "script:honest")
    scripted = [EpisodeSpec("kuhn", {}, seed, cast=honest) for seed in range(8)]
    for one, other in zip(rollout(scripted, team, ChannelSettings(), 2),
                          rollout(scripted, ScriptedPolicy("honest"), ChannelSettings(), 2), strict=True):
        assert [each[2] for each in choices(one)] == [each[2] for each in choices(other)]


def test_one_generate_call_per_step(team: GenerativeTeam, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[set[str | None]] = []
    generate: Callable[..., Any] = TransformersModel.generate

    def counted(self: TransformersModel, requests: Sequence[GenerateRequest]) -> Any:
        calls.append({request.adapter for request in requests})
        return generate(self, requests)

    monkeypatch.setattr(TransformersModel, "generate", counted)
    played = rollout(specs(), team, ChannelSettings(), 1)
    assert len(calls) == max(each.steps for each in played)
    assert calls[0] == {"main", "past"}


def test_groups_share_a_cast() -> None:
    names = {spec.group for spec in specs(1)}
    assert len(names) == len(OTHERS)
    assert "kuhn:train:0" in names


@pytest.mark.parametrize("other", [0, 1])
def test_messages_are_not_shuffled_within_an_instance_whoever_plays_it(other: int) -> None:
    casts: tuple[dict[str, str], ...] = ({}, {"agent_0": "script:scripted"})
    drawn = [EpisodeSpec("rendezvous", {}, seed, cast=cast) for seed, cast in zip((0, other), casts, strict=True)]
    played = rollout(drawn, ScriptedPolicy("expert"), ChannelSettings(mode=ChannelMode.SHUFFLED), 0)
    heard = [bool(turn.inbox) for each in played for t in each.trajectories.values() for turn in t.turns]
    assert any(heard) == (other != 0)


def test_unknown_players_are_refused(team: GenerativeTeam) -> None:
    for cast, finding in (
        ({"agent_2": "main"}, "unknown agent 'agent_2'"),
        ({"agent_0": "pst"}, "unknown adapter 'pst'; did you mean 'past'"),
        ({"agent_0": "script:honst"}, "unknown player 'honst'; did you mean 'honest'"),
    ):
        with pytest.raises(UnknownNameError, match=finding):
            rollout([EpisodeSpec("kuhn", {}, 0, cast=cast)], team, ChannelSettings(), 0)


def test_opponents_give_no_rows(team: GenerativeTeam) -> None:
    played = rollout(specs(), team, ChannelSettings(), 1)
    settings = RowSettings(ALL_SPANS, hindsight=False, bind_action=False, trainable=frozenset({"main"}))
    advantages = estimate(played).advantages
    rows = build_rows(played, advantages, team, GrammarTable(), settings)
    wanted = [
        (agent, len(trajectory.turns))
        for spec, each in zip(specs(), played, strict=True)
        for agent, trajectory in each.trajectories.items()
        if spec.cast.get(agent, "main") == "main"
    ]
    assert {row.adapter for row in rows} == {"main"}
    assert len(rows) == sum(count for _, count in wanted)


# ---- credit


def against(learner: float, frozen: float, sample: int = 0) -> Episode:
    """A game of a learner and a frozen adapter, both with tokens."""
    return episode(
        {
            "a": [turn("a", 0), turn("a", 1, reward=learner)],
            "b": [turn("b", 0, adapter="old"), turn("b", 1, adapter="old", reward=frozen)],
        },
        sample=sample,
    )


def test_opponents_are_part_of_the_world() -> None:
    games = [against(1.0, -1.0), against(3.0, -3.0, 1)]
    ledger = ledger_of(games, learners={"a"})
    assert [strand.learns for strand in ledger[0].strands.values()] == [True, False]
    assert [strand.learns for strand in ledger_of(games)[0].strands.values()] == [True, True]
    pooled = GlobalCredit(scale=False).estimate(ledger).advantages
    assert [pooled[TurnKey(g, "a", i)] for g in (0, 1) for i in (0, 1)] == [-1.0, -1.0, 1.0, 1.0]
    assert all(pooled[TurnKey(g, "b", i)] == 0.0 for g in (0, 1) for i in (0, 1))
    own = AgentCredit(scale=False).estimate(ledger).advantages
    assert own == pooled
    mixed = GlobalCredit(scale=False).estimate(ledger_of(games)).advantages
    assert mixed[TurnKey(0, "a", 0)] == 1.0  # its return less the mean of all four, which is 0


def test_running_baselines_are_those_of_learners() -> None:
    games = [against(2.0, -2.0)]
    found = RoleCredit(decay=0.5).estimate(ledger_of(games, learners={"a"}))
    assert dict(found.state) == {"a": 1.0}
    assert found.advantages[TurnKey(0, "a", 0)] == 2.0
    assert found.advantages[TurnKey(0, "b", 0)] == 0.0
