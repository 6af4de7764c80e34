"""The price of a bit: who is charged what, that nothing else moves, and that a cap is met."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from preconcert.agents import AgentSettings, ChannelSettings
from preconcert.core import ConfigError, Episode, Message, Slot, Span, SpanKind, TrainingError
from preconcert.models import TransformersModel
from preconcert.prompts import Speech
from preconcert.training.credit import TurnKey
from preconcert.training.message_costs import MessageLedger, charge, counted, message_costs, repeats, written
from preconcert.training.message_meter import PriorMeter, RawMeter, Written, meter_of
from preconcert.training.message_price import MessagePriceSettings, MeterName, PriceControl
from preconcert.training.recipe import Recipe
from preconcert.training.rows import KINDS, GrammarTable, worth_training
from preconcert.training.run import train
from preconcert.training.source import GameSource
from tests.training.episodes import episode, turn
from tests.training.teams import (
    AGENTS,
    FixedSource,
    gradients_of,
    largest_difference,
    play,
    recipe_of,
    rows_of,
    team_on,
    trainer_on,
)

SAY = KINDS.index(SpanKind.SAY)
LEARNED = AgentSettings(codec="learned")  # type: ignore[arg-type]


def say(agent: str, step: int, words: str, slots: int = 2, **more: Any) -> Any:
    """A turn that wrote these words, one token each, and the end where it came early; an act before and after."""
    said = words.split()
    entries = min(slots, len(said) + 1)
    spans = tuple(Span(SpanKind.SAY, 1 + place, 2 + place, f"word{place}") for place in range(entries))
    spans += (Span(SpanKind.ACT, 1 + entries, 2 + entries, "action"),)
    n = entries + 2
    message = Message(agent, ("other",), words, 1.0, len(said), step, tuple((1.0, 3.0)[:entries]))
    return turn(
        agent, step, spans=spans, message=message, completion_ids=tuple(range(n)), logprobs=(-0.5,) * n,
        sampled=(False,) + (True,) * (n - 1), **more,
    )  # fmt: skip


def group(*messages: tuple[str, ...]) -> list[Episode]:
    """Games of one task instance in which one agent says these messages in turn."""
    return [
        episode({"me": [say("me", step, words) for step, words in enumerate(each)]}, sample=number)
        for number, each in enumerate(messages)
    ]


def costs_of(episodes: list[Episode], price: float = 1.0, redundancy: float = 0.0) -> dict[TurnKey, Any]:
    found = written(episodes, {"me"})
    lengths = dict(zip(found, RawMeter().lengths(list(found.values())), strict=True))
    return message_costs(episodes, found, lengths, price, redundancy)


# ---- who is charged what


def test_an_episode_that_begins_in_the_midst_knows_what_was_said_before() -> None:
    episodes = group(("a b", "a b"), ("c b", "a c"))
    before = Message("me", ("other",), "a c", 1.0, 2, 0)
    found = written(episodes, {"me"}, (before, None))
    assert [repeats(each) for each in found.values()] == [(True, False), (True, True), (False, False), (False, False)]
    assert next(repeats(each) for each in written(episodes, {"me"}).values()) == (False, False)


def test_what_is_paid_as_a_prediction_is_not_charged(starter: TransformersModel) -> None:
    """Announced actions carry a pay for being true, all other words of a message the task's advantage."""
    team = team_on(starter, AgentSettings())
    announced = {"announcement": 0.5}
    rows = []
    for prediction, price in ((None, None), (announced, None), (announced, {"redundancy": 0.3})):
        more = {"message_price": price, "prediction": prediction, "seeds": 2, "group": 4}
        source = GameSource(recipe_of(**more), team, GrammarTable(), frozenset(AGENTS), None)
        rows.append({row.name: row for row in source.collect(0).rows})
    plain, paid, charged = rows
    changed = announcements = 0
    for name in plain.keys() & paid.keys() & charged.keys():
        of_task, moved = plain[name].policy, charged[name].advantages != paid[name].advantages
        assert not moved[~of_task].any(), "a pay stays what it is"
        assert (charged[name].policy == paid[name].policy).all()
        changed += int(moved[of_task].sum())
        announcements += int((paid[name].policy & ~of_task & (paid[name].kinds == SAY)).sum())
    assert changed > 0
    assert announcements > 0


