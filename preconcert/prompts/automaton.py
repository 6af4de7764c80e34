"""Token automata: which tokens a grammar allows next, as tables that a decoding loop can index.

Parts: `Automaton` (the tables) and `AutomatonBuilder` (makes them from token sequences). Nothing here knows about turns
or tasks; `turn_format.py` builds an automaton for a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from preconcert.core import GrammarError

DEAD = -1
"""No transition: the token is not allowed in this state."""


class Automaton:
    """A deterministic automaton over a few token ids.

    States are integers, 0 is the start. A state without transitions is final: the sequence is complete there (the
    end-of-sequence token, where there is one, is an ordinary transition into the final state).
    """

    def __init__(self, transitions: Sequence[dict[int, int]], entries: Sequence[int] = (0,)) -> None:
        self.transitions = tuple(transitions)
        self.entries = tuple(entries)
        """The state before each piece it was built from, in order."""
        self.size = len(self.transitions)
        self.tokens: NDArray[np.int64] = np.array(sorted({t for row in transitions for t in row}), dtype=np.int64)
        """Every token id of the grammar, ascending: the columns of the tables."""
        self.column = {int(token): index for index, token in enumerate(self.tokens)}

    @cached_property
    def next_state(self) -> NDArray[np.int32]:
        """Shape (states, columns): the state that a token leads to, or `DEAD`."""
        table = np.full((self.size, len(self.tokens)), DEAD, dtype=np.int32)
        for state, row in enumerate(self.transitions):
            for token, target in row.items():
                table[state, self.column[token]] = target
        return table

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """Shape (states, columns): may this token come next?"""
        return self.next_state != DEAD

    @cached_property
    def forced(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """Per state: the tokens that must come next before there is a choice, and the state they lead to."""
        chains: list[tuple[tuple[int, ...], int]] = []
        for start in range(self.size):
            state, chain = start, []
            while len(self.transitions[state]) == 1:
                ((token, state),) = self.transitions[state].items()
                chain.append(token)
            chains.append((tuple(chain), state))
        return tuple(chains)

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        depth = [0] * self.size
        for state in reversed(range(self.size)):
            depth[state] = max((1 + depth[target] for target in self.transitions[state].values()), default=0)
        return depth[0]

    def is_final(self, state: int) -> bool:
        """Is the sequence complete here?"""
        return not self.transitions[state]

    def walk(self, ids: Iterable[int]) -> list[int]:
        """The states before each token, and the one after the last.

        Raises:
            GrammarError: a token is not allowed where it stands.
        """
        states = [0]
        for position, token in enumerate(ids):
            target = self.transitions[states[-1]].get(int(token))
            if target is None:
                raise GrammarError(f"token {int(token)} is not allowed at position {position}")
            states.append(target)
        return states


class AutomatonBuilder:
    """Puts an automaton together piece by piece. States are numbered so that every transition goes upwards."""

    def __init__(self) -> None:
        self._pieces: list[tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]] = []

    def literal(self, ids: Sequence[int]) -> None:
        """These tokens, and nothing else."""
        self.choice([ids])

    def choice(self, options: Sequence[Sequence[int]], skips: Mapping[tuple[int, ...], int] | None = None) -> None:
        """One of several token sequences.

        Args:
            options: the sequences.
            skips: by option how many of the pieces that follow are left out after it.

        Raises:
            GrammarError: there is no option, one is empty, two are equal, or one is the beginning of another.
        """
        unique = [tuple(int(i) for i in option) for option in options]
        if not unique or not all(unique):
            raise GrammarError("a choice needs at least one option, and no empty one")
        ordered = sorted(unique)
        for first, second in zip(ordered, ordered[1:], strict=False):
            if second[: len(first)] == first:
                raise GrammarError(f"option {list(first)} is the beginning of option {list(second)}")
        self._pieces.append((unique, dict(skips or {})))

    def build(self) -> Automaton:
        """The automaton of all pieces in sequence.

        Raises:
            GrammarError: an option skips more pieces than follow it.
        """
        transitions: list[dict[int, int]] = [{}]
        entry = 0
        entries: list[int] = []
        jumps: list[tuple[int, int, int]] = []
        for number, (options, skips) in enumerate(self._pieces):
            entries.append(entry)
            inner: dict[tuple[int, ...], int] = {(): entry}
            leaves: list[tuple[int, int, int]] = []
            for option in options:
                for length in range(1, len(option)):
                    prefix = option[:length]
                    if prefix not in inner:
                        inner[prefix] = len(transitions)
                        transitions.append({})
                    transitions[inner[option[: length - 1]]][option[length - 1]] = inner[prefix]
                leaves.append((inner[option[:-1]], option[-1], skips.get(option, 0)))
            entry = len(transitions)
            transitions.append({})
            for state, token, skip in leaves:
                if skip:
                    jumps.append((state, token, number + 1 + skip))
                else:
                    transitions[state][token] = entry
        for state, token, piece in jumps:
            if piece > len(self._pieces):
                raise GrammarError(f"an option skips to piece {piece} of {len(self._pieces)}")
            transitions[state][token] = [*entries, entry][piece]
        return Automaton(transitions, entries)
