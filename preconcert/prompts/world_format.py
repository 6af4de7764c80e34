"""What a step leads to, as tokens: a world model's prompts and answers for one task and one tokenizer.

A row is an agent's turn prompt, the move, and the answer:

    ... <turn>  [EARLIER …] [<from> ME w w] [<by> KIND] <say> w w <act> a  [<intend> NAME a …]
        |  [<intend> NAME a …] <foresee> view r d <say> NAME w w v

    EARLIER is  <from> NAME w w … <see> view <say> w w <act> a

Other agents' actions that are given stand on the prompt's side of the line, the rest on the answer's, in the same
spelling. EARLIER are the moments before this one, the oldest first: what was heard and seen, said and done. The words
after ME are the agent's own last ones, which the others have now heard. KIND says whose play the others' is: what
follows on a view among partners who act at random is not what follows on it among the team's own.
Parts: `WorldFormat`, `Earlier` and `WorldWritten`. The grammar of the answer is in `world_grammar.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from preconcert.core import GrammarError, Message, Move, Observation, UnknownNameError
from preconcert.prompts.automaton import Automaton
from preconcert.prompts.grammar import Grammar, Reading
from preconcert.prompts.speech import SILENCE
from preconcert.prompts.turn_format import TurnFormat
from preconcert.prompts.turn_grammar import Piece
from preconcert.prompts.world_grammar import (
    VALUES,
    WorldAnswer,
    WorldPart,
    WorldSpan,
    answer_of,
    answer_words,
    world_pieces,
)

T = TypeVar("T")

BY = "<by>"
PARTNERS = ("random", "scripted", "learner")
"""Kinds of partners: uniform over legal actions, the task's imperfect player, the team itself."""
OWN_TEAM = "learner"


@dataclass(frozen=True, slots=True)
class Earlier:
    """A moment that is over, as one agent lived it."""

    view: str
    """The text of what it saw."""
    heard: tuple[tuple[str, str], ...]
    """What it had heard last from each other agent, by sender; who was silent is not in it."""
    said: str | None
    """Its message of that moment."""
    action: str


@dataclass(frozen=True, slots=True)
class WorldWritten:
    """An answer as tokens."""

    ids: tuple[int, ...]
    spans: tuple[WorldSpan, ...]
    chosen: tuple[bool, ...]
    """False for the tokens that the grammar leaves no choice about."""


