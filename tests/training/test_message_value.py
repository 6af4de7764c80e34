"""What a message is worth: the same luck in both arms, the real ablation, and a check that refuses what fails it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preconcert.agents import Context, GenerativeTeam
from preconcert.core import TrainingError, Turn, TurnRequest
from preconcert.training.message_value import (
    check_values,
    heard,
    imagined_values,
    rank_correlation,
    real_values,
)
from preconcert.world_models import OracleWorldModel
from tests.training.episodes import episode, message, turn
from tests.training.teams import AGENTS, PARAMS, load, play, settings_of, starter_checkpoint, team_on


class Obedient(GenerativeTeam):
    """Does what the last words it heard say, whatever the model would have done: messages then matter a lot."""

    def _write(self, requests: Sequence[TurnRequest], *args: object, **options: object) -> list[tuple[Turn, object]]:
        answers = super()._write(requests, *args, **options)  # type: ignore[arg-type]
        obeyed = []
        for request, (written, memory) in zip(requests, answers, strict=True):
            told = request.inbox[-1].payload.split()[-1] if request.inbox else "stay"
            obeyed.append((replace(written, action=told), replace(memory, actions=(*memory.actions[:-1], told))))
        return obeyed  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return starter_checkpoint(tmp_path_factory.mktemp("value") / "starter")


def obedient(folder: Path) -> GenerativeTeam:
    team = team_on(load(folder))
    return Obedient(team.model, team.language, team.settings, team.assignment)


# ---- what is heard


def test_a_message_counts_where_it_first_says_something_else() -> None:
    first, again, other = (
        message("x", step, ("y",), payload=words) for step, words in enumerate(("a stay", "a stay", "b stay"))
    )
    third = message("z", 1, ("y",), payload="a stay")
    inboxes = ((), (first,), (again, third), (third, other))
    game = episode({"y": [turn("y", step, inbox=inbox) for step, inbox in enumerate(inboxes)]})
    found = heard([game])
    assert [(each.moment.index, each.message, each.without) for each in found] == [
        (1, first, ()), (2, third, (again,)), (3, other, (again, third)),
    ]  # fmt: skip
    assert [each.turn for each in found] == [game.trajectories["y"].turns[index] for index in (1, 2, 3)]
    some = heard([game], limit=2, seed=5)
    assert len(some) == 2
    assert some == heard([game], limit=2, seed=5)
    assert all(each in found for each in some)


# ---- values


def test_a_message_that_changes_nothing_is_worth_exactly_nothing(folder: Path) -> None:
    """The same words withheld and delivered: both arms have the same luck."""
    team = team_on(load(folder))
    said = [replace(each, without=each.turn.inbox) for each in heard(play(team, seeds=3, group=1))]
    assert said
    assert imagined_values(team, OracleWorldModel(team), said, 3, 4, 0, oracle=True) == [0.0] * len(said)
    assert not real_values(team, said, 3, 0).any()
    assert not team._memories


def test_the_oracle_agrees_with_the_real_ablation(folder: Path) -> None:
    """Rewards are where the last step ends, and where that is, the words say: withholding them is felt."""
    team = obedient(folder)
    said = heard(play(team, seeds=6, group=1), limit=10)
    values = imagined_values(team, OracleWorldModel(team), said, 12, PARAMS["horizon"], 1, oracle=True)
    found = check_values(lambda messages: values, team, said, 12, 2)
    assert any(found.real)
    assert found.correlation is not None
    assert found.passed
    found.require()
    # The same values with the wrong sign do not pass.
    worse = replace(found, correlation=rank_correlation([-value for value in values], found.real))
    with pytest.raises(TrainingError, match=r"rank correlation with the real ablation is -.*0\.6 is needed"):
        worse.require()


def test_values_are_reproducible_and_leave_the_team_as_it_was(folder: Path) -> None:
    team = obedient(folder)
    said = heard(play(team, seeds=2, group=1))[:4]
    oracle = OracleWorldModel(team)
    one, other = (imagined_values(team, oracle, said, 3, 3, 4, oracle=True) for _ in range(2))
    assert one == other
    assert np.array_equal(real_values(team, said, 2, 5), real_values(team, said, 2, 5))
    # Each message's real value is its own, whatever else is asked.
    assert np.array_equal(real_values(team, said, 2, 5)[1:3], real_values(team, said[1:3], 2, 5))
    assert not team._memories


def test_the_arms_differ_by_the_message_alone(folder: Path) -> None:
    """Seen at the first turn of each arm: the receiver's inbox, and nobody else's."""
    asked: list[TurnRequest] = []

    class Listening(Obedient):
        def _write(self, requests: Sequence[TurnRequest], *args: object, **options: object) -> list:
            asked.extend(requests)
            return super()._write(requests, *args, **options)

    plain = team_on(load(folder))
    team = Listening(plain.model, plain.language, plain.settings, plain.assignment)
    [said] = heard(play(plain, seeds=1, group=1))[:1]
    real_values(team, [said], 1, 0)
    first = {each.observation.step for each in asked}
    begun = [each for each in asked if each.observation.step == min(first)]
    assert len(begun) == 2 * len(AGENTS)
    for agent in AGENTS:
        with_it, without = (each for each in begun if each.agent == agent)
        assert (with_it.observation, with_it.seed) == (without.observation, without.seed)
        words = [[mail.payload for mail in each.inbox] for each in (with_it, without)]
        if agent == said.moment.agent:
            assert words == [[mail.payload for mail in said.turn.inbox], [mail.payload for mail in said.without]]
            assert words[0] != words[1]
        else:
            assert words[0] == words[1]


def test_transcripts_cannot_be_taken_back(folder: Path) -> None:
    model = load(folder)
    said = heard(play(team_on(model), seeds=1, group=1))[:1]
    with pytest.raises(TrainingError, match=r"agent\.context=turn"):
        real_values(team_on(model, settings_of(Context.TRANSCRIPT)), said, 1, 0)


# ---- the check


def test_too_little_is_no_check(folder: Path) -> None:
    team = team_on(load(folder))
    said = heard(play(team, seeds=2, group=1))
    with pytest.raises(TrainingError, match="2 messages with 4 samples"):
        check_values(lambda messages: [0.0] * len(messages), team, said[:2], 4, 0)
    with pytest.raises(TrainingError, match="1 values were imagined for 3 messages"):
        check_values(lambda messages: [0.0], team, said[:3], 2, 0)


def test_values_that_never_vary_do_not_pass(folder: Path) -> None:
    team = team_on(load(folder))
    said = heard(play(team, seeds=2, group=1))[:3]
    found = check_values(lambda messages: [0.0] * len(messages), team, said, 2, 0)
    assert found.correlation is None
    with pytest.raises(TrainingError, match="is not defined"):
        found.require()


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ((1, 2, 3), (10, 20, 90), 1.0),
        ((1, 2, 3), (3, 2, 1), -1.0),
        ((1, 2, 2, 3), (1, 2, 2, 3), 1.0),
        ((1, 2, 3, 4), (1, 1, 2, 2), 2 / 5**0.5),
        ((1, 1, 1), (1, 2, 3), None),
    ],
)
def test_ranks(one: Sequence[float], other: Sequence[float], wanted: float | None) -> None:
    found = rank_correlation(one, other)
    assert found == (None if wanted is None else pytest.approx(wanted))


def test_ranks_need_pairs() -> None:
    with pytest.raises(TrainingError, match="3 values cannot be ranked against 2"):
        rank_correlation((1, 2, 3), (1, 2))
