"""The span grammar of a turn: which pieces of text it consists of, in order.

    <intend> NAME a a … <foresee> o' r d <say> w … <act> a

Parts: `Piece` (a literal or one of several words) and `turn_pieces`. Two spellings share the grammar: *compact* (one
token per word, for the starter model) and *labelled* (`row: 2;`, for any tokenizer). Tokens come in `turn_format.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from preconcert.core import GrammarError, SpanKind, TaskLanguage
from preconcert.prompts.spans import END_OF_PLAY, SpanSettings, TurnContent
from preconcert.prompts.speech import Speech, whole_messages

DONE_WORDS = ("no", "yes")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a text: a literal where `kind` is None, else one word out of several."""

    options: tuple[str, ...]
    """The words themselves; for a literal, its only text. Empty with a kind: words of any kind, up to the literal that
    follows."""
    kind: StrEnum | None = None
    slot: str = ""
    """As in `Span.slot`."""
    index: int = 0
    """Position among the pieces of the same kind and slot."""
    digits: int = 0
    """The words are numbers, written digit by digit in this many digits; 0 for words as they are."""
    skips: tuple[tuple[str, int], ...] = ()
    """Words after which some of the following pieces are left out, and how many."""


def turn_pieces(
    language: TaskLanguage,
    spans: SpanSettings,
    others: Sequence[str],
    legal: Sequence[str],
    compact: bool,
    speech: Speech | None = None,
) -> list[Piece]:
    """The pieces of one agent's turn.

    Args:
        language: the task's vocabularies.
        spans: which parts are on.
        others: names of the other agents, in order.
        legal: the actions the agent may take now.
        compact: the starter model's spelling; otherwise the labelled one.
        speech: the form of messages; None for every word of the task's message slots.

    Raises:
        GrammarError: a message slot has the word that ends messages.
    """
    speech = speech or whole_messages(language)
    pieces: list[Piece] = []
    line = "" if compact else "\n"

    def literal(text: str) -> None:
        pieces.append(Piece((text,)))

    def label(name: str) -> None:
        if not compact:
            literal(f" {name}:")

    if spans.intend:
        foretold = language.actions if spans.intend_steps == 1 else (*language.actions, END_OF_PLAY)
        for other in others:
            literal(f"<intend> {other}" + ("" if compact else ":"))
            pieces.extend(Piece(foretold, SpanKind.INTEND, other, i) for i in range(spans.intend_steps))
            if line:
                literal(line)
    if spans.foresee and (language.forecast or language.rewards):
        literal("<foresee>")
        for slot in language.forecast:
            label(slot.name)
            pieces.append(Piece(slot.choices, SpanKind.FORESEE, slot.name))
        if language.rewards:
            label("reward")
            pieces.append(Piece(language.rewards, SpanKind.FORESEE, "reward"))
            label("done")
            pieces.append(Piece(DONE_WORDS, SpanKind.FORESEE, "done"))
        if line:
            literal(line)
    if spans.say and speech.slots:
        literal("<say>")
        stop = speech.stop(compact)
        for index, slot in enumerate(speech.slots):
            label(slot.name)
            if stop is None:
                pieces.append(Piece(slot.choices, SpanKind.SAY, slot.name))
                continue
            left = len(speech.slots) - 1 - index
            skips = ((stop, left if compact else 2 * left),)
            pieces.append(Piece((*slot.choices, stop), SpanKind.SAY, slot.name, skips=skips))
        if line:
            literal(line)
    literal("<act>")
    pieces.append(Piece(tuple(legal), SpanKind.ACT, "action"))
    return pieces


def word_of(content: TurnContent, piece: Piece, language: TaskLanguage, speech: Speech | None = None) -> str:
    """The word that a turn's content has at a piece; where its message is over, the word that ends it.

    Raises:
        GrammarError: the content has no word there, or one that the piece does not allow.
    """
    word: str | None = None
    if piece.kind is SpanKind.ACT:
        word = content.action
    elif piece.kind is SpanKind.INTEND:
        actions = content.intentions.get(piece.slot, ())
        word = actions[piece.index] if piece.index < len(actions) else None
    elif piece.kind is SpanKind.SAY:
        names = [slot.name for slot in (speech or whole_messages(language)).slots]
        place, ends = names.index(piece.slot), [stop for stop, _ in piece.skips]
        word = content.message[place] if place < len(content.message) else next(iter(ends), None)
    elif piece.slot == "reward":
        word = content.reward
    elif piece.slot == "done":
        word = content.done
    else:
        names = [slot.name for slot in language.forecast]
        word = content.forecast[names.index(piece.slot)] if content.forecast else None
    if word not in piece.options:
        raise GrammarError(f"{piece.kind} {piece.slot}: {word!r} is not one of {', '.join(piece.options)}")
    return word


def content_of(words: Sequence[tuple[Piece, str]]) -> TurnContent:
    """The content that a sequence of chosen words stands for; the inverse of `word_of`."""
    intentions: dict[str, tuple[str, ...]] = {}
    forecast: list[str] = []
    message: list[str] = []
    reward = done = None
    action = ""
    for piece, word in words:
        if piece.kind is SpanKind.INTEND:
            intentions[piece.slot] = (*intentions.get(piece.slot, ()), word)
        elif piece.kind is SpanKind.SAY:
            if word not in dict(piece.skips):
                message.append(word)
        elif piece.kind is SpanKind.ACT:
            action = word
        elif piece.slot == "reward":
            reward = word
        elif piece.slot == "done":
            done = word
        elif piece.kind is SpanKind.FORESEE:
            forecast.append(word)
    return TurnContent(action, intentions, tuple(forecast), reward, done, tuple(message))
