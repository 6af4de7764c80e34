"""Shared priors over messages: what is public, counts that sum to 1, an adapter that learns, and honest lengths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from preconcert.agents import ChannelSettings
from preconcert.core import CodingError, ConfigError, Delivery, Episode, Fate, Message, Slot
from preconcert.models import ScoreRequest, TransformersModel
from preconcert.models.entropy_coding import MessageCoder
from preconcert.prompts.prior_format import PriorFormat
from preconcert.training.message_prior import (
    ADAPTER,
    CountPrior,
    PriorSettings,
    PublicContext,
    Spoken,
    coding_report,
    fit_adapter,
    model_prior,
    prior_examples,
    slots_of,
    spoken,
)
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from tests.training.episodes import episode, message, turn
from tests.training.teams import PARAMS, TASK, load, team_on

SLOTS = (Slot("target", ("a", "b", "unknown")), Slot("next", ("north", "south", "stay")))


def said(text: str, last: str | None = None, sender: str = "x") -> Spoken:
    return Spoken(PublicContext(sender, last), text, 0.0, math.log2(9))


def scripted(number: int, split: str = "train") -> list[Episode]:
    specs = [EpisodeSpec(TASK, PARAMS, seed, split) for seed in range(number)]
    return rollout(specs, ScriptedPolicy("expert"), ChannelSettings(), 0)


# ---- what is public


def talk(*inboxes: tuple[Message, ...]) -> Episode:
    """`x` speaks to `y` and `z` in its only turn; these are their inboxes then."""
    turns = {"x": [turn("x", 0, message=message("x", 0, ("y", "z"), payload="a stay"))]}
    for listener, inbox in zip(("y", "z"), inboxes, strict=True):
        turns[listener] = [turn(listener, 0, inbox=inbox)]
    return episode(turns)


def test_the_context_is_what_the_receiver_heard_last_from_this_sender() -> None:
    old, other = message("x", 0, ("y",), payload="b north"), message("z", 0, ("y",), payload="a south")
    both = talk((other, old), (old,))
    assert [each.context for each in spoken(both)] == [PublicContext("x", "b north")]
    apart = talk((other, old), ())
    assert [each.context for each in spoken(apart)] == [PublicContext("x", "b north"), PublicContext("x", None)]


def test_what_was_not_sent_is_not_counted() -> None:
    one = talk((), ())
    capped = (Delivery("x", "y", 0, Fate.CAPPED), Delivery("x", "z", 0, Fate.CAPPED))
    assert len(spoken(one)) == 1
    assert spoken(replace(one, deliveries=capped)) == []
    assert len(spoken(replace(one, deliveries=capped[:1]))) == 1


def test_raw_lengths_come_from_the_message_or_the_slots() -> None:
    one = talk((), ())
    assert spoken(one)[0].raw_bits is None
    assert spoken(one, SLOTS)[0].raw_bits == pytest.approx(math.log2(9))
    turns = one.trajectories["x"].turns
    assert turns[0].message is not None
    own = replace(turns[0], message=replace(turns[0].message, word_bits=(1.0, 2.0, 0.5)))
    one = replace(one, trajectories={**one.trajectories, "x": replace(one.trajectories["x"], turns=(own,))})
    assert spoken(one, SLOTS)[0].raw_bits == 3.5


# ---- counts


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("alpha", [0.01, 1.0, 30.0])
def test_counts_sum_to_one_in_every_context(stops: bool, alpha: float) -> None:
    counted = [said("a north"), said("a stay", "a north"), said("b south", sender="y")]
    prior = CountPrior(SLOTS, stops, alpha).fit(counted)
    for context in (PublicContext("x"), PublicContext("x", "a north"), PublicContext("nobody", "what is this")):
        for words in ("", "a", "b", "unknown", "a north"):
            symbols = tuple(prior._symbol_of[word] for word in words.split())
            [expected] = prior.expect([(context, symbols)])
            assert np.exp(expected.logprobs).sum() == pytest.approx(1.0)
            assert expected.symbols is not None
            ends = 0 in expected.symbols
            assert ends == (stops or len(symbols) == 2)


def test_counts_are_add_alpha_from_the_general_to_the_particular() -> None:
    prior = CountPrior(SLOTS[:1], alpha=0.5).fit([said("a"), said("a"), said("b", "a")])
    [first] = prior.expect([(PublicContext("x"), ())])
    place = [(2 + 0.5 / 3) / 3.5, (1 + 0.5 / 3) / 3.5, (0 + 0.5 / 3) / 3.5]
    there = [(2 + 0.5 * place[0]) / 2.5, 0.5 * place[1] / 2.5, 0.5 * place[2] / 2.5]
    for _ in range(2):  # the word before is none, and the sender is the only one: twice the same counts again
        there = [(count + 0.5 * above) / 2.5 for count, above in zip((2, 0, 0), there, strict=True)]
    assert np.exp(first.logprobs).tolist() == pytest.approx(there)
    [unheard] = prior.expect([(PublicContext("x", "never said"), ())])
    assert np.exp(unheard.logprobs).tolist() == pytest.approx(place)


def test_counts_refuse_and_skip_what_they_cannot_count() -> None:
    with pytest.raises(ConfigError, match="alpha=0"):
        CountPrior(SLOTS, alpha=0.0)
    prior = CountPrior(SLOTS).fit([said("a north"), said("hello there"), said("a"), said("")])
    assert prior.skipped == 3
    assert CountPrior(SLOTS, stops=True).fit([said("a"), said("")]).skipped == 0


def test_counted_messages_are_coded_at_the_counts_price() -> None:
    prior = CountPrior(SLOTS, stops=True).fit([said("a north")] * 50 + [said("b")] * 5)
    coder = MessageCoder(prior)
    for text in ("a north", "b", "", "unknown stay", "hello 🙂"):
        context = PublicContext("x")
        [code] = coder.encode([(context, text)])
        assert coder.decode([(context, code)]) == [text]
        symbols = prior.spell(text)
        if symbols is None:
            continue
        ideal = -math.log2(1023 / 1024)
        for place, symbol in enumerate(symbols):
            [expected] = prior.expect([(context, symbols[:place])])
            assert expected.symbols is not None
            ideal -= expected.logprobs[expected.symbols.index(symbol)] / math.log(2)
        assert coder.bits([(context, text)])[0] == pytest.approx(ideal, abs=1e-3)
        assert code.length <= ideal + 2
    assert len(str(coder.encode([(PublicContext("x"), "a north")])[0])) <= 1


def test_slots_are_made_of_what_was_said() -> None:
    slots, stops = slots_of(["row 1", "row 2", "row", "col 1 2"])
    assert [slot.choices for slot in slots] == [("col", "row"), ("1", "2"), ("2",)]
    assert stops
    assert slots_of([]) == ((), False)


# ---- a language model


def formats(model: TransformersModel) -> PriorFormat:
    turns = team_on(model).format
    return PriorFormat(turns, turns.language.message)


@pytest.mark.parametrize("kind", ["starter", "qwen3"])
def test_rows_ask_in_public_and_carry_loss_where_there_is_a_choice(
    checkpoint: Callable[[str], Path], kind: str
) -> None:
    model = load(checkpoint(kind))
    format = formats(model)
    texts = ["a north", "b stay", "hello"]
    rows = prior_examples([said(text, "a stay", "agent_0") for text in texts], format)
    assert len(rows) == 2
    for row, text in zip(rows, texts, strict=False):
        ids = format.spelling.spell(text)
        assert ids is not None
        assert tuple(row["input_ids"]) == format.prompt_ids("agent_0", "a stay") + ids
        shown = model.tokenizer.decode(row["input_ids"])
        assert "agent_0" in shown
        assert "a stay" in shown
        assert row["labels"][-1] == -100  # the end is forced
        carried = [label for label in row["labels"] if label != -100]
        assert all(label in row["input_ids"] for label in carried)
        assert len(carried) >= 2
    assert format.prompt_ids("agent_0", None) == format.prompt_ids("agent_0", "words of nobody")


def test_an_adapter_learns_what_is_said_and_leaves_the_rest_alone(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(checkpoint("starter"))
    format = formats(model)
    before = {name: [value.clone() for value in model.adapter_parameters(name).values()] for name in model.adapters}
    base = [value.clone() for name, value in model.base.named_parameters() if "lora_" not in name]
    flags = [parameter.requires_grad for parameter in model.model.parameters()]
    slots = format.slots
    assert slots is not None
    learned = [each for one in scripted(12) for each in spoken(one, slots)]
    heldout = scripted(6, "heldout")
    settings = PriorSettings(steps=25, batch=16, lr=2e-2)
    log = fit_adapter(model, format, learned, settings, 1, tmp_path / "scratch")
    assert log[-1]["loss"] < log[0]["loss"]
    for name, values in before.items():
        after = model.adapter_parameters(name).values()
        assert all(torch.equal(old, new) for old, new in zip(values, after, strict=True))
    plain = [value for name, value in model.base.named_parameters() if "lora_" not in name]
    assert all(torch.equal(old, new) for old, new in zip(base, plain, strict=True))
    new = set(map(id, model.adapter_parameters(ADAPTER).values()))
    assert [p.requires_grad for p in model.model.parameters() if id(p) not in new] == flags
    coders = {
        "base": MessageCoder(model_prior(model, format, None)),
        "count": MessageCoder(CountPrior(slots).fit(learned)),
        "adapter": MessageCoder(model_prior(model, format)),
    }
    found = coding_report(heldout, coders, slots)
    messages = [each for one in heldout for each in spoken(one, slots)]
    assert found["raw"].per_message == pytest.approx(sum(math.log2(len(slot.choices)) for slot in slots))
    assert found["raw"].per_episode == pytest.approx(found["raw"].per_message * len(messages) / len(heldout))
    for name in ("count", "adapter"):
        assert found[name].per_episode < found["raw"].per_episode
        assert found[name].per_message - found[f"{name}, ends apart"].per_message <= 2
    assert found["adapter"].per_message < found["base"].per_message
    # What is reported is what the model itself says.
    asked = [
        ScoreRequest(
            format.prompt_ids(each.context.sender, each.context.last),
            format.spelling.spell(each.text) or (),
            ADAPTER,
            format.spelling.automaton,
        )
        for each in messages
    ]
    ideal = -sum(sum(logprobs) for logprobs in model.score(asked)) / math.log(2) / len(messages)
    assert found["adapter, ends apart"].per_message == pytest.approx(ideal, abs=0.01)


def test_what_cannot_be_reported_is_an_error(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CodingError, match="no messages in 1 episodes"):
        coding_report([episode({"x": [turn("x", 0)]})], {})
    with pytest.raises(ConfigError, match="nothing says how many words"):
        coding_report([talk((), ())], {})
    model = load(checkpoint("starter"))
    with pytest.raises(ConfigError, match="none of 1 messages can be spelled"):
        fit_adapter(model, formats(model), [said("hello")], PriorSettings(), 0, tmp_path)
