"""What agents send each other, and what became of it on its way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

FLOAT_BITS = 32
"""Width of a number that is not quantised."""
MOST_ROUNDS = 16
"""Rounds per step of a world at the most."""


@dataclass(frozen=True, slots=True)
class Latent:
    """A message in numbers: a few short vectors, read by the receiver in the place of words."""

    values: tuple[tuple[float, ...], ...]
    """Tokens × dimensions, as they were sent: quantised where `levels` says so."""
    levels: int = 0
    """How many values each number can take; 0 where it is any number."""
    drawn: tuple[tuple[float, ...], ...] = ()
    """What the sender drew from its Gaussian, before it was bounded and quantised; empty where nothing was drawn."""
    logprobs: tuple[float, ...] = ()
    """Log-density of each vector that was drawn, in nats."""
    words: str = ""
    """What its sender wrote as the message before it was put into vectors. The words are not sent."""

    @property
    def bits(self) -> float:
        """What it takes to send it: a quantised number log2(levels), any other its full width of 32 bits."""
        numbers = sum(len(vector) for vector in self.values)
        return numbers * (math.log2(self.levels) if self.levels else FLOAT_BITS)


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it left its sender, with its price."""

    sender: str
    recipients: tuple[str, ...]
    payload: str
    """The words, separated by single spaces; for a latent message one word per vector, for people."""
    bits: float
    """Length in bits: the negative log2 probability of the sampled words under the sender's own model; of a latent
    message `Latent.bits`."""
    tokens: int
    """Number of tokens in the payload."""
    sent_at: int
    """Environment step in which it was written."""
    word_bits: tuple[float, ...] = ()
    """Length of each word without any model: log2 of how many words could have stood there. One more entry than words
    where the end of the message was a choice, too; empty where nothing of it is known."""
    latent: Latent | None = None

    @property
    def written(self) -> str:
        """The words that its sender wrote."""
        return self.payload if self.latent is None else self.latent.words

    @property
    def raw_bits(self) -> float:
        """Length in bits without any model of what is likely."""
        return sum(self.word_bits) if self.latent is None else self.latent.bits


class Fate(StrEnum):
    """What became of a message on its way to one recipient."""

    ARRIVED = "arrived"
    ERASED = "erased"
    """Lost by chance, or, in a control, there was nobody to swap it with."""
    CAPPED = "capped"
    """Not sent: its sender had no bits left."""
    LATE = "late"
    """Still under way when the episode ended."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message and one recipient."""

    sender: str
    recipient: str
    sent_at: int
    """Environment step in which it was written."""
    fate: Fate
    arrived_at: int | None = None
    """Environment step from which on the recipient has it; None if it never arrived."""
    bits: float = 0.0
    """What went into the channel, in bits without any model (`Message.raw_bits`), after truncation."""
    changed: bool = False
    """Does what arrived differ from what was written (truncated, substituted, noisy, or another's)?"""
