"""Messages are reinforced with what they were worth: which tokens, by how much, and only after the check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from preconcert.agents import ChannelSettings, GenerativeTeam
from preconcert.core import ConfigError, SpanKind, TrainingError
from preconcert.training.message_credit import CHECK, MessageCredit, MessageCreditSettings, passed
from preconcert.training.message_value import AblationCheck, Heard
from preconcert.training.recipe import Recipe
from preconcert.training.rows import KINDS, Row
from preconcert.training.run import make_message_credit, train
from preconcert.world_models import OracleValue, OracleWorldModel
from tests.training.teams import (
    AGENTS,
    PARAMS,
    TASK,
    load,
    play,
    recipe_of,
    rows_of,
    starter_checkpoint,
    team_on,
)
from tests.training.test_imagination import Breaker, Interrupted
from tests.training.test_message_value import Obedient

SAY = KINDS.index(SpanKind.SAY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return starter_checkpoint(tmp_path_factory.mktemp("credit") / "starter")


class Fancier(MessageCredit):
    """Thinks that whatever names the first landmark is worth 1, and all else nothing."""

    def _imagined(self, messages: Sequence[Heard], seed: int, extra: int = 1) -> list[float]:
        return [float(each.message.payload.split()[0] == "a") for each in messages]


def credit_of(team: GenerativeTeam, kind: type[MessageCredit] = MessageCredit, **settings: Any) -> MessageCredit:
    asked = MessageCreditSettings.model_validate({"model": "oracle", **settings})
    return kind(asked, team, OracleWorldModel(team, OracleValue.ROLLOUT), AGENTS, 3)


def added(before: Sequence[Row], after: Sequence[Row]) -> list[np.ndarray[Any, Any]]:
    """What was put on top of each row's advantages; everything else is as it was."""
    for one, other in zip(before, after, strict=True):
        for name in ("policy", "targets", "logprobs", "allowed", "joint", "kinds"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert replace(one, advantages=other.advantages).completion_ids == other.completion_ids
    return [other.advantages - one.advantages for one, other in zip(before, after, strict=True)]


def test_the_words_of_a_message_get_what_it_was_worth(folder: Path) -> None:
    """By hand: value less its mean in the group at the same agent and turn, over the root mean square of those."""
    team = team_on(load(folder))
    episodes = play(team, seeds=3, group=4)
    rows, _ = rows_of(team, episodes, lambda _: 0.25)
    after, metrics = credit_of(team, Fancier, weight=0.7).paid(rows, episodes, 0)
    more = added(rows, after)
    worth: dict[tuple[str, str, int], list[float]] = {}
    places: dict[tuple[int, str, int], float] = {}
    for position, game in enumerate(episodes):
        for agent, mine in game.trajectories.items():
            other = next(each for each in AGENTS if each != agent)
            told = [turn.inbox for turn in game.trajectories[other].turns]
            for index, turn in enumerate(mine.turns):
                assert turn.message is not None
                inbox = told[index + 1] if index + 1 < len(told) else ()
                before = told[index] if index else ()
                new = bool(inbox) and [mail.payload for mail in inbox] != [mail.payload for mail in before]
                value = float(new and turn.message.payload.split()[0] == "a")
                worth.setdefault((game.group, agent, index), []).append(value)
                places[position, agent, index] = value
    centred = {
        (position, agent, index): value - float(np.mean(worth[episodes[position].group, agent, index]))
        for (position, agent, index), value in places.items()
    }
    size = float(np.sqrt(np.mean(np.square(list(centred.values())))))
    assert metrics["message_value/spread"] == pytest.approx(size)
    assert size > 0
    starts = np.cumsum([0, *(game.steps for game in episodes)])
    seen = 0
    for row, extra in zip(rows, more, strict=True):
        for joint in np.unique(row.joint[row.joint >= 0]).tolist():
            position = int(np.searchsorted(starts, joint, side="right")) - 1
            wanted = 0.7 * centred[position, row.agent, joint - int(starts[position])] / size
            mine = row.joint == joint
            said = mine & (row.kinds == SAY) & row.policy
            assert extra[said] == pytest.approx(wanted, abs=1e-5)
            assert not extra[mine & ~said].any()
            seen += int(said.any() and abs(wanted) > 1e-6)
    assert seen > 5


def test_only_chosen_instances_are_valued(folder: Path) -> None:
    team = team_on(load(folder))
    episodes = play(team, seeds=4, group=3)
    rows, _ = rows_of(team, episodes, lambda _: 0.0)
    credit = credit_of(team, Fancier, instances=1)
    after, metrics = credit.paid(rows, episodes, 0)
    [chosen] = {episodes[place].group for place in credit._chosen(episodes, 0)}
    touched = [row.name for row, extra in zip(rows, added(rows, after), strict=True) if extra.any()]
    assert touched
    assert all(name.startswith(f"{chosen}:") for name in touched)
    assert len({episode.group for episode in episodes}) == 4
    everything = credit_of(team, Fancier).paid(rows, episodes, 0)[1]
    assert metrics["message_value/messages"] < everything["message_value/messages"]
    assert len({tuple(credit._chosen(episodes, iteration)) for iteration in range(12)}) > 1


def test_equal_values_add_exactly_nothing(folder: Path) -> None:
    class Indifferent(MessageCredit):
        def _imagined(self, messages: Sequence[Heard], seed: int, extra: int = 1) -> list[float]:
            return [0.0] * len(messages)

    team = team_on(load(folder))
    episodes = play(team, seeds=2, group=3)
    rows, _ = rows_of(team, episodes, lambda _: 0.5)
    after, _ = credit_of(team, Indifferent).paid(rows, episodes, 0)
    assert not any(extra.any() for extra in added(rows, after))


def test_values_come_from_the_model(folder: Path) -> None:
    """Where receivers do as they are told, the oracle's values pay some words and charge others, the same each time."""
    plain = team_on(load(folder))
    team = Obedient(plain.model, plain.language, plain.settings, plain.assignment)
    episodes = play(team, seeds=4, group=4)
    rows, _ = rows_of(plain, episodes, lambda _: 0.0)
    found = [credit_of(team, samples=4).paid(rows, episodes, 0) for _ in range(2)]
    first, second = (added(rows, after) for after, _ in found)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert any((extra > 0).any() for extra in first)
    assert any((extra < 0).any() for extra in first)


def test_values_that_fail_the_check_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    plain = team_on(load(folder))
    team = Obedient(plain.model, plain.language, plain.settings, plain.assignment)
    # So few games leave much to chance: what passes and what fails are far apart, and the threshold lies between.
    few = {"check_messages": 24, "check_samples": 12, "threshold": 0.3}
    settings = {"samples": 2, "lam": 1.0, "horizon": PARAMS["horizon"], **few}

    class Contrary(MessageCredit):
        def _imagined(self, messages: Sequence[Heard], seed: int, extra: int = 1) -> list[float]:
            return [-value for value in super()._imagined(messages, seed, extra)]

    file = tmp_path / CHECK
    assert not passed(file)
    with pytest.raises(TrainingError, match="are not to be trained on"):
        credit_of(team, Contrary, **settings).check(TASK, PARAMS, ChannelSettings(), file)
    assert json.loads(file.read_text())["passed"] is False
    assert not passed(file)
    found = credit_of(team, **settings).check(TASK, PARAMS, ChannelSettings(), file)
    assert found.passed
    assert passed(file)


def test_a_run_checks_once_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself cannot be passed by a team that never succeeds; that it is asked for is what counts here."""
    asked: list[Path] = []

    def check(self: MessageCredit, task: str, params: Any, channel: Any, file: Path) -> AblationCheck:
        asked.append(file.parent)
        file.write_text(json.dumps({"passed": True}))
        return AblationCheck((0.0, 1.0), (0.0, 1.0), 1.0, 1.0)

    monkeypatch.setattr(MessageCredit, "check", check)
    recipe = recipe_of(
        iterations=3, checkpoint_every=1, lr=0.02, message_credit={"model": "oracle", "samples": 1, "horizon": 1}
    )
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "broken", reporter=Breaker(2))
    broken = train(recipe, tmp_path / "broken", resume=True)
    assert asked == [whole, broken]
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(line["message_value/messages"] > 0 for line in lines)
    for name in AGENTS:
        mine = load_file(whole / "adapters" / name / "adapter_model.safetensors")
        theirs = load_file(broken / "adapters" / name / "adapter_model.safetensors")
        assert all(bool((mine[key] == theirs[key]).all()) for key in mine)


def test_a_world_model_is_needed(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(message_credit={})
    with pytest.raises(ConfigError, match="no world_model section"):
        make_message_credit(recipe, team_on(load(folder)), AGENTS, None)
    with pytest.raises(ConfigError, match="no world_model section"):
        train(recipe, tmp_path / "run")
    assert make_message_credit(recipe_of(), team_on(load(folder)), AGENTS, None) is None


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({"agent": {"codec": "raw-state"}}, "codec=raw-state has none"),
        ({"agent": {"spans": {"say": False}}}, "needs agent.spans.say"),
        ({"agent": {"context": "transcript"}}, "agent.context=transcript cannot"),
        ({"channel": {"mode": "off"}}, "nobody hears"),
        ({"grpo": {"credit": "agent-turn", "message_credit": {}}}, "whole games"),
        ({"update": {"ratio": "turn"}}, "update.ratio=token"),
    ],
)
def test_what_does_not_fit_is_refused(rest: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Recipe.model_validate({"task": "rendezvous", "grpo": {"message_credit": {}}, **rest})
