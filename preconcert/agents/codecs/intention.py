"""Codec `intention`: what the sender's turn intends and foresees, as it wrote it there.

The words, always in this order and as many: its action, the fields of its forecast, the foretold reward and end, and
what it expects others to do, in the order of the agents. Parts that its turns do not have are left out. A word costs
log2 of how many could stand in its place; all of them are closed sets of the task. An action without an alternative,
such as `listen` in a round of talk, costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from preconcert.agents.codecs.codec import TurnCodec, bits_of, filled
from preconcert.agents.codecs.settings import IntentionSettings
from preconcert.core import Message, Slot, SpanKind, TaskLanguage, Turn, UnknownNameError
from preconcert.prompts import DONE_WORDS, END_OF_PLAY, SpanSettings, Speech

_FORETOLD = ("reward", "done")


class IntentionCodec(TurnCodec):
    """Plans as messages. A turn that cannot be read has none, and says nothing.

    Args:
        language: the task's vocabularies.
        spans: which parts a turn has.
        settings: which parts are said.
    """

    def __init__(self, language: TaskLanguage, spans: SpanSettings, settings: IntentionSettings) -> None:
        self.settings = settings
        self._fields = language.forecast if spans.foresee and settings.forecast else ()
        self._foretells = spans.foresee and settings.reward and bool(language.rewards)
        self._foretold = language.actions if spans.intend_steps == 1 else (*language.actions, END_OF_PLAY)
        self._action, self._expected = bits_of(language.actions), bits_of(self._foretold)
        parts = ["what it does", *(f"what it foresees of {slot.name}" for slot in self._fields)]
        parts += ["the reward it foresees", "whether it is over then"] if self._foretells else []
        parts += ["what it expects others to do"] if spans.intend and settings.about != () else []
        note = f"What another agent is said to have said is, in this order, {', '.join(parts)}."
        super().__init__(language, spans, Speech(note=note))

    def slots(self, others: Sequence[str]) -> tuple[Slot, ...]:
        """The plan's words in their order."""
        found = [Slot("action", self.language.actions), *self._fields]
        if self._foretells:
            found += [Slot("reward", self.language.rewards), Slot("done", DONE_WORDS)]
        for other in others if self.spans.intend else ():
            if self.settings.about is None or other in self.settings.about:
                found += [Slot(f"{other} {step}", self._foretold) for step in range(self.spans.intend_steps)]
        return tuple(found)

    def encode(self, turn: Turn) -> Message | None:
        """The turn's plan in words; bits are those of these very words under the sender's own model."""
        if turn.malformed:
            return None
        forced = len(turn.observation.legal_actions) == 1
        words, lengths = [turn.action], [0.0 if forced else self._action]
        said = {(SpanKind.ACT, "action")}
        if turn.forecast is not None:
            for slot in self._fields:
                words.append(turn.forecast.fields[slot.name])
                lengths.append(bits_of(slot.choices))
                said.add((SpanKind.FORESEE, slot.name))
            if self._foretells and turn.forecast.reward is not None:
                words += [turn.forecast.reward, DONE_WORDS[bool(turn.forecast.done)]]
                lengths += [bits_of(self.language.rewards), bits_of(DONE_WORDS)]
                said |= {(SpanKind.FORESEE, name) for name in _FORETOLD}
        for intention in turn.intentions if self.spans.intend else ():
            if self.settings.about is None or intention.about in self.settings.about:
                words += intention.actions
                lengths += [self._expected] * len(intention.actions)
                said.add((SpanKind.INTEND, intention.about))
        places = [span for span in turn.spans if (span.kind, span.slot) in said]
        bits = -sum(sum(turn.logprobs[span.start : span.end]) for span in places) / math.log(2.0) + 0.0
        return filled(turn.message, words, lengths, bits)

    def check(self, agents: Collection[str]) -> None:
        """Are there the agents that messages are about?"""
        for agent in self.settings.about or ():
            if agent not in agents:
                raise UnknownNameError("agent", agent, agents)
