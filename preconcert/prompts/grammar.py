"""A sequence of pieces as tokens: written, strictly parsed, and as an automaton.

Parts: `Grammar` and `Reading`, one word that was written or read. Which pieces there are is said in `turn_grammar.py`
and `world_grammar.py`; nothing here knows what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from preconcert.core import GrammarError
from preconcert.prompts.automaton import Automaton, AutomatonBuilder
from preconcert.prompts.turn_grammar import Piece


@dataclass(frozen=True, slots=True)
class Reading:
    """One word and where it stands."""

    piece: Piece
    word: str
    start: int
    """First token."""
    end: int
    """One past the last token."""


class Grammar:
    """Pieces in sequence, followed by the end of sequence.

    Args:
        pieces: in order. Options of one piece that skip anything skip the same, and nothing beyond what an earlier
            piece may skip.
        encode: the ids of a text.
        tokenizer: a Hugging Face tokenizer, for reading text back.
        compact: words stand alone, one token each; otherwise each is followed by `;`.
    """

    def __init__(
        self, pieces: Sequence[Piece], encode: Callable[[str], tuple[int, ...]], tokenizer: Any, compact: bool
    ) -> None:
        self.pieces = tuple(pieces)
        self.compact = compact
        self._encode = encode
        self._tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.tokens: tuple[dict[str, tuple[int, ...]], ...] = tuple(
            {word: self._ids(piece, word) for word in piece.options} for piece in self.pieces
        )
        """Per piece: the ids of each option."""
        self.automaton: Automaton | None = None
        """None where some piece is words of any kind."""
        if all(piece.options for piece in self.pieces):
            builder = AutomatonBuilder()
            for piece, tokens in zip(self.pieces, self.tokens, strict=True):
                builder.choice(list(tokens.values()), {tokens[word]: skip for word, skip in piece.skips})
            builder.literal([self.eos])
            self.automaton = builder.build()

    def write(self, word_of: Callable[[Piece], str]) -> tuple[tuple[int, ...], list[Reading]]:
        """The ids, end of sequence included, and the words in them.

        Args:
            word_of: the word at a piece; asked in order, and only for pieces that are not skipped.

        Raises:
            GrammarError: from `word_of`, or its word is no option.
        """
        ids: list[int] = []
        readings: list[Reading] = []
        at = 0
        while at < len(self.pieces):
            piece = self.pieces[at]
            word = piece.options[0] if piece.kind is None else word_of(piece)
            start = len(ids)
            if piece.options and word not in self.tokens[at]:
                raise GrammarError(
                    f"{piece.kind} {piece.slot}: {word!r} is not one of {', '.join(piece.options)}"
                )
            ids.extend(self.tokens[at][word] if piece.options else self._free(at, word))
            if piece.kind is not None:
                readings.append(Reading(piece, word, start, len(ids)))
            at += 1 + dict(piece.skips).get(word, 0)
        return (*ids, self.eos), readings

    def chosen(self, ids: Sequence[int], readings: Sequence[Reading]) -> tuple[bool, ...]:
        """Per token: does the grammar leave a choice about it? Words of any kind are choices throughout."""
        if self.automaton is not None:
            states = self.automaton.walk(ids)[:-1]
            return tuple(len(self.automaton.transitions[state]) > 1 for state in states)
        inside = {place for reading in readings for place in range(reading.start, reading.end)}
        # The mark that ends words of any kind is a choice, too.
        inside |= {reading.end for reading in readings if not reading.piece.options}
        return tuple(place in inside for place in range(len(ids)))

    def parse(self, ids: Sequence[int]) -> list[Reading]:
        """Read a sequence back.

        Raises:
            GrammarError: it is not exactly one of this grammar.
        """
        if self.automaton is not None:
            try:
                return self._parse_tokens(self.automaton, ids)
            except GrammarError:
                if self.compact:
                    raise
        return self._parse_text(ids)

    def _parse_tokens(self, automaton: Automaton, ids: Sequence[int]) -> list[Reading]:
        states = automaton.walk(ids)
        if not automaton.is_final(states[-1]):
            raise GrammarError(f"the text breaks off after {len(ids)} tokens")
        position = {state: index for index, state in enumerate(states)}
        visited = [(at, position[entry]) for at, entry in enumerate(automaton.entries) if entry in position]
        readings: list[Reading] = []
        for (at, start), (_, end) in zip(visited, visited[1:], strict=False):
            piece = self.pieces[at]
            if piece.kind is None:
                continue
            written = tuple(ids[start:end])
            word = next(word for word, option in self.tokens[at].items() if option == written)
            readings.append(Reading(piece, word, start, end))
        return readings

    def _parse_text(self, ids: Sequence[int]) -> list[Reading]:
        """Free-running text: the same grammar, any tokenisation, white space left loose."""
        whole = self.automaton is not None or (len(ids) > 0 and ids[-1] == self.eos)
        body = list(ids[:-1] if ids and ids[-1] == self.eos else ids)
        text = self._tokenizer.decode(body)
        match = re.fullmatch(r"\s*" + self._pattern(0, len(self.pieces)), text) if whole else None
        if match is None:
            raise GrammarError(f"not of this grammar: {text[:80]!r}")
        ends = [len(self._tokenizer.decode(body[: i + 1])) for i in range(len(body))]
        readings: list[Reading] = []
        for at, piece in enumerate(self.pieces):
            if piece.kind is None:
                continue
            name = next((name for name in (f"p{at}", f"s{at}") if match.groupdict().get(name) is not None), None)
            if name is None:  # skipped
                continue
            first, last = match.span(name)
            start = next((i for i, end in enumerate(ends) if end > first), len(body))
            stop = next(i for i, end in enumerate(ends) if end >= last) + 1 if last > first else start
            spelled = match.group(name)
            options = {self._spell(piece, word): word for word in piece.options}
            readings.append(Reading(piece, options[spelled] if piece.options else spelled, start, stop))
        return readings

    def _pattern(self, start: int, stop: int) -> str:
        """A regular expression for a range of pieces; group `pN` is the word at piece N, `sN` one that skips."""
        gap = r"(?:\s+|$)" if self.compact else r"\s*"
        close = gap if self.compact else r";\s*"
        pattern = ""
        at = start
        while at < stop:
            piece = self.pieces[at]
            skipping = dict(piece.skips)
            if piece.kind is None:
                words = piece.options[0].split()
                pattern += (r"\s+" if self.compact else r"\s*").join(re.escape(word) for word in words)
                pattern += gap if words else ""
            elif not piece.options:
                mark = re.escape(self.pieces[at + 1].options[0].strip()) if self.compact else r"\n"
                pattern += rf"(?P<p{at}>(?:(?!{mark}).)*?)\s*" + ("" if self.compact else r"\n\s*")
            else:
                plain = "|".join(re.escape(self._spell(piece, w)) for w in piece.options if w not in skipping)
                word = f"(?P<p{at}>{plain}){close}"
                if skipping:
                    over = "|".join(re.escape(self._spell(piece, skipper)) for skipper in skipping)
                    skip = max(skipping.values())  # they all skip the same
                    word = f"(?:(?P<s{at}>{over}){close}|{word}{self._pattern(at + 1, at + 1 + skip)})"
                    at += skip
                pattern += word
            at += 1
        return pattern

    def _ids(self, piece: Piece, word: str) -> tuple[int, ...]:
        if piece.kind is None:
            return self._encode(word)
        return self._encode(self._spell(piece, word) if self.compact else f" {self._spell(piece, word)};")

    def _free(self, at: int, text: str) -> tuple[int, ...]:
        """The ids of words of any kind."""
        mark = self.pieces[at + 1].options[0].strip() or "\n"
        if mark in text:
            raise GrammarError(f"{self.pieces[at].slot}: {text[:80]!r} has {mark!r} in it, which ends it")
        return self._encode(text if self.compact else f" {text}") if text else ()

    def _spell(self, piece: Piece, word: str) -> str:
        if not piece.digits:
            return word
        digits = word.zfill(piece.digits)
        return " ".join(digits) if self.compact else digits