def test_a_word_pays_for_itself_and_for_what_follows_in_its_message() -> None:
    """First entry 1 bit, second 3: silence 1, any message that begins with a word 4."""
    costs = costs_of(group(("a b",), ("a",), ("",), ("c d",)), price=0.5)
    mean = 0.5 * (4 + 4 + 1 + 4) / 4
    spoken = 0.5 * 4 - mean
    assert np.allclose(costs[TurnKey(0, "me", 0)], [0, spoken, 0, 0])
    assert np.allclose(costs[TurnKey(1, "me", 0)], [0, spoken, 0, 0]), "the end costs what a word does"
    assert np.allclose(costs[TurnKey(2, "me", 0)], [0, 0.5 * 1 - mean, 0])
    total = sum(float(cost.sum()) for cost in costs.values())
    assert abs(total) < 1e-12, "costs are centred in their group"


def test_costs_are_compared_at_the_same_turn_and_word_of_the_same_instance() -> None:
    here = group(("a b", ""), ("", "a b"))
    there = [replace(e, group="elsewhere") for e in group(("a b", "a b"))]
    costs = costs_of([*here, *there])
    assert np.allclose(costs[TurnKey(0, "me", 0)], [0, 1.5, 0, 0])
    assert np.allclose(costs[TurnKey(0, "me", 1)], [0, -1.5, 0])
    assert not costs[TurnKey(2, "me", 0)].any(), "nobody to be compared with"


def test_equal_messages_cost_exactly_nothing() -> None:
    costs = costs_of(group(("a b", "c"), ("d e", "f"), ("g h", "i")), price=0.1)
    assert all((cost == 0.0).all() for cost in costs.values())


def test_words_that_repeat_the_message_before_pay_for_it() -> None:
    (first, second, third) = (say("me", 0, words).message for words in ("a b", "a c", "a"))
    assert repeats(Written(second, first)) == (True, False)
    assert repeats(Written(third, second)) == (True,)
    assert repeats(Written(first, third)) == (True, False)
    assert repeats(Written(first, None)) == (False, False)
    costs = costs_of(group(("a b", "a b"), ("c b", "a c")), price=0.0, redundancy=1.0)
    assert not costs[TurnKey(0, "me", 0)].any()
    assert np.allclose(costs[TurnKey(0, "me", 1)], [0, 1.0, 0.5, 0]), "2 against 0, then 1 against 0"
    assert np.allclose(costs[TurnKey(1, "me", 1)], [0, -1.0, -0.5, 0])


def test_what_was_said_is_counted() -> None:
    episodes = group(("a b", "a c"), ("", "a"))
    found = written(episodes, {"me"})
    lengths = dict(zip(found, RawMeter().lengths(list(found.values())), strict=True))
    metrics = counted(episodes, found, lengths).metrics()
    assert metrics == {
        "message/bits_per_message": (4 + 4 + 1 + 4) / 4, "message/bits_per_episode": 13 / 2, "message/words": 5 / 4,
        "message/silent": 1 / 4, "message/repeated": 1 / 5,
    }  # fmt: skip
    assert not written(episodes, {"somebody else"})


def test_lengths_that_do_not_fit_are_an_error() -> None:
    episodes = group(("a b",))
    found = written(episodes, {"me"})
    with pytest.raises(TrainingError, match="1 lengths for 2 words"):
        message_costs(episodes, found, dict.fromkeys(found, (1.0,)), 1.0, 0.0)


# ---- what it moves


