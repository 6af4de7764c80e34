"""The starter tokenizer's words: what the task itself says, and the words of the grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from preconcert.core import TaskLanguage
from preconcert.prompts.spans import END_OF_PLAY
from preconcert.prompts.speech import SILENCE
from preconcert.prompts.turn_grammar import DONE_WORDS
from preconcert.prompts.world_format import BY, PARTNERS

TAGS = ("<from>", "<did>", "<me>", "<see>", "<turn>", "<intend>", "<foresee>", "<say>", "<act>")


def starter_words(
    texts: Iterable[str], language: TaskLanguage, agents: Sequence[str], digits: bool = False
) -> list[str]:
    """Every word that a prompt or a turn of the task can contain, in a fixed order.

    Args:
        texts: observations of many episodes, enough to hold every word the task uses.
        language: the task's vocabularies.
        agents: the agents' names.
        digits: also what world models read and write: the digits, kinds of partners, and every label and value of the
            task's view.
    """
    words: dict[str, None] = dict.fromkeys(TAGS)
    words.update(dict.fromkeys(agents))
    words.update(dict.fromkeys((SILENCE, END_OF_PLAY, *DONE_WORDS, *language.actions, *language.rewards)))
    for slot in (*language.message, *language.forecast):
        words.update(dict.fromkeys(slot.choices))
    words.update(dict.fromkeys(sorted({word for text in texts for word in text.split()})))
    if digits:
        words.update(dict.fromkeys(str(digit) for digit in range(10)))
        words.update(dict.fromkeys((BY, *PARTNERS)))
        for item in language.view.fields if language.view is not None else ():
            words.update(dict.fromkeys((*item.label.split(), *item.choices)))
    return list(words)
