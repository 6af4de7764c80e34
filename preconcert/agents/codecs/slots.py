"""Codec `slots`: every word of the task's message slots is written in every turn."""

from __future__ import annotations

from dataclasses import replace

from preconcert.agents.codecs.codec import TurnCodec, bits_of
from preconcert.core import Message, TaskLanguage, Turn
from preconcert.prompts import SpanSettings, whole_messages


class SlotsCodec(TurnCodec):
    """Messages of a fixed length, in the task's own words.

    Args:
        language: the task's vocabularies.
        spans: which parts a turn has.
    """

    def __init__(self, language: TaskLanguage, spans: SpanSettings) -> None:
        super().__init__(language, spans, whole_messages(language))
        self._lengths = tuple(bits_of(slot.choices) for slot in language.message)

    def encode(self, turn: Turn) -> Message | None:
        """The words as written."""
        return None if turn.message is None else replace(turn.message, word_bits=self._lengths)
