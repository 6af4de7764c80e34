"""Codec `raw-state`: the sender's observation, verbatim. The yardstick of what talking can be worth, and of its cost.

Its bits are those of a fair code without any model. Where the task has a view, labels are the same in every message
and cost nothing, and a value costs log2 of how many its field can take. Without one, each word could be any of those
that observations of the task contain, or the end: log2(words + 1) each, the end included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from preconcert.agents.codecs.codec import TurnCodec, bits_of, filled
from preconcert.core import ConfigError, Message, Slot, TaskLanguage, Turn, View
from preconcert.prompts import SpanSettings, Speech


class RawStateCodec(TurnCodec):
    """Observations as messages. Also a turn that cannot be read sends one.

    Args:
        language: the task's vocabularies.
        spans: which parts a turn has.

    Raises:
        ConfigError: nothing says which words observations consist of.
    """

    def __init__(self, language: TaskLanguage, spans: SpanSettings) -> None:
        super().__init__(language, spans, Speech(note="What another agent is said to have said is what it saw."))
        if self.talks and language.view is None and not language.views and not language.words:
            raise ConfigError(
                "agent.codec=raw-state counts bits by the words of observations, and the task's language has neither a "
                "view nor words; give it one of them, or use the codec slots, learned or intention"
            )

    def slots(self, others: Sequence[str]) -> tuple[Slot, ...]:
        """Labels, and the values of the fields of the view of whoever is not among the others; not known without."""
        own = [view for agent, view in self.language.views if agent not in others]
        view = own[0] if own else self.language.view
        found: list[Slot] = []
        for field in () if view is None else view.fields:
            found += [Slot(f"{field.name} label", (word,)) for word in field.label.split()]
            found.append(Slot(field.name, field.choices))
        return tuple(found)

    def encode(self, turn: Turn) -> Message | None:
        """What was seen. Given the observation nothing about it is left to chance, so its own model needs 0 bits.

        Raises:
            ConfigError: the observation has a word that its task did not declare.
        """
        words = turn.observation.text.split()
        view = self.language.view_of(turn.agent)
        if view is not None:
            lengths = _lengths(view)
        else:
            unknown = [word for word in words if word not in self.language.words]
            if unknown:
                raise ConfigError(f"the task's language.words lack {unknown[0]!r}, which {turn.agent!r} sees")
            lengths = (bits_of(len(self.language.words) + 1),) * (len(words) + 1)
        if len(lengths) < len(words):
            raise ConfigError(f"{turn.observation.text!r} is not of the task's view")
        return filled(turn.message, words, lengths, 0.0)


@lru_cache(maxsize=64)
def _lengths(view: View) -> tuple[float, ...]:
    """Bits of every word of a view's text: labels are no news."""
    found: list[float] = []
    for field in view.fields:
        found += [0.0] * len(field.label.split()) + [bits_of(field.choices)]
    return tuple(found)
