"""Hindsight: content from what really happened, and targets on exactly the words that foretell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from preconcert.agents import AgentSettings
from preconcert.core import ConfigError, Slot, SpanKind, TaskLanguage, Truth
from preconcert.models import TransformersModel
from preconcert.prompts import END_OF_PLAY, SpanSettings, TurnContent
from preconcert.training.hindsight import hindsight_content, reward_word
from preconcert.training.warm_start import supervised_examples
from tests.training.episodes import ACTIONS, episode, message, observation, turn
from tests.training.teams import load, play, rows_of, settings_of, team_on

LANGUAGE = TaskLanguage(
    actions=ACTIONS,
    message=(Slot("what", ("a", "b", "none")), Slot("next", ACTIONS, Truth.OWN_NEXT_ACTION)),
    forecast=(Slot("row", ("0", "1", "2")), Slot("col", ("0", "1"))),
    rewards=("0", "1"),
)
PLAYED = episode(
    {
        "left": [
            turn("left", 0, "north", message=message("left", 0, ["right"], payload="b stay")),
            turn("left", 1, "south", reward=1.0),
        ],
        "right": [turn("right", 0, "stay"), turn("right", 1, "north")],
    }
)


def test_content_is_what_came_next() -> None:
    content = hindsight_content(PLAYED, "left", 0, LANGUAGE, SpanSettings(intend_steps=3))
    assert content.action == "north"
    assert content.intentions == {"right": ("stay", "north", END_OF_PLAY)}
    after = observation("left", 1).fields
    assert content.forecast == (after["row"], after["col"])
    assert (content.reward, content.done) == ("0", "no")
    assert content.message == ("b", "south"), "what was said stays, the announced action is the real one"


def test_the_last_turn_ends_the_play() -> None:
    content = hindsight_content(PLAYED, "left", 1, LANGUAGE, SpanSettings(intend_steps=2))
    assert content.intentions == {"right": ("north", END_OF_PLAY)}
    after = PLAYED.trajectories["left"].final_observation.fields
    assert content.forecast == (after["row"], after["col"])
    assert (content.reward, content.done) == ("1", "yes")
    assert content.message == ("none", "stay"), "the filler of a turn without a message"


def test_only_the_parts_that_are_on_are_filled() -> None:
    content = hindsight_content(PLAYED, "left", 0, LANGUAGE, SpanSettings(intend=False, foresee=False, say=False))
    assert content == TurnContent("north")


def test_a_reward_without_a_word_is_an_error() -> None:
    assert reward_word(1.0, LANGUAGE) == "1"
    with pytest.raises(ConfigError, match=r"0\.5.*0, 1"):
        reward_word(0.5, LANGUAGE)


def test_targets_are_the_truth_in_prediction_spans_only(starter: TransformersModel) -> None:
    team = team_on(starter)
    episodes = play(team)
    rows, _ = rows_of(team, episodes, lambda number: 0.0, hindsight=True)
    turns = [(e, a, i) for e in episodes for a, t in e.trajectories.items() for i in range(len(t.turns))]
    found: set[tuple[SpanKind, str]] = set()
    for row, (played, agent, index) in zip(rows, turns, strict=True):
        mine = played.trajectories[agent].turns
        others = tuple(other for other in played.trajectories if other != agent)
        content = hindsight_content(played, agent, index, team.language, team.settings.spans)
        true = team.format.write(content, others, mine[index].observation.legal_actions)
        expected = np.full(len(row.completion_ids), -1)
        for span in mine[index].spans:
            announced = span.slot == "next" and index + 1 < len(mine)
            if span.kind in (SpanKind.INTEND, SpanKind.FORESEE) or announced:
                expected[span.start] = true.ids[span.start]
                found.add((span.kind, span.slot))
        act = mine[index].spans[-1]
        assert act.kind is SpanKind.ACT
        # An action may be bound to a forecast that came true; nothing else outside predictions has a target.
        assert row.targets[act.start] in (-1, row.completion_ids[act.start])
        expected[act.start] = row.targets[act.start]
        assert (row.targets == expected).all()
    assert {slot for _, slot in found} == {"agent_0", "agent_1", "row", "col", "reward", "done", "next"}


def test_words_of_several_tokens_have_targets_up_to_where_they_part(checkpoint: Callable[[str], Path]) -> None:
    """With the labelled spelling, `south;` and `stay;` begin alike; what the grammar forces is nobody's choice."""
    model = load(checkpoint("qwen3"))
    team = team_on(model, AgentSettings(max_tokens=400))
    episodes = play(team)
    turns = [(e, a, i) for e in episodes for a, t in e.trajectories.items() for i in range(len(t.turns))]
    rows, _ = rows_of(team, episodes, lambda number: 0.0, hindsight=True)
    targets = forced = 0
    for row, (played, agent, index) in zip(rows, turns, strict=True):
        turn = played.trajectories[agent].turns[index]
        assert not turn.malformed
        known = row.targets >= 0
        assert not known[~np.array(turn.sampled)].any()
        for span in turn.spans:
            places = [t for t in range(span.start, span.end) if known[t]]
            wrong = [t for t in places if row.targets[t] != turn.completion_ids[t]]
            assert wrong in ([], places[-1:]), "a target after the word had already gone wrong"
            targets += len(places)
            forced += sum(not free for free in turn.sampled[span.start : span.end])
    assert targets > len(rows)
    assert forced > 0


def test_no_hindsight_means_no_target(starter: TransformersModel) -> None:
    team = team_on(starter)
    rows, _ = rows_of(team, play(team))
    assert all((row.targets == -1).all() for row in rows)


def test_malformed_turns_have_no_target(starter: TransformersModel) -> None:
    team = team_on(starter, settings_of(constrained=False))
    episodes = play(team)
    assert all(turn.malformed for e in episodes for t in e.trajectories.values() for turn in t.turns)
    rows, _ = rows_of(team, episodes, hindsight=True)
    assert all((row.targets == -1).all() for row in rows)
    assert all(row.policy.all() for row in rows), "a malformed turn was sampled all the same"


def test_supervised_examples_carry_loss_on_the_turn_alone(starter: TransformersModel) -> None:
    team = team_on(starter)
    episodes = play(team)
    examples = supervised_examples(episodes, team.format, team.settings)
    turns = [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]
    assert len(examples) == len(turns)
    for example, one in zip(examples, turns, strict=True):
        n = len(one.prompt_ids)
        assert tuple(example["input_ids"][:n]) == one.prompt_ids
        assert example["labels"][:n] == [-100] * n
        # Tokens that the grammar forces may go without loss; every other is its own label.
        pairs = zip(example["labels"][n:], example["input_ids"][n:], strict=True)
        assert all(label in (-100, token) for label, token in pairs)
        assert any(label != -100 for label in example["labels"][n:])