class WorldFormat:
    """One task's world rows for one tokenizer.

    Args:
        turns: writes the prompts; its spans say whether agents talk, and its memory is the model's.
        value_range: the least and the greatest sum of rewards after a step, the ends of the value's scale. None takes
            the least and the greatest reward of one step, with 0.
        tells_partners: do prompts say whose play the others' is?
        own_words: do prompts say what the agent itself said last?
        recall: how many earlier moments prompts show.

    Raises:
        GrammarError: the view lacks a field that agents foretell, or the tokenizer does not tell the value's digits
            apart by one token.
    """

    def __init__(
        self,
        turns: TurnFormat,
        value_range: tuple[float, float] | None = None,
        tells_partners: bool = False,
        own_words: bool = False,
        recall: int = 0,
    ) -> None:
        self.turns = turns
        self.tells_partners = tells_partners
        self.tokenizer = turns.tokenizer
        self.language = turns.language
        self.compact = turns.compact
        self.talks = turns.spans.say and bool(self.language.message)
        self.own_words = own_words and self.talks
        self.recall = recall
        self.valued = bool(self.language.rewards)
        if value_range is None:
            sums = [0.0, *(float(word) for word in self.language.rewards)]
            value_range = (min(sums), max(sums))
        self.value_range = value_range
        """Digit `d` of the value stands for `low + (high - low) * d / 9`."""
        view = self.language.view
        if view is not None:
            names = {item.name for item in view.fields}
            for slot in self.language.forecast:
                if slot.name not in names:
                    raise GrammarError(f"agents foretell {slot.name!r}, which is no field of the view")
        self._compile = lru_cache(maxsize=4096)(self._compile_uncached)
        self._prompt = lru_cache(maxsize=65536)(self._prompt_uncached)
        self._earlier = lru_cache(maxsize=65536)(self._earlier_uncached)
        self._value_state = lru_cache(maxsize=4096)(self._value_state_uncached)

    # ---- prompts

    def prompt_ids(
        self,
        agent: str,
        observation: Observation,
        inbox: Sequence[Message],
        others: Sequence[str],
        memory: Sequence[str],
        move: Move,
        partners: str = OWN_TEAM,
        said: str | None = None,
        earlier: Sequence[Earlier] = (),
    ) -> tuple[int, ...]:
        """The turn's prompt, earlier moments, the agent's own last words, the kind of partners, the move, and the other
        agents' actions as far as they are given.

        Args:
            agent: whose view it is.
            observation: what it sees.
            inbox: what it heard last from each other agent.
            others: the other agents, in the episode's order.
            memory: its actions so far.
            move: what is done now.
            partners: whose play the others' is, one of `PARTNERS`.
            said: its own last message; None before the first.
            earlier: the moments before this one, the oldest first; the last `recall` of them are shown.

        Raises:
            GrammarError: the tokenizer lacks a word.
            UnknownNameError: a kind of partners that is none.
        """
        if partners not in PARTNERS:
            raise UnknownNameError("kind of partners", partners, PARTNERS)
        heard = tuple((message.sender, message.payload) for message in inbox) if self.talks else ()
        recent = recent_of(memory, self.turns.memory)
        prompt = self._prompt(agent, observation.text, observation.legal_actions, heard, tuple(others), recent)
        told: tuple[int, ...] = ()
        for moment in recent_of(earlier, self.recall):
            told += self._earlier(moment, tuple(others))
        if self.own_words:
            told += self.turns.encode(f"<from> {agent}" + ("" if self.compact else ":"))
            told += self._message_ids(said) + self._line()
        if self.tells_partners:
            told += self.turns.encode(BY) + self._word_ids(partners) + self._line()
        return prompt + told + self.move_ids(others, move)

    def move_ids(self, others: Sequence[str], move: Move) -> tuple[int, ...]:
        """The move alone, as it is appended to a turn's prompt."""
        encode = self.turns.encode
        ids = self._own_ids(move.message, move.action)
        given = move.others or {}
        for other in others:
            if other in given:
                ids += encode(f"<intend> {other}" + ("" if self.compact else ":"))
                ids += self._word_ids(given[other]) + self._line()
        return ids

    def asked(self, others: Sequence[str], move: Move) -> tuple[str, ...]:
        """The other agents whose actions a move leaves to the model."""
        return tuple(other for other in others if other not in (move.others or {}))

    # ---- answers

    def automaton(self, others: Sequence[str], asked: Sequence[str]) -> Automaton | None:
        """The automaton of an answer, end of sequence included; None where views are words of any kind."""
        return self._compile(tuple(others), tuple(asked)).automaton

    def write(self, answer: WorldAnswer, others: Sequence[str], asked: Sequence[str]) -> WorldWritten:
        """An answer as the automaton would spell it, end of sequence included.

        Args:
            answer: the words.
            others: the other agents, in the episode's order.
            asked: those whose actions are written, in the order of writing.

        Raises:
            GrammarError: the content does not fit the grammar.
        """
        words = answer_words(answer, self.language)

        def word_of(piece: Piece) -> str:
            silent = SILENCE if piece.kind is WorldPart.HEAR and piece.index == 0 else ""
            return words.get((str(piece.kind), piece.slot, piece.index), silent)

        grammar = self._compile(tuple(others), tuple(asked))
        ids, readings = grammar.write(word_of)
        return WorldWritten(ids, _spans(readings), grammar.chosen(ids, readings))

    def parse(
        self, ids: Sequence[int], others: Sequence[str], asked: Sequence[str]
    ) -> tuple[WorldAnswer, tuple[WorldSpan, ...]]:
        """Read an answer back.

        Raises:
            GrammarError: it is not exactly an answer of this grammar.
        """
        readings = self._compile(tuple(others), tuple(asked)).parse(ids)
        words = {
            (str(reading.piece.kind), reading.piece.slot, reading.piece.index): reading.word for reading in readings
        }
        return answer_of(words, self.language), _spans(readings)

    # ---- values

    def value_state(self, others: Sequence[str], asked: Sequence[str]) -> tuple[int, Mapping[int, int]] | None:
        """The automaton's state in which the value's digit is chosen, and the digit by token; None without values.

        Raises:
            GrammarError: the tokenizer does not tell the digits apart by one token.
        """
        return self._value_state(tuple(others), tuple(asked))

    def value_of(self, position: float) -> float:
        """The sum of rewards at a position on the scale of the digits, from 0 to 9."""
        low, high = self.value_range
        return low + (high - low) * position / (VALUES - 1)

    def digit_of(self, value: float, dice: float) -> int:
        """The digit for a sum of rewards, rounded at random so that its expectation is exact within the range.

        Args:
            value: the sum.
            dice: a uniform from 0 to 1.
        """
        low, high = self.value_range
        if high <= low:
            return 0
        position = min(max((value - low) / (high - low), 0.0), 1.0) * (VALUES - 1)
        return min(VALUES - 1, int(position + dice))

    def reward_word(self, reward: float) -> str | None:
        """The word that stands for a reward; None in a task without words for rewards.

        Raises:
            GrammarError: there are words, and none for this reward.
        """
        word = self.language.reward_word(reward)
        if word is None and self.language.rewards:
            known = ", ".join(self.language.rewards)
            raise GrammarError(f"reward {reward} has no word; the task's language knows {known}")
        return word

    def action_options(self, other: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """What precedes another agent's action in an answer, and the ids of each of the language's actions."""
        tag = self.turns.encode(f"<intend> {other}" + ("" if self.compact else ":"))
        return tag, tuple(self._word_ids(action) for action in self.language.actions)

    # ---- parts

    def _own_ids(self, message: str | None, action: str) -> tuple[int, ...]:
        """What an agent says and does at one moment."""
        ids: tuple[int, ...] = ()
        if self.talks:
            ids += self.turns.encode("<say>") + self._message_ids(message) + self._line()
        return ids + self.turns.encode("<act>") + self._word_ids(action) + self._line()

    def _earlier_uncached(self, moment: Earlier, others: tuple[str, ...]) -> tuple[int, ...]:
        heard = dict(moment.heard)
        ids: tuple[int, ...] = ()
        for other in others if self.talks else ():
            ids += self.turns.encode(f"<from> {other}" + ("" if self.compact else ":"))
            ids += self._message_ids(heard.get(other)) + self._line()
        ids += self.turns.encode("<see>") + self._word_ids(moment.view) + self._line()
        return ids + self._own_ids(moment.said, moment.action)

    def _compile_uncached(self, others: tuple[str, ...], asked: tuple[str, ...]) -> Grammar:
        pieces = world_pieces(self.language, asked, others, self.talks, self.valued, self.compact)
        return Grammar(pieces, self.turns.encode, self.tokenizer, self.compact)

    def _prompt_uncached(
        self,
        agent: str,
        text: str,
        legal: tuple[str, ...],
        heard: tuple[tuple[str, str], ...],
        others: tuple[str, ...],
        memory: tuple[str, ...],
    ) -> tuple[int, ...]:
        inbox = [Message(sender, (agent,), words, 0.0, len(words.split()), 0) for sender, words in heard]
        return self.turns.prompt_ids(agent, Observation(agent, text, legal, 0), inbox, others, memory)

    def _value_state_uncached(
        self, others: tuple[str, ...], asked: tuple[str, ...]
    ) -> tuple[int, Mapping[int, int]] | None:
        grammar = self._compile(others, asked)
        if not self.valued or grammar.automaton is None:
            return None
        at = next(at for at, piece in enumerate(grammar.pieces) if piece.kind is WorldPart.VALUE)
        options = grammar.tokens[at]
        start = grammar.automaton.entries[at]
        common, state = grammar.automaton.forced[start]
        digits = {ids[len(common)]: int(word) for word, ids in options.items()}
        if len(digits) != VALUES:
            raise GrammarError("the tokenizer does not tell the digits of the value apart by one token")
        return state, digits

    def _message_ids(self, message: str | None) -> tuple[int, ...]:
        """A message as turns write it; words that fill no slots stand as they are."""
        words = message.split() if message else []
        if self.compact or len(words) != len(self.language.message):
            return self._word_ids(" ".join(words) or SILENCE)
        ids: tuple[int, ...] = ()
        for slot, word in zip(self.language.message, words, strict=True):
            ids += self.turns.encode(f" {slot.name}:") + self._word_ids(word)
        return ids

    def _word_ids(self, word: str) -> tuple[int, ...]:
        return self.turns.encode(word if self.compact else f" {word};")

    def _line(self) -> tuple[int, ...]:
        return () if self.compact else self.turns.encode("\n")


def recent_of(items: Sequence[T], count: int) -> tuple[T, ...]:
    """The last ones, at most as many as are asked for."""
    return tuple(items[-count:]) if count else ()


def _spans(readings: Sequence[Reading]) -> tuple[WorldSpan, ...]:
    """The span table of what was written or read."""
    return tuple(
        WorldSpan(WorldPart(reading.piece.kind), reading.start, reading.end, reading.piece.slot)
        for reading in readings
        if reading.piece.kind is not None
    )
