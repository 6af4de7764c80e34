"""How a model is asked what somebody will say, by those who know only who speaks and what was heard from it last.

Parts: `PriorFormat`. The compact spelling is `<from> NAME words <say>`, made of words that every starter model knows;
any other tokenizer is asked in a sentence, within its chat template.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preconcert.core import Slot
from preconcert.prompts.message_spelling import FreeSpelling, SlotSpelling, Spelling
from preconcert.prompts.speech import SILENCE
from preconcert.prompts.turn_format import TurnFormat

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=False
)


class PriorFormat:
    """Prompts and messages of a prior over messages.

    Args:
        turns: of the same task and tokenizer.
        slots: the words that may stand in each place of a message; None for messages in words of any kind.
        stops: a message may end before any of its words.
    """

    def __init__(self, turns: TurnFormat, slots: tuple[Slot, ...] | None = None, stops: bool = False) -> None:
        self.turns = turns
        self.slots = slots
        self.spelling: Spelling = (
            FreeSpelling(turns.tokenizer) if slots is None else SlotSpelling(turns.tokenizer, slots, stops)
        )

    def prompt_ids(self, sender: str, last: str | None) -> tuple[int, ...]:
        """The prompt.

        Args:
            sender: who is about to speak.
            last: what was heard from it last; None for nothing. What the tokenizer does not know counts as nothing, so
                that whatever was said, both sides ask the same.
        """
        if last is not None and self.spelling.spell(last) is None:
            last = None
        if self.turns.compact:
            silence = " ".join([SILENCE] * max(1, len(self.slots or ())))
            return self.turns.encode(f"<from> {sender} {last or silence} <say>")
        asked = _TEMPLATES.get_template("prior.jinja").render(sender=sender, last=last).strip()
        return self.turns.encode(self.turns.chat_text([{"role": "user", "content": asked}]))
