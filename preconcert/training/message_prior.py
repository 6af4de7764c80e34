"""Shared priors over messages: what sender and receiver both expect before a message comes.

Public is who speaks, and what the receiver heard from it last (`PublicContext`). That both sides know the latter is so
where nothing is lost or changed on the way, or where receipt is acknowledged; elsewhere code with `last=None`.

Parts: `spoken` (the messages of episodes with their contexts), `CountPrior` (counts of words: cheap, for metering while
training), `fit_adapter` (a language model's adapter, learned from the same messages) with `model_prior`, and
`coding_report` (bits per message and per episode, by prior). The coder is `models/entropy_coding.py`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from preconcert.agents.channel import slot_bits
from preconcert.core import CodingError, ConfigError, Episode, Fate, Message, Slot
from preconcert.models import TransformersModel
from preconcert.models.entropy_coding import Expected, MessageCoder, ModelPrior
from preconcert.prompts.prior_format import PriorFormat
from preconcert.training.warm_start import WarmStartMethod, WarmStartSettings, fine_tune

ADAPTER = "prior"
"""The adapter's name."""
_END = 0
"""The symbol that ends a message of words."""


@dataclass(frozen=True, slots=True)
class PublicContext:
    """What both sides know before a message comes."""

    sender: str
    last: str | None = None
    """What the receiver heard from it last; None for nothing."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """One message to be coded."""

    context: PublicContext
    text: str
    own_bits: float
    """Under its sender's own policy, which the receiver does not have."""
    raw_bits: float | None
    """Without any model; None where it is not known."""


def spoken(episode: Episode, slots: Sequence[Slot] = ()) -> list[Spoken]:
    """The messages of an episode in words, each as often as there are different contexts among those it was sent to.

    Messages that never went into the channel (`Fate.CAPPED`) do not count.

    Args:
        episode: finished play.
        slots: give the length of messages that do not say it themselves.
    """
    unsent = {(each.sender, each.recipient, each.sent_at) for each in episode.deliveries if each.fate is Fate.CAPPED}
    found: list[Spoken] = []
    for sender, trajectory in episode.trajectories.items():
        for index, turn in enumerate(trajectory.turns):
            message = turn.message
            if message is None or message.latent is not None:
                continue
            contexts = {
                PublicContext(sender, _heard(episode, recipient, index, sender)): None
                for recipient in message.recipients
                if (sender, recipient, message.sent_at) not in unsent
            }
            raw = _raw_bits(message, slots)
            found += [Spoken(context, message.payload, message.bits, raw) for context in contexts]
    return found


def _heard(episode: Episode, recipient: str, index: int, sender: str) -> str | None:
    """What a recipient had heard last from a sender when both took their turns of this number."""
    inbox = episode.trajectories[recipient].turns[index].inbox
    return next((message.payload for message in inbox if message.sender == sender), None)


def _raw_bits(message: Message, slots: Sequence[Slot]) -> float | None:
    bits = message.word_bits or slot_bits(message.payload.split(), slots)
    return None if bits is None else sum(bits)


def slots_of(texts: Iterable[str]) -> tuple[tuple[Slot, ...], bool]:
    """Slots made of the words that were seen in each place, and whether messages are of different lengths: for messages
    that are not made of the task's slots."""
    words = [text.split() for text in texts]
    longest = max((len(each) for each in words), default=0)
    places = [sorted({each[place] for each in words if len(each) > place}) for place in range(longest)]
    slots = tuple(Slot(f"word_{place}", tuple(choices)) for place, choices in enumerate(places))
    return slots, any(len(each) < longest for each in words)


