"""What vLLM is told about every row beyond the prompt, and how the rows of a step are decided by it.

Parts: `Spelling` (a grammar as a request carries it), `Row` and `Written` (what goes to an engine and what comes back),
`instructions` (the text of a request), `read_instructions` and `Dicing` (the other end, inside the engine's process).

vLLM's own sampler knows neither our dice nor our grammars. Here every row's token is drawn by `decoding.sample` from
the counter-based uniforms of its seed, in float64, and all other tokens are masked, so that the engine's greedy choice
is that token: the same one that every other backend draws, whatever else is in the batch. Nothing of vLLM is imported.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from preconcert.core import ModelError, uniforms
from preconcert.models.decoding import sample
from preconcert.prompts.automaton import Automaton

GRAMMAR, ROWS, WATCH, STOP = "preconcert_grammar", "preconcert_rows", "preconcert_watch", "preconcert_stop"
"""Keys of a request's extra arguments."""
_FREE = -1
"""State of a row without a grammar."""
_OVER = -2
"""State of a row whose grammar is complete."""


@dataclass(frozen=True)
class Spelling:
    """A grammar as an engine sees it: what must come first stands in the prompt, what must come last is left out."""

    text: str
    """The automaton as JSON: per state its tokens and the states that they lead to, one after the other."""
    leading: tuple[int, ...]
    """Tokens that come before the first choice."""
    steps: int
    """Tokens from the first choice to the last, both included, at the most."""
    stop: int | None
    """Token that the engine writes when there is no choice left; None where every way has the same number of steps."""

    @staticmethod
    def of(automaton: Automaton, vocabulary: int) -> Spelling:
        """The spelling of an automaton; made once.

        Args:
            automaton: the grammar.
            vocabulary: number of tokens that the model knows.

        Raises:
            ModelError: the grammar uses every token of the vocabulary, and its ways differ in length.
        """
        known = _SPELLINGS.get(automaton)
        if known is None:
            known = _SPELLINGS[automaton] = _spell(automaton, vocabulary)
        return known


_SPELLINGS: weakref.WeakKeyDictionary[Automaton, Spelling] = weakref.WeakKeyDictionary()


def _spell(automaton: Automaton, vocabulary: int) -> Spelling:
    rows = [[number for pair in row.items() for number in pair] for row in automaton.transitions]
    shortest, longest = [0] * automaton.size, [0] * automaton.size
    for state in reversed(range(automaton.size)):
        if not _closing(automaton, state):
            targets = automaton.transitions[state].values()
            shortest[state] = 1 + min(shortest[target] for target in targets)
            longest[state] = 1 + max(longest[target] for target in targets)
    leading, first = automaton.forced[0]
    stop = None
    if shortest[first] != longest[first]:
        used = set(automaton.column)
        stop = next((token for token in reversed(range(vocabulary)) if token not in used), None)
        if stop is None:
            raise ModelError(f"a grammar of all {vocabulary} tokens and of several lengths leaves none to end with")
    return Spelling(json.dumps(rows, separators=(",", ":")), leading, longest[first], stop)


def _closing(automaton: Automaton, state: int) -> bool:
    """Is there no choice left from here on?"""
    return automaton.is_final(automaton.forced[state][1])


@dataclass(frozen=True, slots=True)
class Row:
    """One continuation that an engine is to write."""

    prompt_ids: tuple[int, ...]
    """The prompt with the grammar's leading tokens."""
    adapter: str | None
    """Name that the engine knows it by; None for the base model."""
    tokens: int
    """How many to write at the most; at least 1."""
    grammar: Spelling | None = None
    """None samples from the whole vocabulary."""
    seed: int = 0
    temperature: float = 1.0
    forced: tuple[int, ...] | None = None
    """These are written, whatever is likely, and their log-probabilities reported at temperature 1."""
    watch: tuple[int, ...] = ()
    """States of the grammar whose whole distribution is reported, ascending."""
    watched: int = 0
    """Most tokens that any of these states allows."""
    stops: tuple[int, ...] = ()
    """Tokens that end the row."""
    embeds: Tensor | None = None
    """The prompt as embeddings, shape (tokens, width), where it holds a latent message."""

    @property
    def key(self) -> str:
        """By which the engine's process knows the prompt again among several of one request."""
        return key_of(self.prompt_ids)


@dataclass(frozen=True, slots=True)
class Written:
    """What an engine wrote."""

    ids: tuple[int, ...]
    """The tokens, a stop among them."""
    logprobs: tuple[float, ...]
    """Of each, among what the grammar allows and at the row's temperature; at temperature 1 where it is watched."""
    tables: tuple[Mapping[int, float], ...] = ()
    """Per token all that was reported; more than the token itself where it is watched. Empty if nothing is watched."""


def key_of(prompt_ids: Sequence[int]) -> str:
    """A short name for a prompt."""
    return hashlib.blake2b(np.asarray(prompt_ids, dtype=np.int64).tobytes(), digest_size=8).hexdigest()


