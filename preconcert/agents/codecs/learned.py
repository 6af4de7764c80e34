"""Codec `learned`: words of the task's message slots, and the sender decides how many.

At every position one more word can be chosen, which ends the message: with n words to choose from, each word, and the
end where it comes early, costs log2(n + 1) bits. A message that is ended at once has no words; it is delivered, and
reads like silence. With a price on bits (`grpo.message_price`) the sender learns which words are worth saying.

What can be learned depends on what the warm start has seen, so scripted players are made to say less: see `shortened`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from preconcert.agents.codecs.codec import TurnCodec, bits_of
from preconcert.agents.codecs.settings import LearnedSettings, Words
from preconcert.core import Message, Slot, TaskLanguage, Turn
from preconcert.prompts import STOP, SpanSettings, Speech


class LearnedCodec(TurnCodec):
    """Messages of any length up to a limit.

    Args:
        language: the task's vocabularies.
        spans: which parts a turn has.
        settings: how many words, and which.
    """

    def __init__(self, language: TaskLanguage, spans: SpanSettings, settings: LearnedSettings) -> None:
        self.settings = settings
        slots = language.message
        if settings.words is Words.FREE and slots:
            union = tuple(dict.fromkeys(word for slot in slots for word in slot.choices))
            slots = tuple(Slot(f"word{place}", union) for place in range(1, (settings.max_words or len(slots)) + 1))
        slots = slots[: settings.max_words]
        note = f"A message may be short: write {STOP}; in the place of a VALUE and nothing after it on that line."
        super().__init__(language, spans, Speech(slots, stops=True, silence=1, note=note if slots else ""))
        self._lengths = tuple(bits_of(len(slot.choices) + 1) for slot in slots)

    def encode(self, turn: Turn) -> Message | None:
        """The words as written; the end counts where it was chosen."""
        if turn.message is None:
            return None
        count = len(turn.message.payload.split())
        return replace(turn.message, word_bits=self._lengths[: count + 1])

    def shortened(self, words: str, seed: int) -> str:
        """A part of the messages is cut: after a word drawn evenly (but the first stays), and then words at the end
        that say nothing (`Slot.null`) are left out. So a message is empty only where there is nothing to say, and
        what a cut leaves means what it meant before. Free words leave out all that say nothing, cut or not: there
        they hold no place.
        """
        said = list(zip(words.split(), self.language.message, strict=True))
        rng = np.random.default_rng(seed)
        free = self.settings.words is Words.FREE
        if free:
            said = [(word, slot) for word, slot in said if word != slot.null]
        said = said[: len(self.speech.slots)]
        if said and rng.random() < self.settings.shorten:
            said = said[: int(rng.integers(1, len(said) + 1))]
            while said and said[-1][0] == said[-1][1].null:
                said.pop()
        return " ".join(word for word, _ in said)
