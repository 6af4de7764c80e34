"""The grammar of a world model's answer: which pieces of text say what one step leads to.

    <intend> NAME a … <foresee> next view r d <say> NAME w … v

Parts: `WorldPart`, `WorldAnswer` (the words of one answer) and `world_pieces`. Numbers of the view are written digit by
digit at fixed width. What is heard and the value are left out where the episode is over. Tokens come in
`world_format.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from preconcert.core import GrammarError, TaskLanguage
from preconcert.prompts.speech import SILENCE
from preconcert.prompts.turn_grammar import DONE_WORDS, Piece

VALUES = 10
"""Bins of the value: one digit."""
TEXT = "text"
"""Slot of a view that consists of words of any kind."""


class WorldPart(StrEnum):
    """The parts of an answer, in the order in which they are written."""

    OTHERS = "others"
    """What another agent does; the slot is its name."""
    VIEW = "view"
    """A field of the next view."""
    REWARD = "reward"
    DONE = "done"
    """Is the episode over after this step?"""
    HEAR = "hear"
    """The words last received from another agent, as the next prompt shows them; the slot is its name."""
    VALUE = "value"
    """The bin of the sum of all rewards after this step."""


@dataclass(frozen=True, slots=True)
class WorldSpan:
    """A token range of an answer with one meaning. Tags, labels and end marks belong to no span."""

    part: WorldPart
    start: int
    """First token, relative to the answer."""
    end: int
    """One past the last token."""
    slot: str
    """A field's name, another agent's name, or the part's own name."""


@dataclass(frozen=True, slots=True)
class WorldAnswer:
    """The words of one answer, before they are tokens or after they were parsed."""

    view: str
    """The text of the next view."""
    reward: str | None
    """As a word of the task's language; None where it has no rewards."""
    done: bool
    others: Mapping[str, str] = field(default_factory=dict)
    """The actions of those other agents whose actions were not given."""
    heard: Mapping[str, str] = field(default_factory=dict)
    """The words last received, by sender; who was never heard is not in it. Empty where the episode is over."""
    value: int | None = None
    """The bin; None where the episode is over, or values are not written."""


def world_pieces(
    language: TaskLanguage, asked: Sequence[str], others: Sequence[str], talks: bool, valued: bool, compact: bool
) -> list[Piece]:
    """The pieces of one answer.

    Args:
        language: the task's vocabularies.
        asked: the other agents whose actions are to be written, in the order of writing.
        others: all other agents.
        talks: does the next prompt show what was heard?
        valued: is the value written?
        compact: the starter model's spelling; otherwise the labelled one.

    Raises:
        GrammarError: a message has the word that stands for silence.
    """
    pieces: list[Piece] = []
    line = [] if compact else [Piece(("\n",))]

    def label(name: str) -> list[Piece]:
        return [] if compact else [Piece((f" {name}:",))]

    for other in asked:
        pieces += [_tag("<intend>", other, compact), Piece(language.actions, WorldPart.OTHERS, other), *line]
    pieces.append(Piece(("<foresee>",)))
    if language.view is None:
        # The mark that ends the words: the tag that ends a prompt, or the line end.
        pieces += [Piece((), WorldPart.VIEW, TEXT), Piece(("<turn>" if compact else "\n",))]
    else:
        for item in language.view.fields:
            if compact and item.label:
                pieces.append(Piece((item.label,)))
            pieces += label(item.name)
            pieces.append(Piece(item.choices, WorldPart.VIEW, item.name, digits=item.digits if item.number else 0))
    if language.rewards:
        pieces += [*label("reward"), Piece(language.rewards, WorldPart.REWARD, WorldPart.REWARD)]
    after: list[Piece] = list(line)
    for other in others if talks else ():
        after += [_tag("<say>", other, compact), *_heard(language, other, compact), *line]
    if valued:
        digits = tuple(str(digit) for digit in range(VALUES))
        after += [*label("value"), Piece(digits, WorldPart.VALUE, WorldPart.VALUE), *line]
    no, yes = DONE_WORDS
    skips = ((yes, len(after)),) if after else ()
    return [*pieces, *label("done"), Piece((no, yes), WorldPart.DONE, WorldPart.DONE, skips=skips), *after]


def _tag(tag: str, other: str, compact: bool) -> Piece:
    return Piece((f"{tag} {other}" if compact else f"{tag} {other}:",))


def _heard(language: TaskLanguage, other: str, compact: bool) -> list[Piece]:
    """The words of a message, or one word for silence."""
    pieces: list[Piece] = []
    for index, slot in enumerate(language.message):
        if SILENCE in slot.choices:
            raise GrammarError(f"message slot {slot.name!r} has the word {SILENCE!r}, which stands for silence")
        if not compact:
            pieces.append(Piece((f" {slot.name}:",)))
        left = len(language.message) - 1 - index
        skips = ((SILENCE, left if compact else 2 * left),) if index == 0 and left else ()
        options = (*slot.choices, SILENCE) if index == 0 else slot.choices
        pieces.append(Piece(options, WorldPart.HEAR, other, index, skips=skips))
    return pieces


def answer_words(answer: WorldAnswer, language: TaskLanguage) -> dict[tuple[str, str, int], str]:
    """Every word of an answer by (part, slot, index).

    Raises:
        GrammarError: the view's text is not of the task's view, or a message has the wrong number of words.
    """
    words: dict[tuple[str, str, int], str] = {
        (WorldPart.OTHERS, other, 0): action for other, action in answer.others.items()
    }
    if language.view is None:
        words[WorldPart.VIEW, TEXT, 0] = " ".join(answer.view.split())
    else:
        for item, value in zip(language.view.fields, language.view.parse(answer.view), strict=True):
            words[WorldPart.VIEW, item.name, 0] = value
    if answer.reward is not None:
        words[WorldPart.REWARD, WorldPart.REWARD, 0] = answer.reward
    words[WorldPart.DONE, WorldPart.DONE, 0] = DONE_WORDS[answer.done]
    for other, heard in answer.heard.items():
        said = heard.split()
        if len(said) != len(language.message):
            raise GrammarError(f"heard from {other}: {heard!r} is no message of {len(language.message)} words")
        words |= {(WorldPart.HEAR, other, index): word for index, word in enumerate(said)}
    if answer.value is not None:
        words[WorldPart.VALUE, WorldPart.VALUE, 0] = str(answer.value)
    return words


def answer_of(words: Mapping[tuple[str, str, int], str], language: TaskLanguage) -> WorldAnswer:
    """The answer that words stand for; the inverse of `answer_words`."""
    if language.view is None:
        view = " ".join(words[WorldPart.VIEW, TEXT, 0].split())
    else:
        view = language.view.render([words[WorldPart.VIEW, item.name, 0] for item in language.view.fields])
    heard: dict[str, list[str]] = {}
    for (part, slot, _), word in words.items():
        if part == WorldPart.HEAR and word != SILENCE:
            heard.setdefault(slot, []).append(word)
    value = words.get((WorldPart.VALUE, WorldPart.VALUE, 0))
    return WorldAnswer(
        view=view,
        reward=words.get((WorldPart.REWARD, WorldPart.REWARD, 0)),
        done=words[WorldPart.DONE, WorldPart.DONE, 0] == DONE_WORDS[1],
        others={slot: word for (part, slot, _), word in words.items() if part == WorldPart.OTHERS},
        heard={sender: " ".join(said) for sender, said in heard.items()},
        value=None if value is None else int(value),
    )
