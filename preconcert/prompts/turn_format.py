"""Turns as tokens: prompts rendered, turns written and strictly parsed, the automaton that constrains them.

Parts: `TurnFormat`. A tokenizer with a chat template gets the labelled spelling inside that template; any other gets
the compact one. Nothing is ever tokenised twice: a parse works on the ids as sampled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preconcert.core import GrammarError, Message, Observation, Span, TaskLanguage
from preconcert.prompts.automaton import Automaton, AutomatonBuilder
from preconcert.prompts.spans import SpanSettings, TurnContent
from preconcert.prompts.turn_grammar import Piece, content_of, turn_pieces, word_of

SILENCE = "quiet"
"""Stands in the prompt for each word of a message that was not received."""

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=False
)


@dataclass(frozen=True, slots=True)
class Mail:
    """One line of the inbox as the prompt shows it."""

    sender: str
    words: str


@dataclass(frozen=True, slots=True)
class Written:
    """A turn as tokens."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    chosen: tuple[bool, ...]
    """False for the tokens that the grammar leaves no choice about."""


@dataclass(frozen=True, slots=True)
class _Compiled:
    pieces: tuple[Piece, ...]
    tokens: tuple[Mapping[str, tuple[int, ...]], ...]
    """Per piece: the ids of each option."""
    automaton: Automaton