def charged_rows(starter: TransformersModel, price: float) -> tuple[Any, list[Any], list[Any], list[Episode]]:
    team = team_on(starter, LEARNED)
    episodes = play(team, seeds=2, group=4)
    rows, table = rows_of(team, episodes, lambda number: (0.7, -1.3, 0.0)[number % 3], hindsight=True)
    ledger = MessageLedger(MessagePriceSettings(price=price), RawMeter(), 1, set(AGENTS))
    return table, rows, ledger.charged(rows, episodes), episodes


def test_only_words_that_were_chosen_in_say_spans_are_charged(starter: TransformersModel) -> None:
    """The end of a message is one of them."""
    _, rows, charged, episodes = charged_rows(starter, 0.3)
    turns = [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]
    moved = ends = 0
    for row, paid, one in zip(rows, charged, turns, strict=True):
        spans = [span for span in one.spans if span.kind is SpanKind.SAY]
        inside = {place for span in spans for place in range(span.start, span.end) if one.sampled[place]}
        assert all(row.policy[place] for place in inside), "also the announced action: it need not have been said"
        different = set(np.flatnonzero(row.advantages != paid.advantages).tolist())
        assert different <= inside
        moved += len(different)
        assert one.message is not None
        ended = len(spans) > len(one.message.payload.split())
        ends += ended and spans[-1].start in different
        for name in ("policy", "targets", "logprobs", "allowed", "joint", "kinds"):
            assert (getattr(row, name) == getattr(paid, name)).all()
    assert moved > 10
    assert ends > 0


def test_the_price_adds_a_gradient_of_its_own_and_changes_no_other(starter: TransformersModel, tmp_path: Path) -> None:
    table, rows, charged, _ = charged_rows(starter, 0.3)
    say_only = [
        replace(row, advantages=np.where(row.kinds == SAY, paid.advantages - row.advantages, 0).astype(np.float32))
        for row, paid in zip(rows, charged, strict=True)
    ]
    task, both, alone = (
        gradients_of(trainer_on(starter, FixedSource(each), table, tmp_path), starter)
        for each in (rows, charged, say_only)
    )
    assert max(float(value.abs().max()) for value in alone.values()) > 1e-3
    assert largest_difference(both, {key: task[key] + alone[key] for key in task}) < 1e-6
    without = [
        replace(row, policy=row.policy & (row.kinds != SAY), advantages=np.where(row.kinds != SAY, row.advantages, 0))
        for row in rows
    ]
    paid = [
        replace(row, policy=row.policy & (row.kinds != SAY), advantages=np.where(row.kinds != SAY, row.advantages, 0))
        for row in charged
    ]
    tokens = sum(int(row.policy.sum()) for row in rows)
    one, other = (
        gradients_of(trainer_on(starter, FixedSource(each, tokens), table, tmp_path), starter)
        for each in (without, paid)
    )
    assert all(torch.equal(one[key], other[key]) for key in one), "tokens of other spans, to the bit"


def test_a_dear_word_becomes_rarer(starter: TransformersModel, tmp_path: Path) -> None:
    """The direction of a step on the price alone: messages that cost more than others become less likely."""
    table, rows, charged, _ = charged_rows(starter, 0.3)
    blank = [replace(row, advantages=np.zeros_like(row.advantages)) for row in rows]
    priced = [
        replace(row, advantages=paid.advantages - old.advantages)
        for row, paid, old in zip(blank, charged, rows, strict=True)
    ]
    trainer = trainer_on(starter, FixedSource(priced), table, tmp_path, lr=0.02, iterations=6, epochs=2)
    team = team_on(starter, LEARNED)

    def words() -> float:
        turns = [t for e in play(team, seeds=4, group=8) for s in e.trajectories.values() for t in s.turns]
        return float(np.mean([len(t.message.payload.split()) for t in turns if t.message is not None]))

    before = words()
    trainer.train()
    assert words() < before - 0.1


