"""The decoding loop: samples all rows of a batch together and jumps over what the grammar forces.

After each sampled token the automaton's forced chain is appended, and both are fed in one forward pass, so a turn costs
as many passes as it has choices. What the loop does not know: adapters, sessions and how hidden states are computed;
those come in as the function `feed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from preconcert.core import uniforms
from preconcert.models.constrained import HeadScale, grammar_table
from preconcert.models.language_model import Completion, CompletionEnd, GenerateRequest, Watched
from preconcert.prompts.automaton import Automaton

_FREE = -1
"""Grammar state of a row without an automaton."""


@dataclass(frozen=True)
class Head:
    """The projection from hidden states to logits."""

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None
    scale: HeadScale


class Grammars:
    """The automatons of a batch as one table, indexed by one state number per row."""

    def __init__(self, automatons: Sequence[Automaton | None]) -> None:
        distinct = list({id(automaton): automaton for automaton in automatons if automaton is not None}.values())
        self.tokens, self.allowed, starts = grammar_table(distinct)
        start_of = {id(automaton): start for automaton, start in zip(distinct, starts, strict=True)}
        self.start: NDArray[np.int64] = np.array(
            [_FREE if automaton is None else start_of[id(automaton)] for automaton in automatons], dtype=np.int64
        )
        states = len(self.allowed)
        chains = [chain for automaton in distinct for chain in automaton.forced]
        self.next_state = np.full(self.allowed.shape, -1, dtype=np.int64)
        self.chain_length: NDArray[np.int64] = np.array([len(chain) for chain, _ in chains], dtype=np.int64)
        self.chain = np.zeros((states, int(self.chain_length.max(initial=0))), dtype=np.int64)
        self.after_chain = np.zeros(states, dtype=np.int64)
        self.final: NDArray[np.bool_] = ~np.any(self.allowed, axis=1).reshape(states)
        for automaton, start in zip(distinct, starts, strict=True):
            columns = np.searchsorted(self.tokens, automaton.tokens)
            targets = automaton.next_state.astype(np.int64)
            self.next_state[start : start + automaton.size, columns] = np.where(targets < 0, -1, targets + start)
            for state, (_, after) in enumerate(automaton.forced):
                self.after_chain[start + state] = start + after
        for state, (chain, _) in enumerate(chains):
            self.chain[state, : len(chain)] = chain


class Writing:
    """The completions of a batch while they are written."""

    def __init__(self, requests: Sequence[GenerateRequest], eos: Sequence[int]) -> None:
        rows = len(requests)
        self.grammars = Grammars([request.automaton for request in requests])
        self.state = self.grammars.start.copy()
        self.limit = np.array([request.max_tokens for request in requests], dtype=np.int64)
        self.eos = np.array(sorted(eos), dtype=np.int64)
        longest = max(
            min(request.max_tokens, request.automaton.longest) if request.automaton else request.max_tokens
            for request in requests
        )
        self.ids = np.zeros((rows, longest + 1), dtype=np.int64)
        self.logprobs = np.zeros((rows, longest + 1), dtype=np.float64)
        self.sampled = np.zeros((rows, longest + 1), dtype=np.bool_)
        self.length = np.zeros(rows, dtype=np.int64)
        self.fed = np.zeros(rows, dtype=np.int64)
        """How many tokens of each completion the model has read."""
        self.done = np.zeros(rows, dtype=np.bool_)
        self._eos_seen = np.zeros(rows, dtype=np.bool_)
        starts = self.grammars.start
        self.watches: dict[int, frozenset[int]] = {
            row: frozenset(int(starts[row]) + state for state in request.watch)
            for row, request in enumerate(requests)
            if request.watch and request.automaton is not None
        }
        """By row the grammar states whose distribution is wanted."""
        self.watched: dict[int, list[Watched]] = {}
        self._follow_chains(np.arange(rows))

    def record(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], logprobs: NDArray[np.float64]) -> None:
        """Append one sampled token to each of these rows, and what the grammar then forces."""
        at = self.length[rows]
        self.ids[rows, at], self.logprobs[rows, at], self.sampled[rows, at] = tokens, logprobs, True
        self.length[rows] += 1
        bound = self.state[rows] != _FREE
        if bound.any():
            columns = np.searchsorted(self.grammars.tokens, tokens[bound])
            self.state[rows[bound]] = self.grammars.next_state[self.state[rows[bound]], columns]
        self._eos_seen[rows] = ~bound & np.isin(tokens, self.eos)
        self._follow_chains(rows)

    def watching(self, rows: NDArray[np.int64]) -> list[int]:
        """Which of these rows, by place, stand in a state whose distribution is wanted."""
        if not self.watches:
            return []
        return [place for place, row in enumerate(rows.tolist()) if self.state[row] in self.watches.get(row, ())]

    def report(self, row: int, logprobs: NDArray[np.float64]) -> None:
        """Keep the distribution that a row's next token comes from.

        Args:
            row: which.
            logprobs: of the grammars' tokens at temperature 1; those that are not allowed do not matter.
        """
        grammars, state = self.grammars, int(self.state[row])
        allowed = np.flatnonzero(grammars.allowed[state])
        self.watched.setdefault(row, []).append(
            Watched(
                position=int(self.length[row]),
                state=state - int(grammars.start[row]),
                tokens=tuple(grammars.tokens[allowed].tolist()),
                logprobs=tuple(logprobs[allowed].tolist()),
            )
        )

    def pending(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Written tokens that the model has not read, right-padded, and how many each row has."""
        counts = self.length[rows] - self.fed[rows]
        places = self.fed[rows][:, None] + np.arange(int(counts.max(initial=0)))
        return self.ids[rows[:, None], np.minimum(places, self.ids.shape[1] - 1)], counts

    def completion(self, row: int) -> Completion:
        """The finished record of one row."""
        length = int(self.length[row])
        if self._eos_seen[row]:
            ended = CompletionEnd.EOS
        elif self.state[row] != _FREE and self.grammars.final[self.state[row]]:
            ended = CompletionEnd.GRAMMAR
        else:
            ended = CompletionEnd.LENGTH
        return Completion(
            ids=tuple(self.ids[row, :length].tolist()),
            logprobs=tuple(self.logprobs[row, :length].tolist()),
            sampled=tuple(self.sampled[row, :length].tolist()),
            ended=ended,
            watched=tuple(self.watched.get(row, ())),
        )

    def _follow_chains(self, rows: NDArray[np.int64]) -> None:
        grammars = self.grammars
        bound = rows[self.state[rows] != _FREE]
        if len(bound):
            state = self.state[bound]
            room = np.maximum(self.limit[bound] - self.length[bound], 0)
            wanted = grammars.chain_length[state]
            count = np.minimum(wanted, room)
            steps = np.arange(grammars.chain.shape[1])
            row, step = np.nonzero(steps < count[:, None])
            self.ids[bound[row], self.length[bound[row]] + step] = grammars.chain[state[row], step]
            self.length[bound] += count
            # A chain cut short by the limit leaves the row in the state before it; the row is done anyway.
            self.state[bound] = np.where(count == wanted, grammars.after_chain[state], state)
        ended = (self.length[rows] >= self.limit[rows]) | self._eos_seen[rows]
        has_state = self.state[rows] != _FREE
        if len(bound):
            ended |= has_state & grammars.final[np.where(has_state, self.state[rows], 0)]
        self.done[rows] = ended


