"""Automata: what they accept is exactly what they were built from."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preconcert.core import GrammarError
from preconcert.prompts import Automaton, AutomatonBuilder

PIECES = st.lists(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4, unique=True),
    min_size=1,
    max_size=4,
)


def prefix_free(options: list[tuple[int, ...]]) -> bool:
    return not any(a != b and b[: len(a)] == a for a in options for b in options)


def build(pieces: list[list[tuple[int, ...]]]) -> Automaton:
    builder = AutomatonBuilder()
    for options in pieces:
        builder.choice(options)
    return builder.build()


def accepts(automaton: Automaton, ids: tuple[int, ...]) -> bool:
    try:
        return automaton.is_final(automaton.walk(ids)[-1])
    except GrammarError:
        return False


@settings(max_examples=100, deadline=None)
@given(PIECES.filter(lambda pieces: all(prefix_free(options) for options in pieces)), st.data())
def test_the_language_is_the_product_of_the_pieces(pieces: list[list[tuple[int, ...]]], data: st.DataObject) -> None:
    automaton = build(pieces)
    language = {sum(parts, ()) for parts in itertools.product(*pieces)}
    assert all(accepts(automaton, ids) for ids in language)
    other = tuple(data.draw(st.lists(st.integers(0, 5), max_size=8)))
    assert accepts(automaton, other) == (other in language)
    assert automaton.longest == max(len(ids) for ids in language)
    for ids in language:
        states = automaton.walk(ids)
        assert states == sorted(states)
        for state, token in zip(states, ids, strict=False):
            assert automaton.allowed[state, automaton.column[token]]
            chain, after = automaton.forced[state]
            assert ids[states.index(state) :][: len(chain)] == chain
            assert after in states


@pytest.mark.parametrize(
    "options", [[], [()], [(1,), (1,)], [(1, 2), (1,)], [(1,), (2, 3), (1, 4)]], ids=lambda options: str(options)
)
def test_ambiguous_and_empty_choices_are_refused(options: list[tuple[int, ...]]) -> None:
    with pytest.raises(GrammarError):
        AutomatonBuilder().choice(options)


def test_a_refused_token_is_named_with_its_place() -> None:
    with pytest.raises(GrammarError, match="token 9 is not allowed at position 1"):
        build([[(1,)], [(2,), (3,)]]).walk([1, 9])


def test_options_may_skip_what_follows() -> None:
    builder = AutomatonBuilder()
    builder.choice([[1], [2]], {(2,): 2})
    builder.choice([[3], [4, 5]], {(3,): 1})
    builder.choice([[6], [7]])
    builder.literal([9])
    automaton = builder.build()
    allowed = {(1, 3, 9), (1, 4, 5, 6, 9), (1, 4, 5, 7, 9), (2, 9)}
    found = set()
    open_ends: list[tuple[tuple[int, ...], int]] = [((), 0)]
    while open_ends:
        ids, state = open_ends.pop()
        if automaton.is_final(state):
            found.add(ids)
        open_ends += [((*ids, token), target) for token, target in automaton.transitions[state].items()]
    assert found == allowed
    assert automaton.longest == 5
    assert all(target > state for state, row in enumerate(automaton.transitions) for target in row.values())
    builder.choice([[1]], {(1,): 1})
    with pytest.raises(GrammarError, match="skips to piece 6 of 5"):
        builder.build()