def test_targets_are_chosen_as_if_nothing_had_been_charged(starter: TransformersModel) -> None:
    _, rows, charged, _ = charged_rows(starter, 0.3)
    rows = [replace(row, advantages=np.zeros_like(row.advantages)) for row in rows]
    charged = [
        replace(paid, advantages=np.where(paid.kinds == SAY, paid.advantages, 0).astype(np.float32)) for paid in charged
    ]
    plain, _ = worth_training(rows, 0.25, 0)
    paid, _ = worth_training(charged, 0.25, 0, free=rows)
    assert len(paid) > len(plain)
    taught = {row.name for row in plain if (row.targets >= 0).any()}
    assert {row.name for row in paid if (row.targets >= 0).any()} == taught


def test_ends_and_words_are_targets_alike(starter: TransformersModel) -> None:
    """Where hindsight knows a word that need not be said, saying nothing is its own target."""
    team = team_on(starter, LEARNED)
    episodes = play(team, seeds=3, group=4)
    rows, _ = rows_of(team, episodes, lambda number: 0.0, hindsight=True)
    turns = [(t.turns, i) for e in episodes for t in e.trajectories.values() for i in range(len(t.turns))]
    ended = spoken = 0
    for row, (mine, index) in zip(rows, turns, strict=True):
        one = mine[index]
        for span in one.spans:
            if span.slot != "next" or index + 1 == len(mine):
                continue
            assert one.message is not None
            if len(one.message.payload.split()) == 2:
                assert team.format.text([int(row.targets[span.start])]) == mine[index + 1].action
                spoken += 1
            else:
                assert row.targets[span.start] == row.completion_ids[span.start]
                ended += 1
    assert min(ended, spoken) > 0


# ---- meters


def test_a_prior_makes_what_is_said_often_cheap() -> None:
    speech = Speech((Slot("one", ("a", "b", "c")), Slot("two", ("x",))), stops=True)
    meter = PriorMeter(speech, follows=False)
    often = Written(Message("me", ("you",), "", 0.0, 0, 0, (2.0,)), None)
    seldom = Written(Message("me", ("you",), "a x", 0.0, 2, 0, (2.0, 1.0)), None)
    assert meter.lengths([often, seldom]) == [(2.0,), (2.0, 1.0)], "nothing heard yet: as without a model"
    meter.learn([often] * 15 + [seldom])
    ((cheap,), dear) = meter.lengths([often, seldom])
    assert cheap < 0.2
    assert dear[0] > 3.0
    again = PriorMeter(speech, follows=False)
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert again.lengths([often, seldom]) == [(cheap,), dear], "the same bits after a resume"
    for _ in range(4):
        meter.learn([seldom])
    assert meter.lengths([often])[0][0] > 2.0, "what was said long ago is forgotten"
    assert isinstance(meter_of(MeterName.RAW, speech, ChannelSettings()), RawMeter)
    for channel, follows in ((ChannelSettings(), True), (ChannelSettings(drop=0.1), False)):
        found = meter_of(MeterName.PRIOR, speech, channel)
        assert isinstance(found, PriorMeter)
        assert found.follows == follows


# ---- the cap


def instant(sensitivity: float) -> Callable[[float], float]:
    """Bits between 2 and 5 that follow a price at once."""
    return lambda price: 2.0 + 3.0 * math.exp(-sensitivity * price)


