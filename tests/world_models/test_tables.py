"""Copying and counting, on worlds small enough to count by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from preconcert.core import ConfigError, Episode, Move, Outcome, TaskLanguage, WorldModel
from preconcert.world_models.fidelity import Mode, measure_fidelity
from preconcert.world_models.tables import BackOff, CopyLast, CountTable
from tests.world_models.worlds import LANGUAGE, VIEW, cases, counted, language_of, played, request_of, seen

UP, ONE, NONE = ("up", "up"), ("up", "stay"), ("stay", "stay")
EPISODES = [
    counted([ONE, NONE, UP, ONE], ["red", "red", "red", "green", "green"], ["go", "wait", "go"]),
    counted([NONE, ONE, ONE], ["green", "green", "red", "red"], ["go", "go"]),
]
MODELS = {"copy": CopyLast, "count": CountTable}


def outcomes_of(episode: Episode, agent: str, step: int) -> Outcome:
    mine = episode.trajectories[agent]
    last = step + 1 == len(mine.turns)
    after = mine.final_observation if last else mine.turns[step + 1].observation
    others = {o: t.turns[step].action for o, t in episode.trajectories.items() if o != agent}
    return Outcome(after, others, mine.turns[step].reward, last)


@pytest.mark.parametrize("kind", MODELS)
def test_probabilities_of_all_views_sum_to_one(kind: str) -> None:
    model = MODELS[kind](EPISODES, LANGUAGE)
    assert isinstance(model, WorldModel)
    every = list(itertools.product(*(field.choices for field in VIEW.fields)))
    for step in range(3):
        [belief] = model.begin([request_of(EPISODES[0], "a", step)], [()])
        for action in ("up", "stay"):
            asked = [Outcome(seen("a", int(h), light, step + 1), {"b": "stay"}, 0.0, False) for h, light in every]
            judged = model.judge([belief] * len(asked), [Move(action, None, {"b": "stay"})] * len(asked), asked)
            assert sum(math.exp(-each.view_nll) for each in judged if each) == pytest.approx(1.0)
            first = judged[0]
            assert first is not None
            assert sum(first.others["b"].values()) == pytest.approx(1.0)
            assert set(first.others["b"]) == {"up", "stay"}


def test_copy_last_changes_nothing_but_the_step() -> None:
    model = CopyLast(EPISODES, LANGUAGE)
    request = request_of(EPISODES[0], "a", 1)
    [belief] = model.begin([request], [()])
    [step] = model.advance([belief], [Move("up")], [0])
    assert step.observation is not None
    assert step.observation.text == request.observation.text
    assert (step.observation.step, step.observation.fields, step.observation.legal_actions) == (
        2, {"height": "1"}, ("up", "stay"),
    )  # fmt: skip
    assert [message.payload for message in step.inbox] == ["go"]
    assert (step.reward, step.done, step.value, step.others) == (0.0, False, None, {"b": "stay"})
    [given] = model.advance([step.belief], [Move("up", None, {"b": "up"})], [0])
    assert given.others == {"b": "up"}
    [after] = model.advance([given.belief], [Move("up")], [0])
    assert after.others == {"b": "up"}  # as it did last


def test_back_off_mixes_by_witten_and_bell() -> None:
    table = BackOff()
    for outcome in "xxy":
        table.add((("fine", 1), "coarse"), outcome)
    table.add((("fine", 2), "coarse"), "z")
    coarse_x = (2 + 3 * 0.1) / (4 + 3)
    assert table.probability((("fine", 9), "coarse"), "x", 0.1) == pytest.approx(coarse_x)
    assert table.probability((("fine", 1), "coarse"), "x", 0.1) == pytest.approx((2 + 2 * coarse_x) / (3 + 2))
    assert table.probability((("fine", 9), "nowhere"), "x", 0.1) == 0.1
    assert table.best((("fine", 2), "coarse")) == "z"
    assert table.best((("fine", 9), "coarse")) == "x"
    assert table.best((("fine", 9), "nowhere")) is None
    rng = np.random.default_rng(0)
    drawn = Counter(table.draw((("fine", 1), "coarse"), rng) for _ in range(4000))
    assert drawn["x"] / 4000 == pytest.approx(table.probability((("fine", 1), "coarse"), "x", 0.0), abs=0.03)


def test_counting_knows_what_it_has_seen() -> None:
    model = CountTable(EPISODES, LANGUAGE, greedy=True)
    for episode in EPISODES:
        for t in range(episode.steps):
            [belief] = model.begin([request_of(episode, "a", t)], [()])
            turn, outcome = episode.trajectories["a"].turns[t], outcomes_of(episode, "a", t)
            [step] = model.advance([belief], [Move(turn.action, None, outcome.others)], [0])
            assert step.observation is not None
            assert step.observation.text == outcome.observation.text
            assert step.reward == outcome.reward
            assert step.done == outcome.done
            if outcome.done:
                assert step.value == 0.0
    assert model.setting.rewards == (0.0, 1.0)


def test_the_same_seed_gives_the_same_step_whatever_else_is_asked() -> None:
    model = CountTable(EPISODES, LANGUAGE)
    beliefs = model.begin([request_of(EPISODES[0], "a", 0)], [()]) * 40
    moves, seeds = [Move("up")] * 40, list(range(40))
    together: list[Any] = model.advance(beliefs, moves, seeds)
    alone = [model.advance([beliefs[0]], [moves[0]], [seed])[0] for seed in seeds]
    assert together == alone
    assert len({str(step.observation) + str(step.others) for step in together}) > 1


def test_on_a_real_task_counting_beats_copying() -> None:
    params = {"size": 3, "landmarks": 2, "horizon": 5}
    language = language_of("rendezvous", params)
    train, held = played("rendezvous", params, 150), played("rendezvous", params, 20, split="heldout")
    asked = cases(held, language, (1, 3), 2)
    copied = measure_fidelity(CopyLast(train, language), asked, Mode.GIVEN, (1, 3))
    counts = measure_fidelity(CountTable(train, language, greedy=True), asked, Mode.GIVEN, (1, 3))
    for h in (1, 3):
        assert (counts.figures[h]["mse"] or 0) < 0.7 * (copied.figures[h]["mse"] or 0)
        assert (counts.figures[h]["nll"] or 0) < (copied.figures[h]["nll"] or 0)
    assert counts.figures[1]["auroc"] == 1.0  # the view counts the steps that are left
    assert copied.figures[1]["auroc"] == 0.5


def test_a_task_without_a_view_is_refused() -> None:
    with pytest.raises(ConfigError, match="describes its views"):
        CopyLast(EPISODES, TaskLanguage(("up", "stay")))
    with pytest.raises(ConfigError, match="at least one episode"):
        CountTable([], LANGUAGE)
