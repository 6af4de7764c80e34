"""Training rows: turns and transcripts as aligned token streams, ready for the trainer.

Each row is a prompt and a completion with, per completion token, whether it carries loss, its advantage, its sampled
log-probability and the grammar state it was chosen in. Supervised rows (`hindsight`) stand beside the sampled ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from preconcert.agents import Context, GenerativeTeam
from preconcert.core import Episode, Span, SpanKind, TrainingError, Turn
from preconcert.models import UNCONSTRAINED, grammar_table
from preconcert.prompts import Automaton
from preconcert.training.credit import TurnKey
from preconcert.training.hindsight import hindsight_content, true_slots


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to train on. All per-token sequences are as long as `completion_ids`."""

    adapter: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    policy: NDArray[np.bool_]
    """Tokens that carry the policy loss: sampled by the agent, in a span under reinforcement."""
    hindsight: NDArray[np.bool_]
    """Tokens that carry the supervised loss."""
    logprobs: NDArray[np.float32]
    """As sampled; 0 where `policy` is False."""
    advantages: NDArray[np.float32]
    allowed: NDArray[np.int64]
    """Row of the grammar table that the token was chosen under; -1 for free sampling."""

    def __post_init__(self) -> None:
        n = len(self.completion_ids)
        for name in ("policy", "hindsight", "logprobs", "advantages", "allowed"):
            length = len(getattr(self, name))
            if length != n:
                raise TrainingError(f"{name} has {length} entries for {n} completion tokens")


@dataclass(slots=True)
class GrammarTable:
    """The union of the automata in use, as one table of allowed tokens."""

    automata: dict[int, tuple[Automaton, int]] = field(default_factory=dict)
    """By identity: the automaton and its first row."""
    rows: int = 0

    def offset(self, automaton: Automaton) -> int:
        """First table row of an automaton's states."""
        known = self.automata.get(id(automaton))
        if known is None:
            known = (automaton, self.rows)
            self.automata[id(automaton)] = known
            self.rows += automaton.size
        return known[1]

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The table's columns as token ids, ascending, and which of them each row allows."""
        tokens, allowed, _ = grammar_table([automaton for automaton, _ in self.automata.values()])
        return tokens, allowed


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What becomes a row, and which tokens count."""

    policy_spans: frozenset[SpanKind]
    """Spans that receive the task's advantage."""
    hindsight_fraction: float
    """Share of turns that also give a supervised row."""
    trainable: frozenset[str]
    """Adapters that learn; turns of others give no row."""


def build_rows(
    episodes: Sequence[Episode],
    advantages: Mapping[TurnKey, float],
    team: GenerativeTeam,
    table: GrammarTable,
    settings: RowSettings,
    rng: np.random.Generator,
) -> list[Row]:
    """All rows of a rollout, in the order of episodes, agents and turns.

    Args:
        episodes: the rollout.
        advantages: from `credit`.
        team: knows the format and the context mode that the turns were written in.
        table: receives the automata that the rows refer to.
        settings: which tokens count.
        rng: chooses the turns that get a supervised row.
    """
    rows: list[Row] = []
    for position, episode in enumerate(episodes):
        for agent, trajectory in episode.trajectories.items():
            turns = [turn for turn in trajectory.turns if turn.completion_ids]
            if not turns or turns[0].adapter not in settings.trainable:
                continue
            others = tuple(other for other in episode.trajectories if other != agent)
            credit = [advantages[TurnKey(position, agent, i)] for i in range(len(trajectory.turns))]
            parts = [
                _policy_part(turn, others, value, team, table, settings)
                for turn, value in zip(trajectory.turns, credit, strict=True)
            ]
            if team.settings.context is Context.TURN:
                rows.extend(parts)
            else:
                rows.append(_transcript_row(parts))
            for index in range(len(trajectory.turns)):
                if settings.hindsight_fraction > 0 and rng.random() < settings.hindsight_fraction:
                    row = _hindsight_row(episode, agent, index, others, team, table)
                    if row.hindsight.any():
                        rows.append(row)
    return rows


def _states(team: GenerativeTeam, table: GrammarTable, turn: Turn, others: tuple[str, ...], ids: Sequence[int]):
    """Table rows of the states in which the tokens stand; -1 throughout where the ids do not follow the grammar."""
    automaton = team.format.automaton(others, turn.observation.legal_actions)
    offset = table.offset(automaton)
    return automaton, np.array(automaton.walk(ids)[:-1], dtype=np.int64) + offset


