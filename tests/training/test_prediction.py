"""Prediction rewards: what is paid, to which tokens, and that the task's part of the loss does not notice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from preconcert.agents import Context
from preconcert.core import Episode, Intention, Slot, Span, SpanKind, TaskLanguage, TrainingError, Truth
from preconcert.models import TransformersModel
from preconcert.prompts import END_OF_PLAY
from preconcert.training.credit import Guess, Kind, Outlook, TurnKey, guess_advantages, outlook_advantages
from preconcert.training.credit.prediction import PredictionSettings
from preconcert.training.prediction import foretold, pay, payments, predictability, prediction_metrics
from preconcert.training.recipe import Recipe
from preconcert.training.rows import KINDS, GrammarTable, Row
from preconcert.training.source import GameSource
from tests.training.episodes import episode, forecast, message, observation, turn
from tests.training.teams import (
    AGENTS,
    FixedSource,
    gradients_of,
    largest_difference,
    load,
    play,
    recipe_of,
    rows_of,
    settings_of,
    team_on,
    trainer_on,
)

TASK_SPANS = frozenset({SpanKind.SAY, SpanKind.ACT})
LANGUAGE = TaskLanguage(
    actions=("north", "south", "stay"),
    forecast=(Slot("row", ("0", "1", "2")), Slot("col", ("0", "1"))),
)


def guess(word: int, true: int, p: Sequence[float] | None, probability: float = 0.0, **changes: Any) -> Guess:
    """About one of several actions, numbered."""
    values: dict[str, Any] = {
        "key": TurnKey(0, "a", 0), "group": "g", "kind": Kind.ACTION, "about": "b", "ahead": 0, "start": 0,
        "end": 1,
        "probability": probability if p is None else p[word], "right": word == true,
        "true_probability": None if p is None else p[true], "square": None if p is None else sum(x * x for x in p),
    }  # fmt: skip
    return Guess(**{**values, **changes})


# ---- what is paid


@pytest.mark.parametrize("true", range(4))
def test_the_advantage_of_words_is_the_gradient_of_the_brier_score(true: int) -> None:
    logits = torch.tensor([0.3, -1.1, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    hit = torch.nn.functional.one_hot(torch.tensor(true), 4)
    score = 1 - 0.5 * ((p - hit) ** 2).sum()
    (wanted,) = torch.autograd.grad(score, logits, retain_graph=True)
    given = p.tolist()
    guesses = [guess(word, true, given) for word in range(4)]
    assert all(each.brier == pytest.approx(score.item()) for each in guesses)
    advantages = torch.from_numpy(guess_advantages(guesses))
    (found,) = torch.autograd.grad((p.detach() * advantages * p.log()).sum(), logits, retain_graph=True)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert float((p.detach() * advantages).sum()) == pytest.approx(0.0, abs=1e-12)
    # The score itself, as a reward to the word that was sampled, would teach nothing.
    (nothing,) = torch.autograd.grad((p.detach() * score.item() * p.log()).sum(), logits)
    assert float(nothing.abs().max()) < 1e-12


def test_without_the_distribution_the_score_is_right_on_average() -> None:
    p = (0.5, 0.3, 0.2)
    exact = guess(0, 1, p).brier
    assert exact == pytest.approx(1 - 0.5 * (0.25 + 0.49 + 0.04))
    assert sum(p[a] * guess(a, 1, None, p[a]).brier for a in range(3)) == pytest.approx(exact)


def test_without_the_distribution_guesses_are_compared_within_their_task_instance() -> None:
    same = [guess(0, 0, None, 0.4), guess(1, 0, None, 0.3), guess(1, 0, None, 0.3)]
    other = [guess(0, 0, None, 0.4, group="h"), guess(0, 0, None, 0.9, ahead=1), guess(0, 0, None, 0.9, about="c")]
    found = guess_advantages([*same, *other])
    assert found[:3] == pytest.approx(np.array([0.6, -0.3, -0.3]) - 0.0)
    assert not found[3:].any()  # nothing to compare them with
    assert guess_advantages([]).shape == (0,)


def test_forecasts_that_come_true_are_as_good_as_each_other() -> None:
    keys = [TurnKey(sample, "a", 0) for sample in range(3)]
    equal = [Outlook(key, "g", ((0, 1),), 1.0) for key in keys]
    assert not outlook_advantages(equal).any()
    assert outlook_advantages([*equal[:2], replace(equal[2], share=0.4)]) == pytest.approx([0.2, 0.2, -0.4])


def test_weights_move_evenly() -> None:
    settings = PredictionSettings(action=2.0, announcement=1.0, observation=0.5, end=0.0)
    assert [settings.weights(done) for done in (0.0, 0.5, 1.0)] == [(2.0, 1.0, 0.5), (1.0, 0.5, 0.25), (0.0, 0.0, 0.0)]
    assert PredictionSettings().weights(1.0) == PredictionSettings().weights(0.0) == (0.3, 0.3, 0.0)


# ---- what was foretold


def test_foretold_actions_are_held_against_those_that_followed() -> None:
    spans = (
        Span(SpanKind.INTEND, 0, 1, "b"), Span(SpanKind.INTEND, 1, 2, "b"), Span(SpanKind.ACT, 3, 4, "action"),
    )  # fmt: skip
    said: dict[str, Any] = {
        "completion_ids": (4, 5, 6, 7), "logprobs": (-0.5, -0.7, 0.0, -1.0), "sampled": (True, True, False, True),
        "spans": spans,
    }  # fmt: skip
    told = Intention("b", ("stay", END_OF_PLAY), 1.0)
    given = ({"north": 0.1, "south": 0.2, "stay": 0.7}, {"stay": 0.4, END_OF_PLAY: 0.6})
    mine = [
        turn("a", 0, intentions=(told,), **said),
        turn("a", 1, intentions=(replace(told, distributions=given),), **said),
        turn("a", 2, malformed=True, completion_ids=(4, 5, 6, 7), logprobs=(0.0,) * 4, sampled=(True,) * 4),
    ]
    forced = turn("b", 0, "stay", completion_ids=(), observation=observation("b", 0, legal=("stay",)))
    theirs = [forced, turn("b", 1, "north", completion_ids=()), turn("b", 2, "stay", completion_ids=())]
    found = foretold([episode({"a": mine, "b": theirs})], LANGUAGE)
    assert [(g.key.index, g.ahead, g.right) for g in found.guesses] == [(0, 1, False), (1, 0, False), (1, 1, False)]
    assert [(g.start, g.end) for g in found.guesses] == [(1, 2), (0, 1), (1, 2)]
    assert found.guesses[0].probability == pytest.approx(math.exp(-0.7))
    assert found.guesses[0].true_probability is None
    assert found.guesses[1].true_probability == 0.1
    assert found.guesses[1].square == pytest.approx(0.54)
    assert [g.likeliest for g in found.guesses] == [None, False, False]
    assert not found.outlooks
    last = foretold([episode({"a": mine[1:2], "b": theirs[1:2]})], LANGUAGE)
    assert [(g.ahead, g.right, g.true_probability) for g in last.guesses] == [(0, False, 0.1), (1, True, 0.6)]
    figures = prediction_metrics([episode({"a": mine[1:2], "b": theirs[1:2]})], last)
    assert (figures["prediction/accuracy"], figures["prediction/top"]) == (0.5, 0.5)
    assert "prediction/top" not in prediction_metrics([episode({"a": mine, "b": theirs})], found)


def test_announced_actions_are_held_against_what_is_done_next() -> None:
    language = replace(LANGUAGE, message=(Slot("where", ("a",)), Slot("next", ("stay",), Truth.OWN_NEXT_ACTION)))
    spans = (Span(SpanKind.SAY, 0, 1, "where"), Span(SpanKind.SAY, 1, 2, "next"))
    said: dict[str, Any] = {"spans": spans, "logprobs": (-0.5, -0.7), "message": message("a", 0, ("b",))}
    mine = [turn("a", 0, "north", **said), turn("a", 1, "stay", **said), turn("a", 2, "north", **said)]
    found = foretold([episode({"a": mine})], language).guesses
    assert [(g.kind, g.key.index, g.about, g.start, g.end, g.right) for g in found] == [
        (Kind.ANNOUNCEMENT, 0, "next", 1, 2, True),
        (Kind.ANNOUNCEMENT, 1, "next", 1, 2, False),
    ]
    assert found[0].probability == pytest.approx(math.exp(-0.7))
    figures = prediction_metrics([episode({"a": mine})], foretold([episode({"a": mine})], language))
    assert figures == {"prediction/kept_word": 0.5}


def test_foreseen_fields_are_held_against_the_next_view() -> None:
    spans = (
        Span(SpanKind.FORESEE, 0, 1, "row"), Span(SpanKind.FORESEE, 1, 2, "col"), Span(SpanKind.FORESEE, 2, 3, "done"),
    )  # fmt: skip
    said: dict[str, Any] = {
        "completion_ids": (4, 5, 6), "logprobs": (-0.5,) * 3, "sampled": (True,) * 3, "spans": spans,
    }  # fmt: skip
    mine = [turn("a", 0, forecast=forecast("1", "0"), **said), turn("a", 1, forecast=forecast("2", "1"), **said)]
    found = foretold([episode({"a": mine})], LANGUAGE)
    assert [(o.key.index, o.share, o.places) for o in found.outlooks] == [
        (0, 0.5, ((0, 1), (1, 2))),
        (1, 1.0, ((0, 1), (1, 2))),
    ]
    assert prediction_metrics([episode({"a": mine})], found) == {"prediction/field_f1": 0.75}


def test_predictability_by_hand() -> None:
    def game(actions: Sequence[str], view: str) -> Episode:
        theirs = [
            turn("b", i, action, observation=replace(observation("b", i), text=view))
            for i, action in enumerate(actions)
        ]
        mine = [turn("a", i, observation=observation("a", i, legal=("stay",))) for i in range(len(actions))]
        return episode({"a": mine, "b": theirs})

    games = [game(("north", "north"), "x"), game(("north", "south"), "x"), game(("south", "south"), "y")]
    found = predictability(games)
    assert found["entropy_bits"] == pytest.approx(1.0)
    assert found["copy_last"] == pytest.approx(2 / 6)
    # From its first view, two games are told north by the two others (one tie) and do it; the third does not. From the
    # second, south and south tell north, and the ties tell north where it is south.
    assert found["by_view"] == pytest.approx(2 / 6)
    # In the view x, the other game says north-south (tie: north), or north twice; y is seen in no other game.
    assert found["by_own_view"] == pytest.approx((2 + 1 + 0) / 6)
    assert predictability([episode({"a": [turn("a", 0)]})]) == {}


@pytest.mark.parametrize(("kind", "temperature"), [("starter", 1.0), ("starter", 0.6), ("qwen3", 1.0)])
def test_distributions_are_those_that_were_sampled_from(checkpoint: Any, kind: str, temperature: float) -> None:
    model = load(checkpoint(kind))
    settings = settings_of(intend_steps=2).model_copy(update={"max_tokens": 400})
    plain = play(team_on(model, settings, temperature=temperature), seeds=1, group=2)
    watching = team_on(model, settings, temperature=temperature)
    watching.keep_distributions = True
    watched = play(watching, seeds=1, group=2)
    found = foretold(watched, watching.language).guesses
    assert found
    for one, other in zip(found, foretold(plain, watching.language).guesses, strict=True):
        assert replace(one, true_probability=None, square=None, likeliest=None) == other
    for written in [written for each in watched for mine in each.trajectories.values() for written in mine.turns]:
        (told,) = written.intentions
        if kind != "starter":  # `south` and `stay` begin alike there: the first token does not say which it is
            assert told.distributions is None
            continue
        assert told.distributions is not None
        spans = [span for span in written.spans if span.kind is SpanKind.INTEND]
        for word, given, span in zip(told.actions, told.distributions, spans, strict=True):
            assert set(given) == {*watching.language.actions, END_OF_PLAY}
            assert sum(given.values()) == pytest.approx(1.0)
            assert given[word] == pytest.approx(math.exp(sum(written.logprobs[span.start : span.end])), rel=1e-4)
            assert not any(written.sampled[span.start + 1 : span.end])  # the first token says which word it is


# ---- which tokens are paid


SILENT = {"action": 0.0, "announcement": 0.0}
"""Pays nothing and logs everything."""
Weights = tuple[float, float, float]
NOTHING: Weights = (0.0, 0.0, 0.0)


def paid_rows(
    team: Any,
    episodes: Sequence[Episode],
    table: GrammarTable,
    weights: Weights,
    task: float = 1.0,
    scale: bool = False,
) -> list[Row]:
    rows, _ = rows_of(team, episodes, lambda n: task * (1.0, -0.7, 0.4)[n % 3], policy_spans=TASK_SPANS, table=table)
    tokens = sum(int(row.policy.sum()) for row in rows)
    paid = payments(episodes, foretold(episodes, team.language), weights, AGENTS)
    return pay(rows, episodes, paid, weights, tokens, scale)


def kinds_of(row: Row, bare: Row) -> dict[Kind, np.ndarray]:
    """Which tokens are paid for what. Announced actions are the paid tokens of `say` that the task does not pay."""
    new = row.policy & ~bare.policy
    spans = {Kind.ACTION: SpanKind.INTEND, Kind.ANNOUNCEMENT: SpanKind.SAY, Kind.OBSERVATION: SpanKind.FORESEE}
    found = {kind: new & (row.kinds == KINDS.index(span)) for kind, span in spans.items()}
    assert np.array_equal(sum(found.values()), new)
    return found


@pytest.mark.parametrize("context", Context)
def test_neither_reward_reaches_the_others_tokens(starter: TransformersModel, context: Context) -> None:
    team, table = team_on(starter, settings_of(context)), GrammarTable()
    episodes = play(team, seeds=2, group=3)
    cases: tuple[tuple[Weights, float], ...] = (
        ((1.0, 1.0, 1.0), 1.0), ((2.0, 3.0, 5.0), 1.0), ((1.0, 1.0, 1.0), 0.3), (NOTHING, 1.0),
    )  # fmt: skip
    plain, more, poor, none = (paid_rows(team, episodes, table, weights, task) for weights, task in cases)
    seen = dict.fromkeys(Kind, 0.0)
    own = 0.0
    for row, richer, poorer, bare in zip(plain, more, poor, none, strict=True):
        paid = kinds_of(row, bare)
        predictions = np.any(list(paid.values()), axis=0)
        assert np.array_equal(row.advantages[~predictions], bare.advantages[~predictions])
        assert np.array_equal(row.advantages[~predictions], richer.advantages[~predictions])
        assert np.array_equal(row.advantages[predictions], poorer.advantages[predictions])
        for kind, factor in zip(Kind, (2.0, 3.0, 5.0), strict=True):
            assert np.allclose(factor * row.advantages[paid[kind]], richer.advantages[paid[kind]])
            seen[kind] += float(np.abs(row.advantages[paid[kind]]).sum())
        own += float(np.abs(row.advantages[~predictions]).sum())
    assert min(*seen.values(), own) > 0.1


def test_gradients_of_task_and_predictions_add_up(starter: TransformersModel, tmp_path: Path) -> None:
    """The task's part has the gradient it would have without the other, to the last bit of its denominator."""
    team, table = team_on(starter), GrammarTable()
    episodes = play(team, seeds=2, group=3)
    tokens = sum(int(row.policy.sum()) for row in paid_rows(team, episodes, table, NOTHING))

    def gradient(weights: Weights, task: float) -> dict[str, torch.Tensor]:
        rows = paid_rows(team, episodes, table, weights, task)
        return gradients_of(trainer_on(starter, FixedSource(rows, tokens), table, tmp_path), starter)

    weights = (1.0, 0.7, 0.5)
    both, task, predictions = gradient(weights, 1.0), gradient(NOTHING, 1.0), gradient(weights, 0.0)
    assert largest_difference(both, {key: task[key] + predictions[key] for key in both}) < 1e-6
    for part in (task, predictions):
        assert max(float(value.abs().max()) for value in part.values()) > 1e-3
    twice = gradient((2.0, 1.4, 1.0), 0.0)
    assert largest_difference(twice, {key: 2 * value for key, value in predictions.items()}) < 1e-6