def instructions(rows: Sequence[Row]) -> dict[str, Any]:
    """The extra arguments of one request.

    Args:
        rows: with different prompts; alike in grammar, watched states and stops.

    Returns:
        Strings and lists of strings, as an HTTP request can carry them.
    """
    first = rows[0]
    found: dict[str, Any] = {ROWS: [_row_text(row, row.key if len(rows) > 1 else "") for row in rows]}
    if first.grammar is not None:
        found[GRAMMAR] = first.grammar.text
        if first.grammar.stop is not None:
            found[STOP] = str(first.grammar.stop)
    if first.watch:
        found[WATCH] = ",".join(map(str, first.watch))
    return found


def _row_text(row: Row, key: str) -> str:
    forced = "" if row.forced is None else ",".join(map(str, row.forced))
    return f"{key}:{row.seed & (2**64 - 1)}:{row.temperature!r}:{'' if row.forced is None else 'f'}:{forced}"


@dataclass(frozen=True)
class Grammar:
    """A grammar inside the engine's process."""

    automaton: Automaton
    columns: Tensor
    """Its tokens."""
    allowed: Tensor
    """Shape (states, columns)."""
    closing: tuple[bool, ...]
    """Per state: is there no choice left?"""

    def after(self, state: int, token: int) -> int:
        """The next state; `_OVER` where the token is not of the grammar, as the stop is not."""
        return self.automaton.transitions[state].get(token, _OVER)


@dataclass
class DiceRow:
    """A row while it is written."""

    grammar: Grammar | None
    seed: int
    temperature: float
    forced: tuple[int, ...] | None
    watch: frozenset[int]
    stop: int
    outputs: Sequence[int]
    """What the engine has written so far: its own list, which grows."""
    offset: int = 0
    """Tokens of the completion that stand in the prompt."""
    state: int = _FREE
    """Of the grammar, after `read` tokens."""
    read: int = 0

    @property
    def over(self) -> bool:
        """Is there nothing left to choose?"""
        if self.forced is not None:
            return self.read >= len(self.forced)
        return self.grammar is not None and (self.state == _OVER or self.grammar.closing[self.state])

    def catch_up(self) -> None:
        """Follow what was written since."""
        for token in self.outputs[self.read :]:
            if self.grammar is not None and self.state != _OVER:
                self.state = self.grammar.after(self.state, int(token))
        self.read = len(self.outputs)


@lru_cache(maxsize=512)
def _grammar(text: str, device: str) -> Grammar:
    try:
        lists = json.loads(text)
        transitions = [dict(zip(map(int, one[::2]), map(int, one[1::2]), strict=True)) for one in lists]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{GRAMMAR} is no automaton: {error}") from error
    # Upwards only: then it has an end, and reading it cannot go round in circles.
    if not transitions or any(
        not state < target < len(transitions) for state, row in enumerate(transitions) for target in row.values()
    ):
        raise ValueError(f"{GRAMMAR} is no automaton: every transition must lead to a later state that is there")
    automaton = Automaton(transitions)
    return Grammar(
        automaton,
        torch.from_numpy(automaton.tokens).to(device),
        torch.from_numpy(automaton.allowed).to(device),
        tuple(_closing(automaton, state) for state in range(automaton.size)),
    )