def _policy_part(
    turn: Turn,
    others: tuple[str, ...],
    advantage: float,
    team: GenerativeTeam,
    table: GrammarTable,
    settings: RowSettings,
) -> Row:
    n = len(turn.completion_ids)
    policy = np.array(turn.sampled, dtype=bool)
    if not turn.malformed:
        policy &= _span_mask(turn, n, team, settings)
    if team.settings.constrained:
        _, allowed = _states(team, table, turn, others, turn.completion_ids)
    else:
        allowed = np.full(n, UNCONSTRAINED, dtype=np.int64)
    assert turn.adapter is not None
    return Row(
        adapter=turn.adapter,
        prompt_ids=turn.prompt_ids,
        completion_ids=turn.completion_ids,
        policy=policy,
        hindsight=np.zeros(n, dtype=bool),
        logprobs=np.where(policy, np.array(turn.logprobs, dtype=np.float32), np.float32(0)),
        advantages=np.where(policy, np.float32(advantage), np.float32(0)),
        allowed=allowed,
    )


def _span_mask(turn: Turn, length: int, team: GenerativeTeam, settings: RowSettings) -> NDArray[np.bool_]:
    """Everything but the spans that are not under reinforcement; tags and the end mark stay in."""
    mask = np.ones(length, dtype=bool)
    truths = true_slots(team.language)
    for span in turn.spans:
        if span.kind not in settings.policy_spans or (span.kind, span.slot) in truths:
            mask[span.start : span.end] = False
    return mask


def _transcript_row(parts: Sequence[Row]) -> Row:
    """One row for a whole append-only transcript; observation tokens in between carry nothing."""
    first, last = parts[0], parts[-1]
    ids = last.prompt_ids + last.completion_ids
    start = len(first.prompt_ids)
    n = len(ids) - start
    policy = np.zeros(n, dtype=bool)
    logprobs, advantages = np.zeros(n, dtype=np.float32), np.zeros(n, dtype=np.float32)
    allowed = np.full(n, UNCONSTRAINED, dtype=np.int64)
    for part in parts:
        begin = len(part.prompt_ids) - start
        end = begin + len(part.completion_ids)
        if ids[len(part.prompt_ids) : len(part.prompt_ids) + len(part.completion_ids)] != part.completion_ids:
            raise TrainingError(f"the transcript does not hold the completion of {len(part.completion_ids)} tokens")
        policy[begin:end], logprobs[begin:end] = part.policy, part.logprobs
        advantages[begin:end], allowed[begin:end] = part.advantages, part.allowed
    return Row(
        first.adapter, first.prompt_ids, ids[start:], policy, np.zeros(n, dtype=bool), logprobs, advantages, allowed
    )


def _hindsight_row(
    episode: Episode, agent: str, index: int, others: tuple[str, ...], team: GenerativeTeam, table: GrammarTable
) -> Row:
    turn = episode.trajectories[agent].turns[index]
    content = hindsight_content(episode, agent, index, team.language, team.settings.spans)
    written = team.format.write(content, others, turn.observation.legal_actions)
    n = len(written.ids)
    mask = np.zeros(n, dtype=bool)
    truths = true_slots(team.language)
    last = index + 1 == len(episode.trajectories[agent].turns)
    for span in written.spans:
        if _foretells(span) or ((span.kind, span.slot) in truths and not last):
            mask[span.start : span.end] = True
    if team.settings.constrained:
        automaton, allowed = _states(team, table, turn, others, written.ids)
        mask &= np.array([len(automaton.transitions[s]) > 1 for s in automaton.walk(written.ids)[:-1]])
    else:
        allowed = np.full(n, UNCONSTRAINED, dtype=np.int64)
    assert turn.adapter is not None
    zeros = np.zeros(n, dtype=np.float32)
    return Row(turn.adapter, turn.prompt_ids, written.ids, np.zeros(n, dtype=bool), mask, zeros, zeros, allowed)


def _foretells(span: Span) -> bool:
    return span.kind in (SpanKind.INTEND, SpanKind.FORESEE)


def worth_training(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Leave out the rows that cannot change anything: no advantage and no supervised token.

    Returns:
        The other rows (one is always kept), and the number of policy tokens of all rows, by which the loss is divided
        all the same; gradients are those of the full set.
    """
    kept = [row for row in rows if row.advantages.any() or row.hindsight.any()]
    return kept or list(rows[:1]), sum(int(row.policy.sum()) for row in rows)