def test_predictions_are_paid_as_a_mean_over_their_own_tokens(starter: TransformersModel) -> None:
    team, table = team_on(starter), GrammarTable()
    episodes = play(team, seeds=2, group=3)
    bare = paid_rows(team, episodes, table, NOTHING)
    tokens = sum(int(row.policy.sum()) for row in bare)

    def given(weights: Weights, scale: bool = False) -> np.ndarray:
        rows = paid_rows(team, episodes, table, weights, scale=scale)
        return np.concatenate([row.advantages[row.policy & ~b.policy] for row, b in zip(rows, bare, strict=True)])

    found = foretold(episodes, team.language).guesses
    numbers = guess_advantages(found)
    for kind, weights in ((Kind.ACTION, (1.0, 0.0, 0.0)), (Kind.ANNOUNCEMENT, (0.0, 1.0, 0.0))):
        wanted = numbers[[guess.kind is kind for guess in found]]
        assert len(given(weights)) == len(wanted) > 0  # one token a word
        assert np.allclose(given(weights) / tokens, wanted / len(wanted), atol=1e-6)
    scaled = given((3.0, 0.0, 0.0), scale=True)
    assert np.sqrt(np.mean(scaled**2)) == pytest.approx(3.0 * tokens / len(scaled), rel=1e-2)
    assert np.corrcoef(scaled, given((1.0, 0.0, 0.0)))[0, 1] == pytest.approx(1.0)


