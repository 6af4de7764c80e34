"""What every codec is: how messages stand in turns and prompts, and the message of a finished turn.

Parts: `TurnCodec`; `filled` puts words into a message; `bits_of` is the length of a choice. A codec belongs to a task's
language and to the spans of a turn, and holds no state.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from preconcert.core import Message, Slot, TaskLanguage, Turn
from preconcert.prompts import SpanSettings, Speech


class TurnCodec:
    """The base of all codecs.

    Args:
        language: the task's vocabularies.
        spans: which parts a turn has.
        speech: the form of messages.
    """

    def __init__(self, language: TaskLanguage, spans: SpanSettings, speech: Speech) -> None:
        self.language = language
        self.spans = spans
        self.speech = speech
        """How messages stand in turns and prompts."""

    @property
    def talks(self) -> bool:
        """Is anything said at all?"""
        return self.spans.say and bool(self.language.message)

    def encode(self, turn: Turn) -> Message | None:
        """The message of a finished turn, with the length of every word.

        Args:
            turn: as written. Its message has the words that it wrote, if it wrote any, and says to whom they go.

        Returns:
            None where the turn has no message.
        """
        raise NotImplementedError

    def decode(self, message: Message) -> str:
        """The words that the receiver reads; none for silence."""
        return message.payload

    def slots(self, others: Sequence[str]) -> tuple[Slot, ...]:
        """The words that can stand in each place of a message, for channels that put others there; empty where there
        are none or they are not known.

        Args:
            others: the other agents of the episode, in its order.
        """
        return self.speech.slots

    def shortened(self, words: str, seed: int) -> str:
        """What a scripted player says of what it would say.

        Args:
            words: one per slot of the task.
            seed: everything random follows from it.
        """
        return words

    def check(self, agents: Collection[str]) -> None:
        """Look whether the agents that the settings name exist.

        Raises:
            UnknownNameError: one does not.
        """


def bits_of(choices: Collection[str] | int) -> float:
    """log2 of how many words could stand in a place."""
    return math.log2(choices if isinstance(choices, int) else len(choices))


def filled(message: Message | None, words: Iterable[str], lengths: Iterable[float], bits: float) -> Message | None:
    """A message with words in it that its turn did not write as a message.

    Args:
        message: says from whom and to whom; None stays None.
        words: the payload.
        lengths: `Message.word_bits`.
        bits: `Message.bits`.
    """
    if message is None:
        return None
    said = tuple(words)
    return replace(message, payload=" ".join(said), bits=bits, tokens=len(said), word_bits=tuple(lengths))