class CountPrior:
    """Counts of words, from the general to the particular: by place, by the word that stood there in the last message,
    by the word before, by sender. Each level is a prior of the next: `p = (count + alpha * p_above) / (total + alpha)`,
    over all words of the slot at the top.

    Args:
        slots: the words that may stand in each place.
        stops: a message may end before any of its words.
        alpha: what a level's prior weighs, in messages.
    """

    def __init__(self, slots: Sequence[Slot], stops: bool = False, alpha: float = 1.0) -> None:
        if alpha <= 0:
            raise ConfigError(f"alpha={alpha:g} leaves no room for what was not seen; it must be positive")
        self.slots = tuple(slots)
        self.stops = stops
        self.alpha = alpha
        words = sorted({word for slot in slots for word in slot.choices})
        self._symbol_of = {word: number for number, word in enumerate(words, start=_END + 1)}
        self._word_of = {number: word for word, number in self._symbol_of.items()}
        self._options = [
            tuple(sorted({self._symbol_of[word] for word in slot.choices} | ({_END} if stops else set())))
            for slot in self.slots
        ] + [(_END,)]
        self._counts: defaultdict[tuple[Any, ...], Counter[int]] = defaultdict(Counter)
        self.skipped = 0
        """Messages that could not be counted, since they are not made of the slots' words."""

    def fit(self, messages: Iterable[Spoken]) -> CountPrior:
        """Count more messages. Both sides must have counted the same; a coder made before holds what it knew then."""
        for message in messages:
            symbols = self.spell(message.text)
            if symbols is None:
                self.skipped += 1
                continue
            for place, symbol in enumerate(symbols):
                for key in self._keys(message.context, symbols[:place]):
                    self._counts[key][symbol] += 1
        return self

    def spell(self, text: str) -> tuple[int, ...] | None:
        """Words as numbers, and 0 for the end."""
        words = text.split(" ") if text else []
        if len(words) > len(self.slots) or (len(words) < len(self.slots) and not self.stops):
            return None
        if any(word not in slot.choices for word, slot in zip(words, self.slots, strict=False)):
            return None
        return (*(self._symbol_of[word] for word in words), _END)

    def read(self, symbols: Sequence[int]) -> str:
        """The words."""
        return " ".join(self._word_of[symbol] for symbol in symbols[:-1])

    def over(self, symbols: Sequence[int]) -> bool:
        """Is the last one the end?"""
        return bool(symbols) and symbols[-1] == _END

    def expect(self, asked: Sequence[tuple[PublicContext, tuple[int, ...]]]) -> list[Expected]:
        """The distribution of the next word, or the end."""
        return [self._expect(context, symbols) for context, symbols in asked]

    def _expect(self, context: PublicContext, symbols: tuple[int, ...]) -> Expected:
        options = self._options[len(symbols)]
        shares = [1.0 / len(options)] * len(options)
        for key in self._keys(context, symbols):
            counts = self._counts.get(key)
            if counts is not None:
                total = counts.total() + self.alpha
                shares = [
                    (counts[symbol] + self.alpha * above) / total for symbol, above in zip(options, shares, strict=True)
                ]
        return Expected(options, np.log(np.array(shares)))

    def _keys(self, context: PublicContext, symbols: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
        """The levels at a place, the most general first."""
        place = len(symbols)
        before = context.last.split() if context.last is not None else None
        there = None if before is None else before[place] if place < len(before) else ""
        previous = symbols[-1] if symbols else _END
        yield (place,)
        yield (place, there)
        yield (place, there, previous)
        yield (place, there, previous, context.sender)


class PriorSettings(BaseModel):
    """Fine-tuning of a prior's adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(200, ge=1)
    """Optimiser steps."""
    batch: int = Field(64, ge=1)
    """Messages per step."""
    lr: float = Field(5e-3, gt=0)
    """Peak learning rate."""


def prior_examples(messages: Sequence[Spoken], format: PriorFormat) -> list[dict[str, list[int]]]:
    """One `input_ids`/`labels` pair per message that has a spelling; what its grammar forces carries no loss."""
    examples: list[dict[str, list[int]]] = []
    for message in messages:
        ids = format.spelling.spell(message.text)
        if ids is None:
            continue
        prompt = format.prompt_ids(message.context.sender, message.context.last)
        automaton = format.spelling.automaton
        chosen = [True] * len(ids)
        if automaton is not None:
            chosen = [len(automaton.transitions[state]) > 1 for state in automaton.walk(ids)[:-1]]
        labels = [token if choice else -100 for token, choice in zip(ids, chosen, strict=True)]
        examples.append({"input_ids": [*prompt, *ids], "labels": [-100] * len(prompt) + labels})
    return examples


def fit_adapter(
    model: TransformersModel,
    format: PriorFormat,
    messages: Sequence[Spoken],
    settings: PriorSettings,
    seed: int,
    folder: Path,
    adapter: str = ADAPTER,
) -> list[dict[str, float]]:
    """Train an adapter to say what is said; all else of the model stays as it is.

    Args:
        model: to which the adapter is added, if it does not have it.
        format: spells contexts and messages.
        messages: to learn from.
        settings: lengths and rates.
        seed: everything random follows from it.
        folder: scratch space of the trainer.
        adapter: its name.

    Returns:
        The trainer's log.

    Raises:
        ConfigError: no message has a spelling.
    """
    examples = prior_examples(messages, format)
    if not examples:
        raise ConfigError(f"none of {len(messages)} messages can be spelled; a prior has nothing to learn from")
    if adapter not in model.adapters:
        model.add_adapter(adapter, seed)
    training = WarmStartSettings(
        method=WarmStartMethod.LORA, steps=settings.steps, batch=settings.batch, lr=settings.lr, weight_decay=0.0
    )
    with _only(model, adapter):
        return fine_tune(model.model, model.tokenizer, examples, training, folder, seed)


@contextmanager
def _only(model: TransformersModel, adapter: str) -> Iterator[None]:
    """One adapter is active and trained; afterwards everything is as before."""
    peft: Any = model.model
    wanted = {id(parameter) for parameter in model.adapter_parameters(adapter).values()}
    before = {parameter: parameter.requires_grad for parameter in peft.parameters()}
    active = peft.active_adapter
    try:
        peft.set_adapter(adapter)
        for parameter in peft.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        peft.set_adapter(active)
        for parameter, trained in before.items():
            parameter.requires_grad_(trained)
        model.base.eval()


def model_prior(model: TransformersModel, format: PriorFormat, adapter: str | None = ADAPTER) -> ModelPrior:
    """A language model as the prior of messages after public contexts; `adapter=None` is the base."""
    return ModelPrior(
        model, format.spelling, adapter, lambda context: format.prompt_ids(context.sender, context.last)
    )


@dataclass(frozen=True, slots=True)
class CodedLength:
    """How long messages are, in bits."""

    per_message: float
    per_episode: float


def coding_report(
    episodes: Sequence[Episode], coders: Mapping[str, MessageCoder], slots: Sequence[Slot] = ()
) -> dict[str, CodedLength]:
    """The lengths of the episodes' messages.

    Args:
        episodes: held-out ones: what a prior was fitted on says nothing about it.
        coders: by a name for their prior; their contexts are `PublicContext`s.
        slots: give the raw length of messages that do not say it themselves.

    Returns:
        `raw` (no model), `own` (the sender's policy, which is not shared), and per coder what is sent, every message
        with an end of its own, and under `NAME, ends apart` the same without the ends.

    Raises:
        CodingError: nobody said anything, or a message came back as another.
        ConfigError: the raw length of a message is not known.
    """
    messages = [message for episode in episodes for message in spoken(episode, slots)]
    if not messages:
        raise CodingError(f"there are no messages in {len(episodes)} episodes")
    raw = [message.raw_bits for message in messages]
    if any(bits is None for bits in raw):
        place = raw.index(None)
        raise ConfigError(f"nothing says how many words could stand in the message {messages[place].text!r}")
    sums = {"raw": math.fsum(bits or 0.0 for bits in raw), "own": math.fsum(message.own_bits for message in messages)}
    for name, coder in coders.items():
        asked = [(message.context, message.text) for message in messages]
        codes = coder.encode(asked)
        back = coder.decode([(context, code) for (context, _), code in zip(asked, codes, strict=True)])
        for (_, text), found in zip(asked, back, strict=True):
            if text != found:
                raise CodingError(f"coded with {name}, {text!r} came back as {found!r}")
        sums[name] = float(sum(code.length for code in codes))
        sums[f"{name}, ends apart"] = math.fsum(coder.bits(asked))
    return {
        name: CodedLength(total / len(messages), total / len(episodes)) for name, total in sums.items()
    }
