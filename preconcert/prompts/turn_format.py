"""Turns as tokens: prompts rendered, turns written and strictly parsed, the automaton that constrains them.

Parts: `TurnFormat`. A tokenizer with a chat template gets the labelled spelling inside that template; any other gets
the compact one. Nothing is ever tokenised twice: a parse works on the ids as sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preconcert.core import GrammarError, Message, Observation, Span, SpanKind, TaskLanguage
from preconcert.prompts.automaton import Automaton
from preconcert.prompts.grammar import Grammar, Reading
from preconcert.prompts.own_template import own_template
from preconcert.prompts.sized_cache import SizedCache
from preconcert.prompts.spans import SpanSettings, TurnContent
from preconcert.prompts.speech import SILENCE, Speech, whole_messages
from preconcert.prompts.turn_grammar import content_of, turn_pieces, word_of

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=False
)


_HOLE = "\u2063message\u2063"
"""Stands for vectors while a prompt is rendered."""
_KEPT_BYTES = 64 * 2**20
"""Of texts and grammars that a format keeps."""
_TEXT_BYTES, _TOKEN_BYTES, _STATE_BYTES, _CELL_BYTES = 300, 40, 300, 5
"""About what is held for a text beside its characters, for each of its tokens, for a state of an automaton, and for
each token that the automaton knows in each state, which is what its tables have."""


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


class TurnFormat:
    """One task's turns for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        language: the task's vocabularies.
        spans: which parts a turn has.
        memory: how many of its own last actions an agent is reminded of.
        speech: the form of messages; None for every word of the task's message slots.
    """

    def __init__(
        self,
        tokenizer: Any,
        language: TaskLanguage,
        spans: SpanSettings,
        memory: int = 0,
        speech: Speech | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.language = language
        self.spans = spans
        self.memory = memory
        self.speech = whole_messages(language) if speech is None else speech
        self._template = own_template(tokenizer)
        self.compact = self._template is None
        self.eos: int = tokenizer.eos_token_id
        self.cache = SizedCache(_KEPT_BYTES)
        """Encoded texts and compiled grammars; formats may share one."""
        self._name = object()
        """Tells the formats of one cache apart."""
        self.longest_kept = 4096
        """Tokens of the longest text that is kept: one that no model takes will not come again."""

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
        if self.speech.vectors:
            return self.prompt_with_places(agent, observation, inbox, others, memory)[0]
        return self.encode(self._prompt_text(self._fields(agent, observation, inbox, others, memory)))

    def prompt_with_places(
        self,
        agent: str,
        observation: Observation,
        inbox: Sequence[Message],
        others: Sequence[str],
        memory: Sequence[str] = (),
    ) -> tuple[tuple[int, ...], dict[str, int]]:
        """The prompt of a turn whose messages are vectors (`Speech.vectors`), and where each sender's begin.

        The same tokens, those of silence, stand there whether a message was received or not. What is around them is
        tokenised apart, so that no token reaches across.
        """
        fields = self._fields(agent, observation, inbox, others, memory)
        mails: list[Mail] = fields["inbox"]
        fields["inbox"] = [Mail(mail.sender, _HOLE) for mail in mails]
        pieces = self._prompt_text(fields).split(_HOLE)
        hole = self.encode(self.speech.shown_silence(self.compact))[: self.speech.vectors]
        hole += hole[-1:] * (self.speech.vectors - len(hole))
        ids: tuple[int, ...] = ()
        starts: dict[str, int] = {}
        for place, piece in enumerate(pieces):
            text = piece.strip() if self.compact else piece
            ids += self.encode(text) if text else ()
            if place < len(mails):
                starts[mails[place].sender] = len(ids)
                ids += hole
        return ids, starts

    def _prompt_text(self, fields: dict[str, Any]) -> str:
        if self.compact:
            return _TEMPLATES.get_template("starter.jinja").render(fields).strip()
        return self.chat_text(_chat(fields))

    def chat(
        self,
        agent: str,
        observation: Observation,
        inbox: Sequence[Message],
        others: Sequence[str],
        memory: Sequence[str] = (),
    ) -> list[dict[str, str]]:
        """The prompt of a turn as a chat: what the rules are, and what the agent sees. In either spelling the words are
        those that a pretrained model reads."""
        return _chat(self._fields(agent, observation, inbox, others, memory))

    def chat_text(self, chat: Sequence[Mapping[str, str]]) -> str:
        """A chat in the tokenizer's own template, up to where the answer begins."""
        found: str = self.tokenizer.apply_chat_template(
            list(chat),
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return found

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
            return self.encode(_TEMPLATES.get_template("starter.jinja").render(fields).strip())
        sentinel = "\u2063answer\u2063"
        chat = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": sentinel},
            {"role": "user", "content": _TEMPLATES.get_template("user.jinja").render(fields).strip()},
        ]
        _, _, tail = self.chat_text(chat).rpartition(sentinel)
        eos = self.tokenizer.eos_token
        if ended_with_eos and tail.startswith(eos):
            tail = tail[len(eos) :]
        return self.encode(tail)

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
            silence = self.speech.shown_silence(self.compact)
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
            "speech": self.speech,
        }

    # ---- turns

    def automaton(self, others: Sequence[str], legal: Sequence[str]) -> Automaton:
        """The automaton of one agent's turn, end of sequence included."""
        automaton = self._compile(tuple(others), tuple(legal)).automaton
        assert automaton is not None  # a turn has no words of any kind
        return automaton

    def beginnings(self, kind: SpanKind, others: Sequence[str], legal: Sequence[str]) -> dict[int, dict[int, str]]:
        """By automaton state before a word of a kind: which word each next token begins.

        States in which two words begin with the same token are left out: the first token does not tell them apart.
        """
        grammar = self._compile(tuple(others), tuple(legal))
        entries = self.automaton(others, legal).entries  # the last is that of the end mark, which is no piece
        found: dict[int, dict[int, str]] = {}
        for piece, tokens, entry in zip(grammar.pieces, grammar.tokens, entries, strict=False):
            words = {ids[0]: word for word, ids in tokens.items()} if piece.kind is kind else {}
            if words and len(words) == len(tokens):
                found[entry] = words
        return found

    def write(self, content: TurnContent, others: Sequence[str], legal: Sequence[str]) -> Written:
        """A turn as the automaton would spell it, end of sequence included.

        Raises:
            GrammarError: the content does not fit the grammar.
        """
        if len(content.message) > len(self.speech.slots) and self.spans.say:
            raise GrammarError(f"{' '.join(content.message)!r} is no message of {len(self.speech.slots)} words")
        grammar = self._compile(tuple(others), tuple(legal))
        ids, readings = grammar.write(lambda piece: word_of(content, piece, self.language, self.speech))
        return Written(ids, _spans(readings), grammar.chosen(ids, readings))

    def parse(
        self, ids: Sequence[int], others: Sequence[str], legal: Sequence[str]
    ) -> tuple[TurnContent, tuple[Span, ...]]:
        """Read a turn back.

        Raises:
            GrammarError: it is not exactly a turn of this grammar.
        """
        readings = self._compile(tuple(others), tuple(legal)).parse(ids)
        return content_of([(reading.piece, reading.word) for reading in readings]), _spans(readings)

    def text(self, ids: Sequence[int]) -> str:
        """The words of a completion, for people."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text.

        Raises:
            GrammarError: the starter's tokenizer does not know a word.
        """

        def weigh(ids: tuple[int, ...]) -> int | None:
            long = len(ids) > self.longest_kept
            return None if long else _TEXT_BYTES + 4 * len(text) + _TOKEN_BYTES * len(ids)

        return self.cache.get((self._name, text), lambda: self._encode_uncached(text), weigh)

    def _compile(self, others: tuple[str, ...], legal: tuple[str, ...]) -> Grammar:
        return self.cache.get((self._name, others, legal), lambda: self._compile_uncached(others, legal), _weight)

    def _compile_uncached(self, others: tuple[str, ...], legal: tuple[str, ...]) -> Grammar:
        pieces = turn_pieces(self.language, self.spans, others, legal, self.compact, self.speech)
        return Grammar(pieces, self.encode, self.tokenizer, self.compact)

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        unknown = self.tokenizer.unk_token_id
        if self.compact and unknown is not None and unknown in ids:
            missing = sorted({word for word in text.split() if self.tokenizer.convert_tokens_to_ids(word) == unknown})
            raise GrammarError(f"the tokenizer does not know {', '.join(map(repr, missing))}")
        return ids


def _weight(grammar: Grammar) -> int:
    """Bytes of a compiled grammar, its automaton's tables included, about."""
    words = sum(_TEXT_BYTES + _TOKEN_BYTES * len(ids) for options in grammar.tokens for ids in options.values())
    automaton = grammar.automaton
    return words if automaton is None else words + automaton.size * (
        _STATE_BYTES + _CELL_BYTES * len(automaton.tokens)
    )


def _chat(fields: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": _TEMPLATES.get_template("system.jinja").render(fields).strip()},
        {"role": "user", "content": _TEMPLATES.get_template("user.jinja").render(fields).strip()},
    ]


def _spans(readings: Sequence[Reading]) -> tuple[Span, ...]:
    """The span table of what was written or read."""
    return tuple(
        Span(SpanKind(reading.piece.kind), reading.start, reading.end, reading.piece.slot)
        for reading in readings
        if reading.piece.kind is not None
    )
