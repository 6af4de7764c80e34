"""The price of a bit: how it is set, and raised until a cap on messages is met.

Parts: `MessagePriceSettings` (a recipe's `grpo.message_price`) and `PriceControl` (dual ascent on the price). How bits
are counted is in `message_meter.py`, who is charged in `message_costs.py`.

A cap B turns "maximise the return R" into "maximise R subject to bits ≤ B". Its dual is min over λ ≥ 0 of max over
policies of R − λ · (bits − B), so λ climbs by the violation. Policies follow slowly, and a price that is nothing but a
sum of violations swings about its goal; the term in the violation itself that damps this is that of PID Lagrangian
methods (Stooke et al., arXiv 2007.03964):

    e_i = (bits_i − B_i) / B_i
    I_{i+1} = min(CEILING, max(0, I_i + g_i · ASCENT · e_i))
    λ_{i+1} = min(CEILING, max(0, I_{i+1} + g_i · DAMPING · e_i)) / B

Nothing needs tuning: e is a share of the cap, and λ · B, what a message of the cap's length costs, is in units of
advantages, which estimators bring to a standard deviation of 1. How fast policies answer to a price is not known
beforehand, so the gain g finds it out (as Rprop does for weights): it is halved when the violation changes its side,
and grows while it stays on one and does not shrink. While there is no price and nothing to bring down, nothing is found
out, and g is 1 again.

The ceiling is for caps that no bearable price meets: the sum stops there, and comes down as soon as bits do.

B_i comes down evenly from what is said in the first iteration to the cap, over a share of the run; then it stays, while
the decaying learning rate of the run lets less and less happen. The control never stops: it is what holds the bits in
place. A cap is a limit from above: where less is said than it allows, the price goes back to 0 and nothing pushes
messages up to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preconcert.agents.codecs import bits_of
from preconcert.core import ConfigError
from preconcert.prompts.speech import Speech

DAMPING = 5.0
"""Price of a message of the cap's length, in advantages, per relative violation, at a gain of 1."""
ASCENT = 2.0
"""What is added to it per relative violation and iteration, at a gain of 1."""
LARGEST = 0.5
"""Relative violations count for no more than this, so that no single iteration makes a price that others must undo."""
NOISE = 0.02
"""Relative violations up to this are taken for chance: they leave the gain as it is."""
GAINS = (1e-3, 16.0)
"""The gain's limits; it starts from 1."""
SLOWER, FASTER = 0.5, 1.3
"""Factors of the gain."""
CEILING = 20.0
"""A message of the cap's length costs no more advantages than this: a higher price would drown everything else that
is learned. A cap that is not met at this price is not met."""
PROGRESS = 0.9
"""A violation shrinks if it is less than this part of the one before."""


class MeterName(StrEnum):
    """How bits are counted."""

    RAW = "raw"
    """log2 of how many words could have stood there (`Message.word_bits`)."""
    PRIOR = "prior"
    """-log2 of a word's probability under a prior that sender and receiver share and that follows what is said: words
    that are said often become cheap."""


class Per(StrEnum):
    """What a cap is on."""

    MESSAGE = "message"
    """The mean message, empty ones included."""
    EPISODE = "episode"
    """All messages of an episode together, on average."""


class MessagePriceSettings(BaseModel):
    """What messages cost their senders. Without a price, a cap or a weight, bits are only logged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    meter: MeterName = MeterName.RAW
    """`raw` or `prior`."""
    price: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of one bit, in units of advantages (rewards, where the credit estimator does not scale them). With a cap it is
    the price of the first iteration, whatever the ceiling."""
    cap_bits: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The price rises until no more bits than these are said; null leaves it as it is."""
    per: Per = Per.MESSAGE
    """`message` or `episode`: what the cap is on."""
    ramp: float = Field(0.5, ge=0, le=1)
    """Share of the run over which the goal comes down from the first iteration's bits to the cap."""
    redundancy: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Price of a word that repeats the one in the same place of its sender's message before, in the same units: a
    plain form of SCMA's penalty on the length of what carries little."""

    @model_validator(mode="after")
    def _ramp_belongs_to_a_cap(self) -> MessagePriceSettings:
        if self.cap_bits is None and "ramp" in self.model_fields_set and self.ramp != 0.5:
            raise ValueError(f"ramp={self.ramp:g} is about a cap, and there is no cap_bits")
        return self


