"""Planned turns, vectors and messages to the nearest: a session over HTTP decides what a rollout here decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preconcert.agents import AgentSettings, ChannelSettings, GenerativeTeam
from preconcert.agents.planners import Beam, BestOfK, PlannerSettings, PlanningTeam, Tree
from preconcert.core import Episode, Message, derive_seed
from preconcert.envs import make_env
from preconcert.models import LanguageModel, LatentSettings, TransformersModel, build_starter
from preconcert.prompts import SpanSettings, TurnFormat, WorldFormat, starter_words
from preconcert.serving.app import create_app
from preconcert.serving.client import RemoteTeam, ServiceClient
from preconcert.serving.shared_model import shared
from preconcert.serving.team import ServedTeam
from preconcert.training.rollout import rollout
from preconcert.world_models import TokenWorldModel
from tests.serving.conftest import running
from tests.serving.test_same_turns import SPECS, here, same, there
from tests.training.teams import AGENTS, PARAMS, SHAPE, TASK, load, team_on

VECTORS: dict[str, Any] = {"tokens": 2, "dims": 3, "levels": 5}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], TransformersModel]:
    """Models with the words of a world model, and an adapter for it."""
    env = make_env(TASK, PARAMS, 0)
    words = starter_words(env.words, env.language, env.agents, digits=True)  # type: ignore[attr-defined]
    folder = build_starter(words, tmp_path_factory.mktemp("seeing") / "base", seed=3, settings=SHAPE)
    return lambda: load(folder, (*AGENTS, "world"))


def world_on(model: LanguageModel) -> TokenWorldModel:
    turns = TurnFormat(model.tokenizer, make_env(TASK, PARAMS, 0).language, SpanSettings())
    return TokenWorldModel(model, WorldFormat(turns, (0.0, 1.0), tells_partners=True), "world")


def weighed(episodes: Sequence[Episode]) -> tuple[list[Episode], list[float]]:
    """Episodes without what their planners weighed, and that: numbers that the arithmetic of batches may change."""
    plain = [
        replace(
            episode,
            trajectories={
                agent: replace(mine, turns=tuple(replace(turn, candidates=()) for turn in mine.turns))
                for agent, mine in episode.trajectories.items()
            },
        )
        for episode in episodes
    ]
    scores = [
        candidate.score
        for episode in episodes
        for mine in episode.trajectories.values()
        for turn in mine.turns
        for candidate in turn.candidates
    ]
    return plain, scores


@pytest.mark.parametrize(
    "plan",
    [
        BestOfK(candidates=3, samples=2, horizon=2),
        Beam(candidates=3, samples=1, horizon=2, width=2, branch=2),
        Tree(candidates=3, branch=2, rounds=2, leaves=2, horizon=2),
    ],
    ids=["best-of-k", "beam", "tree"],
)
def test_a_session_plans_what_a_rollout_plans(seeing: Callable[[], TransformersModel], plan: PlannerSettings) -> None:
    specs = SPECS[:2]
    model = seeing()
    expected = here(PlanningTeam(team_on(model), world_on(model), plan), ChannelSettings(), 3, specs)
    common = shared(seeing(), 4096)
    team = ServedTeam(
        common, TASK, PARAMS, AgentSettings(), {agent: agent for agent in AGENTS}, world=lambda: world_on(common)
    )
    with running(create_app(team)) as url:
        client = ServiceClient(url)
        remote = RemoteTeam(client, specs, 3, plan=plan)
        found = rollout(specs, remote, remote.channel, _seed(3))
        reacting = there(url, 3, specs=specs)
        remote.close()
        client.close()
    plain, scores = weighed(found)
    wanted, weights = weighed(expected)
    same(plain, wanted)
    assert scores == pytest.approx(weights, abs=1e-4)
    assert len(scores) > len(AGENTS) * sum(episode.steps for episode in found)
    assert _actions(found) != _actions(reacting)


def test_a_session_talks_in_vectors(checkpoint: Path) -> None:
    settings = AgentSettings(codec={"type": "latent", **VECTORS})  # type: ignore[arg-type]

    def talking() -> TransformersModel:
        model = load(checkpoint)
        for seed, name in enumerate(AGENTS):
            model.add_codec(name, LatentSettings(**VECTORS), seed)
        return model

    expected = here(team_on(talking(), settings), ChannelSettings(noise=0.2), 4)
    team = ServedTeam(
        shared(talking(), 4096), TASK, PARAMS, settings, {a: a for a in AGENTS}, ChannelSettings(noise=0.2)
    )
    with running(create_app(team)) as url:
        found = there(url, 4)
    same([_without_vectors(each) for each in found], [_without_vectors(each) for each in expected])
    heard = [_vectors(each) for each in found]
    assert sum(map(len, heard)) > 0
    for mine, theirs in zip(heard, map(_vectors, expected), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_messages_go_to_the_nearest(tmp_path: Path) -> None:
    params = {**PARAMS, "agents": 3}
    env = make_env(TASK, params, 0)
    words = starter_words(env.words, env.language, env.agents)  # type: ignore[attr-defined]
    folder = build_starter(words, tmp_path / "three", seed=3, settings=SHAPE)
    channel = ChannelSettings(topology={"type": "nearest", "k": 1})  # type: ignore[arg-type]
    specs = [replace(spec, params=params) for spec in SPECS]
    assignment = {agent: agent for agent in env.agents}
    local = GenerativeTeam(load(folder, env.agents), env.language, AgentSettings(), assignment)
    expected = here(local, channel, 2, specs)
    team = ServedTeam(shared(load(folder, env.agents), 4096), TASK, params, AgentSettings(), assignment, channel)
    with running(create_app(team)) as url:
        same(there(url, 2, specs=specs), expected)
    everybody = here(local, ChannelSettings(), 2, specs)
    assert _inboxes(expected) < _inboxes(everybody), "only the nearest hears"


def _seed(seed: int) -> int:
    """Of a rollout, as `preconcert eval` has it."""
    return derive_seed(seed, "eval")


def _actions(episodes: Sequence[Episode]) -> list[list[str]]:
    return [[turn.action for mine in each.trajectories.values() for turn in mine.turns] for each in episodes]


def _changed(episode: Episode, message: Callable[[Message], Message]) -> Episode:
    """The episode with every message that was sent or heard as a function has it."""
    return replace(
        episode,
        trajectories={
            agent: replace(
                mine,
                turns=tuple(
                    replace(
                        turn,
                        message=None if turn.message is None else message(turn.message),
                        inbox=tuple(message(held) for held in turn.inbox),
                    )
                    for turn in mine.turns
                ),
            )
            for agent, mine in episode.trajectories.items()
        },
    )


def _without_vectors(episode: Episode) -> Episode:
    return _changed(episode, lambda message: replace(message, latent=None, payload=""))


def _vectors(episode: Episode) -> list[float]:
    """Every number that was heard."""
    return [
        number
        for mine in episode.trajectories.values()
        for turn in mine.turns
        for message in turn.inbox
        if message.latent is not None
        for vector in message.latent.values
        for number in vector
    ]


def _inboxes(episodes: Sequence[Episode]) -> int:
    return sum(len(turn.inbox) for each in episodes for mine in each.trajectories.values() for turn in mine.turns)