def read_instructions(
    extra: Mapping[str, Any] | None,
    vocabulary: int,
    device: str,
    prompt_ids: Sequence[int] | None = None,
    outputs: Sequence[int] = (),
) -> DiceRow | None:
    """The row that a request's extra arguments describe; None for a request without instructions.

    Args:
        extra: the extra arguments.
        vocabulary: number of tokens that the model knows.
        device: where logits will be.
        prompt_ids: the row's prompt; only needed if the request has several. None where it is not known yet: then any
            row of the request does, to see whether it can be read.
        outputs: the list that the engine appends the row's tokens to.

    Raises:
        ValueError: they cannot be read, or name tokens that are not there.
    """
    if not extra or ROWS not in extra:
        return None
    lines = extra[ROWS]
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{ROWS} must be a list of strings")
    line = lines[0]
    if len(lines) > 1 and prompt_ids is not None:
        key = key_of(prompt_ids) + ":"
        line = next((one for one in lines if one.startswith(key)), "")
    try:
        _, seed, temperature, kind, tokens = line.split(":")
        forced = tuple(map(int, tokens.split(","))) if kind == "f" else None
        row = DiceRow(
            None if GRAMMAR not in extra else _grammar(str(extra[GRAMMAR]), device),
            int(seed),
            float(temperature),
            forced,
            frozenset(map(int, filter(None, str(extra.get(WATCH, "")).split(",")))),
            int(extra.get(STOP, 0)),
            outputs,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{ROWS} cannot be read: {error}") from error
    used = (row.stop, *(forced or ()), *(row.grammar.automaton.column if row.grammar is not None else ()))
    if not 0 <= row.seed < 2**64 or not 0 <= row.temperature < float("inf"):
        raise ValueError(f"seed {seed} and temperature {temperature} must be numbers from 0 up")
    if min(used) < 0 or max(used) >= vocabulary:
        raise ValueError(f"a token is not among the model's {vocabulary}: {min(used)} to {max(used)}")
    if row.grammar is not None:
        leading, row.state = row.grammar.automaton.forced[0]
        row.offset = len(leading)
    return row


@dataclass
class _Decision:
    """What was decided of the rows of one step."""

    places: Tensor
    tokens: Tensor
    logprobs: Tensor
    watched: list[tuple[int, Tensor, Tensor]]
    """Per row whose state is watched: its place, the tokens that it allows and their log-probabilities."""


class Dicing:
    """The rows of the engine's batch that have instructions, by their place in it."""

    def __init__(self) -> None:
        self.rows: dict[int, DiceRow] = {}
        self.last: _Decision | None = None
        """Of the step that is being sampled."""

    def decide(self, logits: Float[Tensor, "rows vocabulary"]) -> None:
        """Pick a token for each of the rows and mask all others, in place."""
        self.last = None
        if not self.rows:
            return
        places = sorted(self.rows)
        tokens = np.zeros(len(places), dtype=np.int64)
        logprobs = np.zeros(len(places), dtype=np.float64)
        watched: list[tuple[int, Tensor, Tensor]] = []
        groups: dict[int, list[int]] = {}
        for number, place in enumerate(places):
            row = self.rows[place]
            row.catch_up()
            if row.over:
                tokens[number] = row.stop
            else:
                groups.setdefault(id(row.grammar), []).append(number)
        for members in groups.values():
            mine = [self.rows[places[number]] for number in members]
            at = torch.tensor([places[number] for number in members], device=logits.device)
            # Of a grammar's rows only its tokens' columns are looked at: a vocabulary can be large.
            part = logits[at] if mine[0].grammar is None else logits[at[:, None], mine[0].grammar.columns]
            tokens[members], logprobs[members], seen = self._draw(part, mine)
            watched += [(places[members[index]], ids, values) for index, ids, values in seen]
        at = torch.tensor(places, device=logits.device)
        picked = torch.from_numpy(tokens).to(logits.device)
        logits[at] = -torch.inf
        logits[at, picked] = 0.0
        self.last = _Decision(at, picked, torch.from_numpy(logprobs).float().to(logits.device), watched)

    def report(self, ids: Tensor, values: Tensor) -> None:
        """Put the log-probabilities of the last decision in the place of the engine's own, in place.

        Args:
            ids: shape (rows, columns): the token itself and others.
            values: their log-probabilities, alike in shape.
        """
        last = self.last
        if last is None or not ids.numel():
            return
        ids[last.places] = last.tokens[:, None].to(ids.dtype)
        values[last.places] = last.logprobs[:, None].to(values.dtype)
        for place, tokens, logprobs in last.watched:
            count = min(len(tokens), ids.shape[1] - 1)
            ids[place, 1 : count + 1] = tokens[:count].to(ids.dtype)
            values[place, 1 : count + 1] = logprobs[:count].to(values.dtype)
            own = tokens == ids[place, 0]
            values[place, 0] = logprobs[own][0].to(values.dtype)
            values[place, count + 1 :] = values[place, 0]

    def _draw(
        self, logits: Float[Tensor, "rows columns"], rows: Sequence[DiceRow]
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, Tensor, Tensor]]]:
        """Tokens and log-probabilities of rows of one grammar, and the distributions that are watched.

        Args:
            logits: of the grammar's tokens; of the whole vocabulary where there is none.
            rows: alike in grammar.
        """
        grammar = rows[0].grammar
        allowed = None
        if grammar is not None:
            allowed = grammar.allowed[torch.tensor([row.state for row in rows], device=logits.device)]
        logits = logits.float()
        seeds = np.array([row.seed for row in rows], dtype=np.uint64)
        heat = np.array([row.temperature if row.forced is None else 1.0 for row in rows])
        dice = uniforms(seeds, np.array([row.offset + row.read for row in rows], dtype=np.uint64))
        picked, logprobs = sample(logits, allowed, heat, dice)
        tokens = picked if grammar is None else grammar.automaton.tokens[picked]
        told = [index for index, row in enumerate(rows) if row.forced is not None or row.state in row.watch]
        if not told:
            return tokens, logprobs, []
        whole = logits[told].double()
        if allowed is not None:
            whole = whole.masked_fill(~allowed[told], -torch.inf)
        whole = whole.log_softmax(-1)
        seen: list[tuple[int, Tensor, Tensor]] = []
        for index, table in zip(told, whole, strict=True):
            row = rows[index]
            if row.forced is not None:
                token = tokens[index] = row.forced[row.read]
                column = token if grammar is None else grammar.automaton.column.get(token)
                logprobs[index] = -np.inf if column is None else float(table[column])
            elif grammar is not None and len(grammar.automaton.transitions[row.state]) > 1:
                open_ = grammar.allowed[row.state]
                seen.append((index, grammar.columns[open_], table[open_]))
        return tokens, logprobs, seen