def test_tokens_of_the_task_are_not_paid_for_predictions(starter: TransformersModel) -> None:
    team, table = team_on(starter), GrammarTable()
    episodes = play(team, seeds=1, group=2)
    rows, _ = rows_of(team, episodes, lambda n: 1.0, table=table)  # all spans are the task's
    weights = (1.0, 0.0, 0.0)
    paid = payments(episodes, foretold(episodes, team.language), weights, AGENTS)
    with pytest.raises(TrainingError, match="carry the task's loss"):
        pay(rows, episodes, paid, weights, 100)
    assert not payments(episodes, foretold(episodes, team.language), weights, {"agent_9"}).turns


# ---- in a run


def test_a_recipe_without_predictions_notices_nothing(starter: TransformersModel) -> None:
    def collect(**grpo: Any) -> Any:
        recipe = recipe_of(policy_spans=("say", "act"), hindsight_weight=0.5, **grpo)
        return GameSource(recipe, team_on(starter), GrammarTable(), frozenset(AGENTS), None).collect(0)

    off, watched, paid = collect(), collect(prediction=SILENT), collect(prediction={"action": 1.0, "observation": 1.0})
    assert off.policy_tokens == watched.policy_tokens == paid.policy_tokens
    assert len(off.rows) == len(watched.rows)
    for one, other in zip(off.rows, watched.rows, strict=True):
        for name in ("policy", "targets", "logprobs", "advantages", "allowed", "joint", "kinds"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    assert not any(name.startswith(("prediction/", "predictability/")) for name in off.metrics)
    names = {"brier", "top", "accuracy", "kept_word", "field_f1"}
    assert {f"prediction/{name}" for name in names} | {"predictability/by_own_view"} <= set(watched.metrics)
    assert paid.metrics["prediction/weight_action"] == paid.metrics["prediction/weight_observation"] == 1.0
    assert sum(int(row.policy.sum()) for row in paid.rows) > paid.policy_tokens


def test_the_weight_is_annealed_over_the_run(starter: TransformersModel) -> None:
    recipe = recipe_of(iterations=3, prediction={"action": 1.0, "end": 0.0})
    source = GameSource(recipe, team_on(starter), GrammarTable(), frozenset(AGENTS), None)
    found = [source.collect(iteration) for iteration in range(3)]
    assert [each.metrics["prediction/weight_action"] for each in found] == [1.0, 0.5, 0.0]
    last = found[-1]
    assert not any((row.policy & (row.kinds == KINDS.index(SpanKind.INTEND))).any() for row in last.rows)


@pytest.mark.parametrize(
    ("grpo", "rest", "message"),
    [
        ({"prediction": {"observation": 1.0}}, {}, "prediction pays for foresee, which policy_spans"),
        ({"prediction": {}, "policy_spans": ("intend", "act")}, {}, "prediction pays for intend, which policy_spans"),
        ({"prediction": {}, "loss": "grpo"}, {}, "prediction needs loss=dapo"),
        ({"prediction": {}, "entropy": 0.1}, {}, "entropy=0"),
        ({"prediction": {}, "credit": "agent-turn"}, {}, "credit=agent-turn branches"),
        ({"prediction": {}}, {"update": {"ratio": "turn"}}, "update.ratio=token"),
        ({"prediction": {}}, {"update": {"order": "sequential"}}, "update.order=simultaneous"),
        ({"prediction": {}}, {"agent": {"spans": {"intend": False}}}, "agent.spans.intend is off"),
    ],
)
def test_settings_that_would_mix_the_two_are_refused(grpo: Any, rest: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({"task": "rendezvous", "grpo": grpo, **rest})
