"""The players of repeated-rps: patterns with a name, an imperfect teacher, and an expert that recognises patterns.

A pattern says what it may do next, given the window of rounds that it sees; it is the same function for the opponent
that plays it and for the expert that suspects it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from preconcert.core import Decision, Env, Message, Observation, Player

if TYPE_CHECKING:
    from preconcert.envs.repeated_rps import RepeatedRps

MOVES: tuple[str, ...] = ("rock", "paper", "scissors")
"""Each is beaten by the next one, the last by the first."""

Pattern = Callable[[Sequence[str], Sequence[str]], tuple[str, ...]]
"""From (own moves, the other's moves), oldest first, to the moves it draws from, all equally likely."""


def beats(move: str) -> str:
    """The move that wins against a move."""
    return MOVES[(MOVES.index(move) + 1) % len(MOVES)]


def commonest(moves: Sequence[str]) -> tuple[str, ...]:
    """The most frequent moves; all of them where there are none."""
    counts = Counter(moves)
    return tuple(move for move in MOVES if counts[move] == max(counts.values(), default=0))


def _cycle(own: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return (beats(own[-1]),) if own else MOVES


def _copycat(own: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return (other[-1],) if other else MOVES


def _beat_last(own: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return (beats(other[-1]),) if other else MOVES


def _second_guess(own: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return (beats(beats(own[-1])),) if own else MOVES


def _frequency(own: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return tuple(beats(move) for move in commonest(other))


def _win_stay_lose_shift(own: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    if not own:
        return MOVES
    return (own[-1] if own[-1] == beats(other[-1]) else beats(own[-1]),)


PATTERNS: Mapping[str, Pattern] = MappingProxyType({
    "always-rock": lambda own, other: ("rock",),
    "always-paper": lambda own, other: ("paper",),
    "always-scissors": lambda own, other: ("scissors",),
    "cycle": _cycle,
    "copycat": _copycat,
    "beat-last": _beat_last,
    "second-guess": _second_guess,
    "frequency": _frequency,
    "win-stay-lose-shift": _win_stay_lose_shift,
    "random": lambda own, other: MOVES,
})
"""
`cycle` goes on to the move that beats its last one, `copycat` repeats the other's last move and `beat-last` beats it;
`second-guess` beats what would beat its own last move, `frequency` beats the other's commonest move in the window,
`win-stay-lose-shift` keeps a move that won and otherwise cycles.
"""


def seen_moves(observation: Observation) -> tuple[list[str], list[str]]:
    """The window of an observation: own moves and the other's, oldest first."""
    words = observation.text.split()
    mine, theirs = words.index("mine"), words.index("theirs")
    return (
        [word for word in words[mine + 1 : theirs] if word in MOVES],
        [word for word in words[theirs + 1 :] if word in MOVES],
    )


class PatternPlayer:
    """Follows a pattern in what it sees."""

    def __init__(self, pattern: Pattern, slip: float = 0.0) -> None:
        """
        Args:
            pattern: e.g. one of `PATTERNS`.
            slip: probability of a random move instead.
        """
        self.pattern, self.slip = pattern, slip

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Reads the observation only."""
        choices = MOVES if rng.random() < self.slip else self.pattern(*seen_moves(observation))
        return Decision(str(rng.choice(choices)))


class RpsScript(PatternPlayer):
    """The imperfect teacher: beats the other's commonest recent move, and does anything two times in five."""

    SLIP: ClassVar[float] = 0.4
    """Probability of a random move."""

    def __init__(self) -> None:
        super().__init__(_frequency, self.SLIP)


class RpsExpert:
    """Recognises the patterns of the population and beats them; uniform, which nobody can exploit, until it does.

    Every pattern is a hypothesis about the other, valued as in Hypothetical Minds (Cross et al. 2024): right or wrong
    about a round moves its value towards 1 or -1, and the most valued one is believed above a threshold. Rounds for
    which a pattern allows several moves say nothing about it.
    """

    RATE: ClassVar[float] = 0.3
    """How far one round moves a value."""
    BELIEVED: ClassVar[float] = 0.7
    """Four right predictions in a row from 0 reach 0.76."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Takes the whole history from the environment."""
        task = cast("RepeatedRps", env)
        (other,) = task.others(observation.agent)
        mine, theirs = task.played(observation.agent), task.played(other)
        window = task.params.history
        values: dict[str, float] = {}
        for name, pattern in PATTERNS.items():
            value = 0.0
            for at, move in enumerate(theirs):
                start = max(0, at - window)
                expected = pattern(theirs[start:at], mine[start:at])
                if len(expected) == 1:
                    value += self.RATE * ((1.0 if expected[0] == move else -1.0) - value)
            values[name] = value
        best = max(values, key=lambda name: values[name])
        if values[best] <= self.BELIEVED:
            return Decision(str(rng.choice(MOVES)))
        expected = PATTERNS[best](theirs[-window:], mine[-window:])
        return Decision(beats(str(rng.choice(expected))))


OPPONENTS: Mapping[str, Callable[[], Player]] = MappingProxyType({
    name: partial(PatternPlayer, pattern) for name, pattern in PATTERNS.items()
})
"""A player for each pattern."""
