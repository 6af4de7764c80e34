"""Messages as tokens, for coding them: which token sequences are messages, and which message each one is.

Parts: `SlotSpelling` (words of the task's message slots, which an automaton bounds), `FreeSpelling` (text of any kind,
up to the end-of-sequence token), and `Spelling`, what the two have in common. A text that comes back from its tokens as
another one has no spelling; `entropy_coding.py` sends it byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from preconcert.core import GrammarError, Slot
from preconcert.prompts.automaton import Automaton, AutomatonBuilder
from preconcert.prompts.own_template import own_template


class Spelling(Protocol):
    """Text to tokens and back."""

    automaton: Automaton | None
    """Bounds the tokens; None where any token may come next."""
    eos: int
    """Ends every message."""

    def spell(self, text: str) -> tuple[int, ...] | None:
        """The tokens, end of sequence included; None where they would not give the same text back."""
        ...

    def read(self, ids: Sequence[int]) -> str:
        """The text of the tokens, end of sequence included."""
        ...


class SlotSpelling:
    """One word per slot, in order, separated by single spaces in the text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        slots: the words that may stand in each place.
        stops: the message may end before any of its words.

    Raises:
        GrammarError: the tokenizer does not know a word, or cannot tell two apart.
    """

    def __init__(self, tokenizer: Any, slots: Sequence[Slot], stops: bool = False) -> None:
        self.slots = tuple(slots)
        self.stops = stops
        self.eos: int = tokenizer.eos_token_id
        self._ids = [{word: _word_ids(tokenizer, word) for word in slot.choices} for slot in self.slots]
        self._words = [{ids: word for word, ids in table.items()} for table in self._ids]
        builder = AutomatonBuilder()
        for number, table in enumerate(self._ids):
            end = [(self.eos,)] if stops else []
            builder.choice([*table.values(), *end], {(self.eos,): len(self.slots) - number} if stops else None)
        builder.literal([self.eos])
        self.automaton: Automaton | None = builder.build()

    def spell(self, text: str) -> tuple[int, ...] | None:
        """The words' tokens; None where the text is not exactly words of the slots."""
        words = text.split(" ") if text else []
        whole = len(words) == len(self.slots)
        if not whole and not (self.stops and len(words) < len(self.slots)):
            return None
        ids: list[int] = []
        for word, table in zip(words, self._ids, strict=False):
            if word not in table:
                return None
            ids.extend(table[word])
        return (*ids, self.eos)

    def read(self, ids: Sequence[int]) -> str:
        """The words, separated by single spaces.

        Raises:
            GrammarError: these are no words of the slots.
        """
        words: list[str] = []
        start = 0
        for end in range(1, len(ids)):
            if len(words) < len(self._words) and tuple(ids[start:end]) in self._words[len(words)]:
                words.append(self._words[len(words)][tuple(ids[start:end])])
                start = end
        if start + 1 != len(ids) or ids[-1] != self.eos:
            raise GrammarError(f"not a message: tokens {list(ids)[start : start + 8]} after {' '.join(words)!r}")
        return " ".join(words)


class FreeSpelling:
    """Text as the tokenizer spells it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_tokens: longer texts have no spelling; the end of sequence counts.
    """

    automaton: Automaton | None = None

    def __init__(self, tokenizer: Any, max_tokens: int = 128) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.eos: int = tokenizer.eos_token_id

    def spell(self, text: str) -> tuple[int, ...] | None:
        """The tokens; None where the text is too long, has the end of sequence in it, or comes back changed."""
        # No token stands for more than a few dozen characters, so a book is not tokenised only to be refused.
        if len(text) > 64 * self.max_tokens:
            return None
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates, which tokenizers do not take
            return None
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        if len(ids) >= self.max_tokens or self.eos in ids or self._decode(ids) != text:
            return None
        return (*ids, self.eos)

    def read(self, ids: Sequence[int]) -> str:
        """The text."""
        return self._decode(ids[:-1])

    def _decode(self, ids: Sequence[int]) -> str:
        decoded: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded


def _word_ids(tokenizer: Any, word: str) -> tuple[int, ...]:
    """One token where the tokenizer knows whole words; else with a mark behind it, so that no word begins another."""
    compact = own_template(tokenizer) is None
    ids = tuple(tokenizer.encode(word if compact else f" {word};", add_special_tokens=False))
    unknown = tokenizer.unk_token_id
    if not ids or (unknown is not None and unknown in ids):
        raise GrammarError(f"the tokenizer does not know {word!r}")
    return ids
