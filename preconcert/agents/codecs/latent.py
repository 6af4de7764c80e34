"""Codec `latent`: a few vectors, written by learned queries that read what the sender has read and written.

The turn holds the task's words as with `slots`: they are the sender's own note of what it means to say, which the
queries read with all the rest of the turn, and which is not sent. `GenerativeTeam` has the model write the vectors once
the turns of a step are there; what they cost is `Latent.bits`.
"""

from __future__ import annotations

from preconcert.agents.codecs.codec import TurnCodec
from preconcert.agents.codecs.settings import LatentCodecSettings
from preconcert.core import Message, TaskLanguage, Turn
from preconcert.prompts import SpanSettings, Speech


class LatentTurnCodec(TurnCodec):
    """Messages in numbers.

    Args:
        language: the task's vocabularies.
        spans: which parts a turn has.
        settings: shape of the messages.
    """

    def __init__(self, language: TaskLanguage, spans: SpanSettings, settings: LatentCodecSettings) -> None:
        note = "What another agent is said to have said is no words; it is for you to make sense of."
        speech = Speech(language.message, silence=settings.tokens, note=note, vectors=settings.tokens)
        super().__init__(language, spans, speech)
        self.settings = settings

    def encode(self, turn: Turn) -> Message | None:
        """The message as it is: its vectors come from the model."""
        return turn.message