def check_price(settings: MessagePriceSettings, speech: Speech) -> None:
    """Is there something to pay for, and a cap that can be met?

    Raises:
        ConfigError: the task has no messages, or the cap is less than the shortest one.
    """
    if not speech.slots:
        raise ConfigError("grpo.message_price: the task has no messages, so there is nothing to pay for")
    shortest = bits_of(len(speech.slots[0].choices) + 1)
    per_message = settings.per is Per.MESSAGE and settings.meter is MeterName.RAW
    if settings.cap_bits is not None and per_message and settings.cap_bits < shortest:
        raise ConfigError(
            f"grpo.message_price.cap_bits={settings.cap_bits:g} cannot be met: without a model of what is likely, "
            f"even saying nothing costs {shortest:.2f} bits; raise it, or set grpo.message_price.meter=prior"
        )


class PriceControl:
    """The price of a bit from iteration to iteration.

    Args:
        settings: the cap, if there is one, and where to start.
        iterations: length of the run.
    """

    def __init__(self, settings: MessagePriceSettings, iterations: int) -> None:
        self.settings = settings
        self.iterations = iterations
        self.price = settings.price
        """Of one bit, in the present iteration."""
        self.saturated = False
        """Would the present price be higher, were it not for `CEILING`?"""
        self._start: float | None = None
        self._sum, self._gain, self._before = 0.0, 1.0, 0.0

    def goal(self, iteration: int) -> float | None:
        """What should be said in an iteration, in bits per message or episode; None without a cap or before the
        first."""
        cap = self.settings.cap_bits
        if cap is None or self._start is None:
            return None
        steps = self.settings.ramp * self.iterations
        left = max(0.0, 1.0 - iteration / steps) if steps else 0.0
        return cap + left * max(0.0, self._start - cap)

    def observe(self, iteration: int, bits: float, messages: float) -> None:
        """Set the next iteration's price.

        Args:
            iteration: the one that is over, from 0.
            bits: said in it, on average, per message or episode as the cap has it.
            messages: how many of them that is: 1, or those of an episode.
        """
        cap = self.settings.cap_bits
        if cap is None or not messages:
            return
        if self._start is None:
            self._start, self._sum = bits, self.price * cap / messages
        goal = self.goal(iteration)
        assert goal is not None
        violation = max(-LARGEST, min(LARGEST, (bits - goal) / goal))
        self.saturated = False
        if not self.price and not self._sum and violation <= 0:
            # Without a price nothing answers to it: such iterations say nothing of how fast policies do.
            self._gain, self._before = 1.0, 0.0
            return
        self._adapt(violation)
        self._sum = min(CEILING, max(0.0, self._sum + self._gain * ASCENT * violation))
        cost = max(0.0, self._sum + self._gain * DAMPING * violation)
        self.saturated = cost > CEILING
        self.price = min(CEILING, cost) * messages / cap

    def _adapt(self, violation: float) -> None:
        """Find out how fast policies answer."""
        size, before = abs(violation), abs(self._before)
        if violation * self._before < 0 and max(size, before) > NOISE:
            self._gain = max(GAINS[0], self._gain * SLOWER)
        elif violation * self._before > 0 and size > NOISE and size >= PROGRESS * before:
            self._gain = min(GAINS[1], self._gain * FASTER)
        self._before = violation

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration needs, as JSON takes it."""
        return {
            "price": self.price,
            "saturated": self.saturated,
            "start": self._start,
            "sum": self._sum,
            "gain": self._gain,
            "before": self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.price, self._sum = float(state["price"]), float(state["sum"])
        self.saturated = bool(state.get("saturated", False))  # states from before there was a ceiling
        self._gain, self._before = float(state["gain"]), float(state["before"])
        self._start = None if state["start"] is None else float(state["start"])
