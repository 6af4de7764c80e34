"""A session over HTTP decides what a rollout in this process decides, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from preconcert.agents import AgentSettings, ChannelSettings, Context
from preconcert.core import Episode, derive_seed
from preconcert.models import TransformersModel
from preconcert.serving.app import create_app
from preconcert.serving.client import RemoteTeam, ServiceClient
from preconcert.serving.team import ServedTeam
from preconcert.training.rollout import EpisodeSpec, Policies, rollout
from tests.serving.conftest import running
from tests.training.teams import AGENTS, PARAMS, TASK, team_on

SPECS = [EpisodeSpec(TASK, PARAMS, seed, "heldout") for seed in (1, 2, 3, 17, 2**31)]


def same(one: Sequence[Episode], other: Sequence[Episode]) -> None:
    """Equal records, but for the arithmetic of different batches."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        for agent, trajectory in mine.trajectories.items():
            for turn, there in zip(trajectory.turns, theirs.trajectories[agent].turns, strict=True):
                assert turn.logprobs == pytest.approx(there.logprobs, abs=1e-4)
                assert (turn.message is None) == (there.message is None)
                if turn.message is not None and there.message is not None:
                    assert turn.message.payload == there.message.payload
        assert _rounded(mine) == _rounded(theirs)


def _rounded(episode: Episode) -> Episode:
    def message(found):  # type: ignore[no-untyped-def]
        return None if found is None else replace(found, bits=round(found.bits, 3))

    return replace(
        episode,
        trajectories={
            agent: replace(
                each,
                turns=tuple(
                    replace(
                        turn,
                        logprobs=(),
                        message=message(turn.message),
                        inbox=tuple(message(mail) for mail in turn.inbox),
                        intentions=tuple(replace(i, probability=round(i.probability, 4)) for i in turn.intentions),
                    )
                    for turn in each.turns
                ),
            )
            for agent, each in episode.trajectories.items()
        },
    )


def here(
    team: Policies, channel: ChannelSettings, seed: int, specs: Sequence[EpisodeSpec] = SPECS
) -> list[Episode]:
    """As `preconcert eval` plays."""
    return rollout(specs, team, channel, derive_seed(seed, "eval"))


def there(url: str, seed: int, greedy: bool = False, specs: Sequence[EpisodeSpec] = SPECS) -> list[Episode]:
    client = ServiceClient(url)
    team = RemoteTeam(client, specs, seed, greedy)
    try:
        return rollout(specs, team, team.channel, derive_seed(seed, "eval"))
    finally:
        team.close()
        client.close()


@pytest.mark.parametrize("greedy", [False, True])
def test_a_session_plays_what_a_rollout_plays(url: str, model: TransformersModel, greedy: bool) -> None:
    for seed in (0, 7):
        team = team_on(model, temperature=0.0 if greedy else 1.0)
        same(there(url, seed, greedy), here(team, ChannelSettings(), seed))


def test_seeds_matter(url: str) -> None:
    assert there(url, 0) != there(url, 1)


@pytest.mark.parametrize(
    ("settings", "channel"),
    [
        (AgentSettings(context=Context.TRANSCRIPT), ChannelSettings()),
        (AgentSettings(memory=2), ChannelSettings(drop=0.4, delay=1)),
        (AgentSettings(), ChannelSettings(substitute=0.3, cap_bits=3.0)),
    ],
    ids=["transcript", "drop-delay", "noise-cap"],
)
def test_contexts_and_channels(
    served: Callable[..., ServedTeam],
    model: TransformersModel,
    settings: AgentSettings,
    channel: ChannelSettings,
) -> None:
    with running(create_app(served(settings, channel=channel))) as url:
        same(there(url, 3), here(team_on(model, settings), channel, 3))


def test_the_services_own_world_is_the_same_one(url: str, model: TransformersModel) -> None:
    (expected,) = here(team_on(model), ChannelSettings(), 5, SPECS[:1])
    client = ServiceClient(url)
    session = client.post("/v1/sessions", {"task": TASK, "instance": SPECS[0].seed, "seed": 5})
    for step in range(expected.steps):
        answer = client.post(f"/v1/sessions/{session['id']}/step", {"step": step})
        for turn in answer["turns"]:
            wanted = expected.trajectories[turn["agent"]].turns[step]
            assert turn["action"] == wanted.action
            assert tuple(turn["token_ids"]) == wanted.completion_ids
            assert (turn["message"] or {}).get("payload") == (wanted.message.payload if wanted.message else None)
            assert answer["rewards"][turn["agent"]] == wanted.reward
        assert answer["state"] == expected.states[step + 1]
        assert answer["done"] == (step + 1 == expected.steps)
    assert answer["success"] == expected.success
    assert [turn["agent"] for turn in answer["turns"]] == list(AGENTS)


def test_sessions_on_one_seed_are_apart(url: str) -> None:
    """Two sessions of the same episode, interleaved: neither notices the other."""
    client = ServiceClient(url)
    names = [client.post("/v1/sessions", {"instance": 3, "seed": 4})["id"] for _ in range(2)]
    answers: dict[str, list[object]] = {name: [] for name in names}
    for step in range(2):
        for name in names:
            turns = client.post(f"/v1/sessions/{name}/step", {"step": step})["turns"]
            answers[name].append([(turn["token_ids"], turn["heard"]) for turn in turns])
    assert answers[names[0]] == answers[names[1]]