@pytest.mark.parametrize("sensitivity", [0.3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("cap", [2.5, 3.5, 4.5])
@pytest.mark.parametrize("iterations", [40, 120])
def test_a_cap_is_met_whatever_the_answer_to_a_price(sensitivity: float, cap: float, iterations: int) -> None:
    control = PriceControl(MessagePriceSettings(cap_bits=cap), iterations)
    rng = np.random.default_rng(0)
    answer, said = instant(sensitivity), []
    for iteration in range(iterations):
        said.append(answer(control.price))
        control.observe(iteration, said[-1] * (1 + rng.normal(0, 0.01)), 1.0)
    last = said[-iterations // 10 :]
    assert abs(float(np.mean(last)) / cap - 1) < 0.05
    assert max(last) - min(last) < 0.1 * cap, "and it stays there"


@pytest.mark.parametrize("rate", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_cap_is_met_by_learners_that_follow_slowly(rate: float, share: float) -> None:
    """Forty kinds of moments; what speaking is worth in each differs; a step follows the gradient of a sigmoid."""
    rng = np.random.default_rng(1)
    logits = rng.normal(1.0, 1.0, 40)
    worth = np.where(rng.random(40) < 0.5, rng.uniform(0.05, 0.8, 40), 0.0)
    cap = 2.3 * (1 + share * float((1 / (1 + np.exp(-logits))).mean()))
    iterations, said = 60, []
    control = PriceControl(MessagePriceSettings(cap_bits=cap), iterations)
    for iteration in range(iterations):
        speaks = 1 / (1 + np.exp(-logits))
        said.append(2.3 * (1 + float(speaks.mean())))
        control.observe(iteration, said[-1] * (1 + rng.normal(0, 0.01)), 1.0)
        decay = rate * (0.55 + 0.45 * math.cos(math.pi * iteration / iterations))
        for _ in range(4):
            speaks = 1 / (1 + np.exp(-logits))
            logits += decay * speaks * (1 - speaks) * (worth - 2.3 * control.price)
    assert abs(float(np.mean(said[-6:])) / cap - 1) < 0.05


def test_the_goal_comes_down_from_where_it_was() -> None:
    control = PriceControl(MessagePriceSettings(cap_bits=2.0, ramp=0.5), 20)
    assert control.goal(0) is None
    control.observe(0, 6.0, 1.0)
    assert [control.goal(i) for i in (0, 5, 10, 19)] == [6.0, 4.0, 2.0, 2.0]
    below = PriceControl(MessagePriceSettings(cap_bits=2.0), 20)
    for iteration in range(20):
        below.observe(iteration, 1.0, 1.0)
        assert below.price == 0.0, "a cap is a limit from above"
        assert below.goal(iteration) == 2.0


def test_a_cap_per_episode_is_the_same_cap_in_other_words() -> None:
    one = PriceControl(MessagePriceSettings(cap_bits=3.0), 10)
    many = PriceControl(MessagePriceSettings(cap_bits=24.0, per="episode"), 10)  # type: ignore[arg-type]
    for iteration, bits in enumerate((5.0, 4.8, 4.9, 4.0, 3.5, 3.1, 2.9)):
        one.observe(iteration, bits, 1.0)
        many.observe(iteration, 8 * bits, 8.0)
        assert many.price == pytest.approx(one.price, abs=1e-12)


@pytest.mark.parametrize("bits", [0.5, 2.9, 3.0])
def test_a_control_that_was_idle_answers_like_a_new_one(bits: float) -> None:
    idle, new = (PriceControl(MessagePriceSettings(cap_bits=3.0, ramp=0.0), 60) for _ in range(2))
    for iteration in range(20):
        idle.observe(iteration, bits, 1.0)
        assert (idle.price, idle.state_dict()["gain"]) == (0.0, 1.0)
    for iteration, said in enumerate((3.15, 3.3, 3.2, 2.8, 2.9)):
        idle.observe(20 + iteration, said, 1.0)
        new.observe(iteration, said, 1.0)
        assert idle.price == new.price
        assert iteration or idle.price == pytest.approx(7.0 * 0.05 / 3.0, abs=1e-12), "ascent and damping, gain 1"


def test_a_price_that_has_gone_back_to_nothing_starts_from_a_gain_of_one() -> None:
    control = PriceControl(MessagePriceSettings(cap_bits=3.0, ramp=0.0), 60)
    for iteration, said in enumerate((3.6, 3.7, 3.8)):
        control.observe(iteration, said, 1.0)
    assert control.state_dict()["gain"] > 1.0
    for iteration in range(3, 9):
        control.observe(iteration, 1.0, 1.0)
    held = control.state_dict()
    assert (held["price"], held["sum"], held["gain"], held["before"]) == (0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("cap", [2.5, 3.5, 4.5])
def test_who_hardly_answers_to_a_price_is_charged_the_ceiling(cap: float) -> None:
    """Meeting these caps would take messages of 149, 81 and 27 advantages."""
    control, answer = PriceControl(MessagePriceSettings(cap_bits=cap), 120), instant(0.03)
    for iteration in range(120):
        control.observe(iteration, answer(control.price), 1.0)
    assert control.price * cap == pytest.approx(20.0, abs=1e-9)
    assert control.saturated


@pytest.mark.parametrize("messages", [1.0, 8.0])
def test_a_cap_that_cannot_be_met_does_not_cost_without_limit(messages: float) -> None:
    per = "message" if messages == 1.0 else "episode"
    settings = MessagePriceSettings(cap_bits=3.0 * messages, per=per, ramp=0.0)  # type: ignore[arg-type]
    control, saturated = PriceControl(settings, 100), []
    for iteration in range(40):
        control.observe(iteration, 6.0 * messages, messages)
        assert control.price * 3.0 <= 20.0 + 1e-9, "a message of three bits"
        assert control.saturated == (control.price * 3.0 >= 20.0 - 1e-9)
        saturated.append(control.saturated)
    assert saturated.index(True) > 2
    assert all(saturated[saturated.index(True) :])
    assert control.state_dict()["sum"] == 20.0, "the sum does not go on behind the ceiling"
    control.observe(40, 2.7 * messages, messages)
    assert not control.saturated
    assert control.price * 3.0 < 20.0, "so it comes down at once"


def test_a_price_without_a_cap_stays() -> None:
    control = PriceControl(MessagePriceSettings(price=0.2), 10)
    control.observe(0, 5.0, 1.0)
    assert control.price == 0.2


def test_the_price_goes_on_from_where_it_was() -> None:
    one = PriceControl(MessagePriceSettings(cap_bits=3.0), 30)
    held = json.loads(json.dumps(one.state_dict()))
    rng = np.random.default_rng(3)
    for iteration in range(30):
        bits = float(rng.uniform(2.5, 5.0))
        one.observe(iteration, bits, 1.0)
        other = PriceControl(MessagePriceSettings(cap_bits=3.0), 30)
        other.load_state_dict(held)
        other.observe(iteration, bits, 1.0)
        held = json.loads(json.dumps(other.state_dict()))
        assert (one.price, one.state_dict()) == (other.price, held)


# ---- runs


class Stopped(Exception):
    """Ends a run in its midst."""


class Stopper:
    """A reporter that ends reinforcement learning after some iterations; never with None."""

    def __init__(self, after: int | None) -> None:
        self.after = after
        self.now = ""

    def stage(self, name: str, total: int) -> None:
        """Remembered."""
        self.now = name

    def advance(self, done: int, note: str = "") -> None:
        """The moment, if it is this one."""
        if self.now == "reinforcement learning" and done == self.after:
            raise Stopped

    def say(self, text: str) -> None:
        """Ignored."""


def recipe_with(price: dict[str, Any], codec: str = "learned", **grpo: Any) -> Recipe:
    content = recipe_of(**grpo).model_dump()
    return Recipe.model_validate(
        {**content, "agent": {"codec": codec}, "grpo": {**content["grpo"], "message_price": price}}
    )


@pytest.mark.parametrize("meter", ["raw", "prior"])
def test_a_resumed_run_has_the_same_prices_and_bits(tmp_path: Path, meter: str) -> None:
    recipe = recipe_with(
        {"cap_bits": 3.0, "meter": meter, "redundancy": 0.01},
        iterations=4, seeds=2, group=3, minibatches=2, checkpoint_every=2, lr=0.02, hindsight_weight=0.3,
    )  # fmt: skip
    train(recipe, tmp_path / "whole", reporter=Stopper(None))
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "cut", reporter=Stopper(3))
    train(recipe, tmp_path / "cut", resume=True, reporter=Stopper(None))
    logs = []
    for name in ("whole", "cut"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k.startswith("message")} for line in lines])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4
    assert logs[0][-1]["message/price"] > 0
    for agent in AGENTS:
        file = f"adapters/{agent}/adapter_model.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


@pytest.mark.parametrize(
    ("price", "more", "said"),
    [
        ({"price": 0.1}, {"agent": {"codec": "slots"}}, "same raw bits"),
        ({"price": 0.1}, {"agent": {"codec": "raw-state"}}, "codec=raw-state has none"),
        ({"price": 0.1}, {"agent": {"codec": "learned", "spans": {"say": False}}}, "needs agent.spans.say"),
        ({"price": 0.1}, {"update": {"ratio": "turn"}}, "ratio=token"),
        ({"price": -1}, {}, "greater than or equal"),
        ({"ramp": 0.2}, {}, "no cap_bits"),
        (None, {"agent": {"codec": "intention"}, "world_model": {}}, "not codec=intention"),
        (None, {"grpo": {"prediction": {}}}, "announcement=0"),
        ({"redundancy": 0.1}, {"grpo": {"credit": "agent-turn"}}, "first turns of branches"),
        ({"meter": "prior", "price": 0.1}, {"grpo": {"credit": "agent-turn"}}, "first turns of branches"),
    ],
)
def test_what_does_not_fit_is_refused(price: Any, more: dict[str, Any], said: str) -> None:
    content: dict[str, Any] = {"task": "rendezvous", "agent": {"codec": "learned"}, **more}
    content["grpo"] = {**content.get("grpo", {}), "message_price": price}
    with pytest.raises(ValidationError, match=said):
        Recipe.model_validate(content)


def test_a_cap_below_silence_is_refused(starter: TransformersModel) -> None:
    recipe = recipe_with({"cap_bits": 1.5})
    team = team_on(starter, LEARNED)
    with pytest.raises(ConfigError, match=r"even saying nothing costs 2\.00 bits"):
        GameSource(recipe, team, GrammarTable(), frozenset(AGENTS), None)
    coded = recipe_with({"cap_bits": 1.5, "meter": "prior"})
    assert GameSource(coded, team, GrammarTable(), frozenset(AGENTS), None).messages is not None


def test_a_cap_below_silence_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"even saying nothing costs 2\.00 bits"):
        train(recipe_with({"cap_bits": 1.5}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rollout_charges_what_it_logs(starter: TransformersModel) -> None:
    """The whole way: an iteration without a price, then one with; rows differ in say spans alone."""
    team = team_on(starter, LEARNED)
    rows = []
    for price in (0.0, 0.2):
        source = GameSource(
            recipe_with({"price": price}, group=4), team, GrammarTable(), frozenset(AGENTS), None
        )
        found = source.collect(0)
        assert found.metrics["message/price"] == price
        assert 2.0 <= found.metrics["message/bits_per_message"] <= 2 + math.log2(6)
        rows.append(found)
    plain, paid = rows
    assert plain.policy_tokens == paid.policy_tokens
    before = {row.name: row for row in plain.rows}
    assert before.keys() <= {row.name for row in paid.rows}, "a price leaves no row out"
    moved: set[int] = set()
    for row in paid.rows:
        old = before[row.name].advantages if row.name in before else np.zeros_like(row.advantages)
        moved |= set(row.kinds[row.advantages != old].tolist())
    assert moved == {SAY}


def test_rows_without_a_message_are_left_alone(starter: TransformersModel) -> None:
    _, rows, _, episodes = charged_rows(starter, 0.3)
    assert all((a.advantages == b.advantages).all() for a, b in zip(rows, charge(rows, episodes, {}), strict=True))
