"""How messages stand in turns and prompts: which words a turn writes, may it stop early, and what silence looks like.

Parts: `Speech`, `SILENCE`, `STOP`. What a message is made of is a codec's business (`preconcert/agents/codecs/`); it
tells the turn format by a `Speech`.
"""

from __future__ import annotations

from dataclasses import dataclass

from preconcert.core import GrammarError, Slot, TaskLanguage

SILENCE = "quiet"
"""Stands in the prompt for each word of a message that was not received."""
STOP = "stop"
"""Ends a message early in the labelled spelling. The compact one takes `SILENCE`, which every starter model knows."""


@dataclass(frozen=True, slots=True)
class Speech:
    """The form of messages in one task, the same for every agent and step."""

    slots: tuple[Slot, ...] = ()
    """The words that a turn writes after `<say>`, in order; empty: it writes none."""
    stops: bool = False
    """May a word that ends the message stand in the place of any of them?"""
    silence: int = 1
    """How many words stand in the prompt for a message that was not received. The labelled spelling takes one where
    turns write words, whose number readers of labels know."""
    note: str = ""
    """What pretrained models are told about messages besides the words of each slot."""
    vectors: int = 0
    """Places that a message in numbers takes in the prompt; 0 for messages in words. Silence takes as many words."""

    def stop(self, compact: bool) -> str | None:
        """The word that ends a message; None where nothing does.

        Raises:
            GrammarError: a slot has it among its own words.
        """
        if not self.stops:
            return None
        word = SILENCE if compact else STOP
        for slot in self.slots:
            if word in slot.choices:
                raise GrammarError(f"message slot {slot.name!r} has the word {word!r}, which ends messages")
        return word

    def shown_silence(self, compact: bool) -> str:
        """What stands in the prompt for a message that was not received."""
        return " ".join([SILENCE] * (1 if self.slots and not compact and not self.vectors else self.silence))


def whole_messages(language: TaskLanguage) -> Speech:
    """The form in which every word of the task's message slots is written."""
    return Speech(slots=language.message, silence=len(language.message))