class TurnFormat:
    """One task's turns for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        language: the task's vocabularies.
        spans: which parts a turn has.
        memory: how many of its own last actions an agent is reminded of.
    """

    def __init__(self, tokenizer: Any, language: TaskLanguage, spans: SpanSettings, memory: int = 0) -> None:
        self.tokenizer = tokenizer
        self.language = language
        self.spans = spans
        self.memory = memory
        self.compact = not getattr(tokenizer, "chat_template", None)
        self.eos: int = tokenizer.eos_token_id
        self._compile = lru_cache(maxsize=4096)(self._compile_uncached)
        self._encode_literal = lru_cache(maxsize=65536)(self._encode_uncached)

    # ---- prompts

    def prompt_ids(
        self,
        agent: str,
        observation: Observation,
        inbox: Sequence[Message],
        others: Sequence[str],
        memory: Sequence[str] = (),
    ) -> tuple[int, ...]:
        """The prompt of a turn that stands alone (context `turn`, or the first turn of a transcript)."""
        fields = self._fields(agent, observation, inbox, others, memory)
        if self.compact:
            return self._encode_literal(_TEMPLATES.get_template("starter.jinja").render(fields).strip())
        chat = [
            {"role": "system", "content": _TEMPLATES.get_template("system.jinja").render(fields).strip()},
            {"role": "user", "content": _TEMPLATES.get_template("user.jinja").render(fields).strip()},
        ]
        return self._encode_literal(self._apply_template(chat, answer_next=True))

    def followup_ids(
        self,
        agent: str,
        observation: Observation,
        inbox: Sequence[Message],
        others: Sequence[str],
        ended_with_eos: bool,
    ) -> tuple[int, ...]:
        """What is appended to a transcript after a completion, up to the next one."""
        fields = self._fields(agent, observation, inbox, others, ())
        if self.compact:
            return self._encode_literal(_TEMPLATES.get_template("starter.jinja").render(fields).strip())
        sentinel = "\u2063answer\u2063"
        chat = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": sentinel},
            {"role": "user", "content": _TEMPLATES.get_template("user.jinja").render(fields).strip()},
        ]
        _, _, tail = self._apply_template(chat, answer_next=True).rpartition(sentinel)
        eos = self.tokenizer.eos_token
        if ended_with_eos and tail.startswith(eos):
            tail = tail[len(eos) :]
        return self._encode_literal(tail)

    def _fields(
        self,
        agent: str,
        observation: Observation,
        inbox: Sequence[Message],
        others: Sequence[str],
        memory: Sequence[str],
    ) -> dict[str, Any]:
        mails: list[Mail] = []
        if self.spans.say and self.language.message:
            heard = {message.sender: message.payload for message in inbox}
            silence = " ".join([SILENCE] * len(self.language.message)) if self.compact else SILENCE
            mails = [Mail(other, heard.get(other) or silence) for other in others]
        recent = list(memory)[-self.memory :] if self.memory else []
        recent = [SILENCE] * (self.memory - len(recent)) + recent
        return {
            "agent": agent,
            "observation": observation,
            "others": list(others),
            "inbox": mails,
            "memory": recent,
            "language": self.language,
            "spans": self.spans,
        }

    def _apply_template(self, chat: list[dict[str, str]], answer_next: bool) -> str:
        return self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=answer_next, enable_thinking=False
        )

    # ---- turns

    def automaton(self, others: Sequence[str], legal: Sequence[str]) -> Automaton:
        """The automaton of one agent's turn, end of sequence included."""
        return self._compile(tuple(others), tuple(legal)).automaton

    def write(self, content: TurnContent, others: Sequence[str], legal: Sequence[str]) -> Written:
        """A turn as the automaton would spell it, end of sequence included.

        Raises:
            GrammarError: the content does not fit the grammar.
        """
        compiled = self._compile(tuple(others), tuple(legal))
        ids: list[int] = []
        spans: list[Span] = []
        for piece, tokens in zip(compiled.pieces, compiled.tokens, strict=True):
            word = piece.options[0] if piece.kind is None else word_of(content, piece, self.language)
            start = len(ids)
            ids.extend(tokens[word])
            if piece.kind is not None:
                spans.append(Span(piece.kind, start, len(ids), piece.slot))
        ids.append(self.eos)
        states = compiled.automaton.walk(ids)[:-1]
        chosen = tuple(len(compiled.automaton.transitions[state]) > 1 for state in states)
        return Written(tuple(ids), tuple(spans), chosen)

    def parse(
        self, ids: Sequence[int], others: Sequence[str], legal: Sequence[str]
    ) -> tuple[TurnContent, tuple[Span, ...]]:
        """Read a turn back.

        Raises:
            GrammarError: it is not exactly a turn of this grammar.
        """
        compiled = self._compile(tuple(others), tuple(legal))
        try:
            return self._parse_tokens(compiled, ids)
        except GrammarError:
            if self.compact:
                raise
        return self._parse_text(compiled, ids)

    def text(self, ids: Sequence[int]) -> str:
        """The words of a completion, for people."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _parse_tokens(self, compiled: _Compiled, ids: Sequence[int]) -> tuple[TurnContent, tuple[Span, ...]]:
        states = compiled.automaton.walk(ids)
        if not compiled.automaton.is_final(states[-1]):
            raise GrammarError(f"the turn breaks off after {len(ids)} tokens")
        position = {state: index for index, state in enumerate(states)}
        starts = [position[entry] for entry in compiled.automaton.entries]
        words: list[tuple[Piece, str]] = []
        spans: list[Span] = []
        for piece, tokens, start, end in zip(compiled.pieces, compiled.tokens, starts, starts[1:], strict=False):
            if piece.kind is None:
                continue
            written = tuple(ids[start:end])
            words.append((piece, next(word for word, option in tokens.items() if option == written)))
            spans.append(Span(piece.kind, start, end, piece.slot))
        return content_of(words), tuple(spans)

    def _parse_text(self, compiled: _Compiled, ids: Sequence[int]) -> tuple[TurnContent, tuple[Span, ...]]:
        """Free-running text of a chat model: the same grammar, any tokenisation, white space left loose."""
        body = list(ids[:-1] if ids and ids[-1] == self.eos else ids)
        text = self.tokenizer.decode(body)
        pattern = r"\s*"
        for piece in compiled.pieces:
            if piece.kind is None:
                pattern += r"\s*".join(re.escape(part) for part in piece.options[0].split()) + r"\s*"
            else:
                pattern += "(" + "|".join(re.escape(word) for word in piece.options) + r");\s*"
        match = re.fullmatch(pattern, text)
        if match is None:
            raise GrammarError(f"not a turn: {text[:80]!r}")
        ends = [len(self.tokenizer.decode(body[: i + 1])) for i in range(len(body))]
        words: list[tuple[Piece, str]] = []
        spans: list[Span] = []
        chosen = [piece for piece in compiled.pieces if piece.kind is not None]
        for group, piece in enumerate(chosen, start=1):
            first, last = match.span(group)
            start = next(i for i, end in enumerate(ends) if end > first)
            stop = next(i for i, end in enumerate(ends) if end >= last) + 1
            words.append((piece, match.group(group)))
            assert piece.kind is not None
            spans.append(Span(piece.kind, start, stop, piece.slot))
        return content_of(words), tuple(spans)

    def _compile_uncached(self, others: tuple[str, ...], legal: tuple[str, ...]) -> _Compiled:
        pieces = turn_pieces(self.language, self.spans, others, legal, self.compact)
        builder = AutomatonBuilder()
        tokens: list[dict[str, tuple[int, ...]]] = []
        for piece in pieces:
            if piece.kind is None or self.compact:
                options = {word: self._encode_literal(word) for word in piece.options}
            else:
                options = {word: self._encode_literal(f" {word};") for word in piece.options}
            builder.choice(list(options.values()))
            tokens.append(options)
        builder.literal([self.eos])
        return _Compiled(tuple(pieces), tuple(tokens), builder.build())

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        unknown = self.tokenizer.unk_token_id
        if self.compact and unknown is not None and unknown in ids:
            missing = sorted({word for word in text.split() if self.tokenizer.convert_tokens_to_ids(word) == unknown})
            raise GrammarError(f"the tokenizer does not know {', '.join(map(repr, missing))}")
        return ids


