"""The generative team: what a turn records of what was sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from preconcert.agents import AgentSettings, Context, GenerativeTeam
from preconcert.core import Episode, SpanKind, Turn, UnknownNameError
from preconcert.envs import make_env
from preconcert.models import ScoreRequest, TransformersModel
from preconcert.prompts import SpanSettings
from tests.training.teams import AGENTS, PARAMS, TASK, load, play, settings_of, starter_checkpoint, team_on


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TransformersModel:
    return load(starter_checkpoint(tmp_path_factory.mktemp("team") / "starter"))


def turns_of(episodes: Sequence[Episode]) -> list[Turn]:
    return [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]


def test_bits_are_those_of_the_words_said(model: TransformersModel) -> None:
    team = team_on(model)
    for turn in turns_of(play(team)):
        assert turn.message is not None
        said = [span for span in turn.spans if span.kind is SpanKind.SAY]
        places = [t for span in said for t in range(span.start, span.end)]
        words = " ".join(team.format.text([turn.completion_ids[t]]) for t in places)
        assert turn.message.payload == words
        assert turn.message.tokens == len(places) == 2
        automaton = team.format.automaton([a for a in AGENTS if a != turn.agent], turn.observation.legal_actions)
        request = ScoreRequest(turn.prompt_ids, turn.completion_ids, turn.adapter, automaton)
        (scores,) = model.score([request])
        assert turn.message.bits == pytest.approx(-sum(scores[t] for t in places) / math.log(2), abs=1e-4)
        assert turn.message.bits > 0


def test_intentions_carry_their_probability_and_turns_their_adapter(model: TransformersModel) -> None:
    for turn in turns_of(play(team_on(model))):
        assert turn.adapter == turn.agent
        (intention,) = turn.intentions
        (span,) = (span for span in turn.spans if span.kind is SpanKind.INTEND)
        assert intention.about == span.slot != turn.agent
        assert intention.probability == pytest.approx(math.exp(turn.logprobs[span.start]))
        assert turn.forecast is not None
        assert set(turn.forecast.fields) == {"row", "col"}
        assert not turn.malformed


def test_a_turn_that_does_not_parse_is_counted_and_falls_back(model: TransformersModel) -> None:
    for turn in turns_of(play(team_on(model, settings_of(constrained=False)))):
        assert turn.malformed
        assert turn.action == make_env(TASK, PARAMS, 0).language.default_action == "stay"
        assert (turn.intentions, turn.forecast, turn.message, turn.spans) == ((), None, None, ())
        assert turn.completion_ids
        assert len(turn.completion_ids) == len(turn.logprobs) == len(turn.sampled)
        assert all(turn.sampled)


def test_spans_that_are_off_are_not_written(model: TransformersModel) -> None:
    team = team_on(model, AgentSettings(spans=SpanSettings(intend=False, foresee=False, say=False)))
    for turn in turns_of(play(team)):
        assert [span.kind for span in turn.spans] == [SpanKind.ACT]
        assert (turn.intentions, turn.forecast, turn.message) == ((), None, None)


def test_memory_shows_the_agents_own_last_actions(model: TransformersModel) -> None:
    team = team_on(model, AgentSettings(memory=2))
    for episode in play(team):
        for trajectory in episode.trajectories.values():
            for step, turn in enumerate(trajectory.turns):
                words = model.tokenizer.decode(turn.prompt_ids).split()
                shown = words[words.index("<did>") + 1 :][:2]
                done = [earlier.action for earlier in trajectory.turns[:step]]
                assert shown == (["quiet", "quiet", *done])[-2:]


def test_temperature_zero_repeats_itself(model: TransformersModel) -> None:
    team = team_on(model, temperature=0.0)
    one, other = play(team, seed=1), play(team, seed=2)
    assert [t.completion_ids for t in turns_of(one)] == [t.completion_ids for t in turns_of(other)]


def test_agents_can_share_an_adapter_and_unknown_names_are_errors(model: TransformersModel) -> None:
    env = make_env(TASK, PARAMS, 0)
    shared = GenerativeTeam(model, env.language, AgentSettings(), dict.fromkeys(AGENTS, AGENTS[1]))
    assert {turn.adapter for turn in turns_of(play(shared))} == {AGENTS[1]}
    base = GenerativeTeam(model, env.language, AgentSettings(), dict.fromkeys(AGENTS))
    assert {turn.adapter for turn in turns_of(play(base))} == {None}
    with pytest.raises(UnknownNameError, match="agent_1"):
        GenerativeTeam(model, env.language, AgentSettings(), {AGENTS[0]: "agent_11"})
    alone = GenerativeTeam(model, env.language, AgentSettings(), {AGENTS[0]: None})
    with pytest.raises(UnknownNameError, match="agent_1"):
        play(alone)


@pytest.mark.parametrize("context", Context)
def test_nothing_is_held_after_the_end(model: TransformersModel, context: Context, tmp_path: Path) -> None:
    team = team_on(model, settings_of(context))
    play(team)
    assert not team._memories
    assert not model._sessions._held


def test_a_transcript_needs_no_memory() -> None:
    with pytest.raises(ValidationError, match="memory=2 is for context=turn"):
        AgentSettings(context="transcript", memory=2)  # type: ignore[arg-type]
