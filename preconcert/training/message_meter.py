"""How bits of messages are counted while training.

Parts: `Written` (a message as it is counted), `Meter`, its two kinds `RawMeter` and `PriorMeter`, and `meter_of`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from preconcert.agents import ChannelMode, ChannelSettings
from preconcert.core import Message
from preconcert.prompts import Speech
from preconcert.training.message_price import MeterName
from preconcert.training.message_prior import CountPrior, PublicContext, Spoken

WINDOW = 4
"""Iterations whose messages a prior is made of."""


@dataclass(frozen=True, slots=True)
class Written:
    """A message that its sender wrote word by word."""

    message: Message
    before: Message | None
    """The sender's message in the turn before."""


class Meter(Protocol):
    """Counts the bits of messages, and may learn from them."""

    def lengths(self, messages: Sequence[Written]) -> list[tuple[float, ...]]:
        """Bits of every word of each message, and of its end where that was a choice: as many as `word_bits`."""
        ...

    def learn(self, messages: Sequence[Written]) -> None:
        """What was said in an iteration; it counts from the next one on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration needs, as JSON takes it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


class RawMeter:
    """Counts what words cost without any model, and learns nothing."""

    def lengths(self, messages: Sequence[Written]) -> list[tuple[float, ...]]:
        """As the messages say of themselves."""
        return [each.message.word_bits for each in messages]

    def learn(self, messages: Sequence[Written]) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class PriorMeter:
    """-log2 of each word's probability under the counts of what was said in the last iterations (`CountPrior`).

    In the first iteration nothing was said yet, and every word costs what it does without a model. What counts as known
    is who speaks, and what it said last where nothing can happen to that on its way.

    Args:
        speech: the form of messages.
        follows: does the receiver know what the sender said last?
    """

    def __init__(self, speech: Speech, follows: bool) -> None:
        self.speech = speech
        self.follows = follows
        self._said: list[Counter[Spoken]] = []
        self._prior = self._fitted()

    def lengths(self, messages: Sequence[Written]) -> list[tuple[float, ...]]:
        """Under the prior as it is."""
        known: dict[Spoken, tuple[float, ...]] = {}
        found: list[tuple[float, ...]] = []
        for each in messages:
            spoken = self._spoken(each)
            if spoken not in known:
                known[spoken] = self._bits(spoken)
            found.append(known[spoken][: len(each.message.word_bits)])
        return found

    def learn(self, messages: Sequence[Written]) -> None:
        """They come in and the oldest iteration goes."""
        self._said = [*self._said, Counter(self._spoken(each) for each in messages)][-WINDOW:]
        self._prior = self._fitted()

    def state_dict(self) -> dict[str, Any]:
        """What was said in the last iterations: sender, what it had said before, words, how often."""
        return {
            "said": [
                sorted(
                    ([each.context.sender, each.context.last, each.text, count] for each, count in counts.items()),
                    key=repr,
                )
                for counts in self._said
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The same prior again."""
        self._said = [
            Counter({Spoken(PublicContext(sender, last), text, 0.0, None): count for sender, last, text, count in part})
            for part in state["said"]
        ]
        self._prior = self._fitted()

    def _spoken(self, each: Written) -> Spoken:
        last = each.before.payload if self.follows and each.before is not None else None
        return Spoken(PublicContext(each.message.sender, last), each.message.payload, 0.0, None)

    def _fitted(self) -> CountPrior:
        prior = CountPrior(self.speech.slots, self.speech.stops)
        for counts in self._said:
            prior.fit(each for each, count in counts.items() for _ in range(count))
        return prior

    def _bits(self, spoken: Spoken) -> tuple[float, ...]:
        symbols = self._prior.spell(spoken.text)
        assert symbols is not None  # learners write words of the slots
        asked = [(spoken.context, symbols[:place]) for place in range(len(symbols))]
        return tuple(
            -float(expected.logprobs[expected.symbols.index(symbol)]) / math.log(2.0) + 0.0
            for expected, symbol in zip(self._prior.expect(asked), symbols, strict=True)
            if expected.symbols is not None
        )


def meter_of(name: MeterName, speech: Speech, channel: ChannelSettings, harmed: bool = False) -> Meter:
    """The meter of a run.

    Args:
        name: which.
        speech: the form of messages.
        channel: what can happen to them.
        harmed: more than that can.
    """
    if name is MeterName.RAW:
        return RawMeter()
    plain = ChannelSettings(rounds=channel.rounds, mode=ChannelMode.ON)
    return PriorMeter(speech, follows=channel == plain and not harmed)