Feed = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], Tensor]
"""`feed(rows, tokens, counts)`: read these right-padded tokens and return the last hidden state of each row."""


def write(requests: Sequence[GenerateRequest], writing: Writing, feed: Feed, head: Head) -> None:
    """Sample until every row is done. The last tokens of a row are not fed.

    Args:
        requests: one per row.
        writing: as made from the requests; holds the result.
        feed: for the first call the rows' prompts must be read before the pending tokens; that is the caller's part.
        head: of the model.
    """
    seeds = np.array([request.seed & (2**64 - 1) for request in requests], dtype=np.uint64)
    temperature = np.array([request.temperature for request in requests], dtype=np.float64)
    grammars = writing.grammars
    device = head.weight.device
    columns = torch.from_numpy(grammars.tokens).to(device)
    narrow = head.weight[columns]
    narrow_bias = head.bias[columns] if head.bias is not None else None
    while not writing.done.all():
        active = np.flatnonzero(~writing.done)
        tokens, counts = writing.pending(active)
        hidden = feed(active, tokens, counts)
        writing.fed[active] += counts
        chosen = np.zeros(len(active), dtype=np.int64)
        logprobs = np.zeros(len(active), dtype=np.float64)
        dice = uniforms(seeds[active], writing.length[active].astype(np.uint64))
        bound = np.flatnonzero(writing.state[active] != _FREE)
        free = np.flatnonzero(writing.state[active] == _FREE)
        if len(bound):
            rows = hidden if not len(free) else hidden[torch.from_numpy(bound).to(device)]
            logits = head.scale.apply(functional.linear(rows, narrow, narrow_bias).float())
            allowed = torch.from_numpy(grammars.allowed[writing.state[active[bound]]]).to(device)
            watching = writing.watching(active[bound])
            if watching:
                places = torch.tensor(watching, device=device)
                masked = logits[places].double().masked_fill(~allowed[places], -torch.inf)
                for place, whole in zip(watching, masked.log_softmax(-1).cpu().numpy(), strict=True):
                    writing.report(int(active[bound[place]]), whole)
            picked, logprobs[bound] = sample(logits, allowed, temperature[active[bound]], dice[bound])
            chosen[bound] = grammars.tokens[picked]
        if len(free):
            rows = hidden if not len(bound) else hidden[torch.from_numpy(free).to(device)]
            logits = head.scale.apply(functional.linear(rows, head.weight, head.bias).float())
            chosen[free], logprobs[free] = sample(logits, None, temperature[active[free]], dice[free])
        writing.record(active, chosen, logprobs)


_COLDEST = 1e-6
"""Below, logits would overflow; the likeliest token is as certain there."""


def sample(
    logits: Float[Tensor, "rows columns"],
    allowed: Bool[Tensor, "rows columns"] | None,
    temperature: Float[np.ndarray, " rows"],
    dice: Float[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Draw one column per row by the inverse of the cumulative distribution, in float64.

    Args:
        logits: of the columns.
        allowed: which columns may be drawn; None for all.
        temperature: 0 takes the largest logit (the first of equal ones).
        dice: a uniform in (0, 1) per row.

    Returns:
        The columns, and their log-probabilities; at temperature 0, those of temperature 1.
    """
    heat = torch.from_numpy(np.where(temperature > 0, np.maximum(temperature, _COLDEST), 1.0)).to(logits.device)
    scaled = logits.double() / heat[:, None]
    if allowed is not None:
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    logps = scaled.log_softmax(-1)
    cumulative = logps.exp().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.from_numpy(dice).to(logits.device)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # A column of probability 0 adds nothing to the sum, so the first one above the target is never such a column.
    picked = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[1] - 1)
    greedy = torch.from_numpy(temperature == 0).to(logits.device)
    picked = torch.where(greedy[:, None], scaled.argmax(-1, keepdim=True), picked)
    return picked[:, 0].cpu().numpy(), logps.gather(1, picked)[:, 0].cpu().numpy()
