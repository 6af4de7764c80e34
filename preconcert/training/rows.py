"""Training rows: turns and transcripts as aligned token streams, ready for the trainer.

Each row is a prompt and a completion with, per completion token, whether it carries loss, its advantage, its sampled
log-probability, the grammar state it was chosen in, and, in prediction spans, the token that hindsight would have put
there. `worth_training` and `trained_tokens` say which rows and which tokens move anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from preconcert.agents import Context, GenerativeTeam
from preconcert.core import Episode, Latent, SpanKind, TrainingError, Turn, derive_seed
from preconcert.models import UNCONSTRAINED, Placed, grammar_table
from preconcert.prompts import Automaton
from preconcert.training.credit import Number, TurnKey
from preconcert.training.hindsight import hindsight_content, true_slots


class SpeechGradient(StrEnum):
    """How the sender of a latent message learns what to send."""

    SCORE = "score"
    """By the score function of the Gaussian that it is drawn from: right for any channel."""
    PATH = "path"
    """By the gradient of its receivers' losses through the message: for channels that are differentiable, those that
    deliver, delay or add noise."""
    BOTH = "both"
    """By both."""


KINDS = tuple(SpanKind)
"""What the numbers in `Row.kinds` stand for."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a latent message came from."""

    ids: tuple[int, ...]
    """Everything its sender had read and written."""
    adapter: str
    heard: tuple[Placed, ...] = ()
    """Latent messages in `ids`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to train on. All per-token sequences are as long as `completion_ids`."""

    adapter: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    policy: NDArray[np.bool_]
    """Tokens that carry the policy loss: sampled by the agent, in a span under reinforcement."""
    targets: NDArray[np.int64]
    """What hindsight would have written in the token's place; -1 where it does not know."""
    logprobs: NDArray[np.float32]
    """As sampled; 0 where `policy` is False."""
    advantages: NDArray[np.float32]
    allowed: NDArray[np.int64]
    """Row of the grammar table that the token was chosen under; -1 for free sampling."""
    agent: str
    """Who wrote it."""
    joint: NDArray[np.int64]
    """Which step of which episode each token belongs to, numbered through the rollout; -1 for tokens of no turn."""
    kinds: NDArray[np.int64]
    """The span of each token, a position in `KINDS`; -1 outside of spans."""
    name: str
    """Episode, agent and turn: the same in every process and for any division of the work."""
    heard: tuple[Placed, ...] = ()
    """Latent messages in the prompt."""
    said: Latent | None = None
    """The latent message that was drawn after the completion."""
    said_advantage: float = 0.0
    """What it is reinforced with."""
    sources: tuple[Source, ...] = ()
    """What the senders of `heard` had read and written, one each, where gradients are to reach them; else empty."""

    def __post_init__(self) -> None:
        n = len(self.completion_ids)
        for name in ("policy", "targets", "logprobs", "advantages", "allowed", "joint", "kinds"):
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
    hindsight: bool
    """Give prediction spans their targets."""
    bind_action: bool
    """Give the action a target too, the one taken, where the forecast before it came true."""
    trainable: frozenset[str]
    """Adapters that learn; turns of others give no row."""
    speech: SpeechGradient = SpeechGradient.SCORE
    """How senders of latent messages learn."""
    first_turn_only: bool = False
    """The policy loss is on the first turn of each episode alone: what follows was played to judge that turn."""


def build_rows(
    episodes: Sequence[Episode],
    advantages: Mapping[TurnKey, Number],
    team: GenerativeTeam,
    table: GrammarTable,
    settings: RowSettings,
) -> list[Row]:
    """All rows of a rollout, in the order of episodes, agents and turns.

    Args:
        episodes: the rollout.
        advantages: from `credit`; one number per turn, or one per completion token.
        team: knows the format and the context mode that the turns were written in.
        table: receives the automata that the rows refer to.
        settings: which tokens count.

    Raises:
        TrainingError: advantages per token that do not fit their turn.
    """
    rows: list[Row] = []
    starts = np.cumsum([0, *(episode.steps for episode in episodes)])
    for position, episode in enumerate(episodes):
        for agent, trajectory in episode.trajectories.items():
            turns = [turn for turn in trajectory.turns if turn.completion_ids]
            if not turns or turns[0].adapter not in settings.trainable:
                continue
            others = tuple(other for other in episode.trajectories if other != agent)
            parts = [
                _turn_row(
                    episode,
                    agent,
                    i,
                    others,
                    advantages[TurnKey(position, agent, i)],
                    int(starts[position]) + i,
                    team,
                    table,
                    settings,
                )
                for i in range(len(trajectory.turns))
            ]
            if team.settings.context is Context.TURN:
                rows.extend(parts)
            else:
                rows.append(_transcript_row(parts))
    return rows


def _turn_row(
    episode: Episode,
    agent: str,
    index: int,
    others: tuple[str, ...],
    advantage: Number,
    joint: int,
    team: GenerativeTeam,
    table: GrammarTable,
    settings: RowSettings,
) -> Row:
    turn = episode.trajectories[agent].turns[index]
    n = len(turn.completion_ids)
    if np.ndim(advantage) and np.shape(advantage) != (n,):
        raise TrainingError(
            f"{np.size(advantage)} advantages for the {n} tokens of turn {index} of {agent!r} in group {episode.group}"
        )
    policy = np.array(turn.sampled, dtype=bool) & (index == 0 or not settings.first_turn_only)
    if not turn.malformed:
        policy &= _span_mask(turn, n, team, settings)
    allowed = np.full(n, UNCONSTRAINED, dtype=np.int64)
    if team.settings.constrained:
        automaton = team.format.automaton(others, turn.observation.legal_actions)
        allowed = np.array(automaton.walk(turn.completion_ids)[:-1], dtype=np.int64) + table.offset(automaton)
    targets = np.full(n, -1, dtype=np.int64)
    if settings.hindsight and not turn.malformed:
        targets = _targets(episode, agent, index, others, team, settings.bind_action)
    assert turn.adapter is not None
    heard = _heard(episode, agent, index, others, team)
    latent = turn.message.latent if turn.message is not None else None
    drawn = latent is not None and bool(latent.drawn) and settings.speech is not SpeechGradient.PATH
    drawn &= SpanKind.SAY in settings.policy_spans and (index == 0 or not settings.first_turn_only)
    kinds = np.full(n, -1, dtype=np.int64)
    for span in turn.spans:
        kinds[span.start : span.end] = KINDS.index(span.kind)
    return Row(
        adapter=turn.adapter,
        prompt_ids=turn.prompt_ids,
        completion_ids=turn.completion_ids,
        policy=policy,
        targets=targets,
        logprobs=np.where(policy, np.array(turn.logprobs, dtype=np.float32), np.float32(0)),
        advantages=np.where(policy, np.asarray(advantage, dtype=np.float32), np.float32(0)),
        allowed=allowed,
        agent=agent,
        joint=np.full(n, joint, dtype=np.int64),
        kinds=kinds,
        name=f"{episode.group}:{episode.iteration}:{episode.sample}:{agent}:{index}",
        heard=heard,
        said=latent if drawn else None,
        said_advantage=float(np.mean(advantage)) if drawn else 0.0,
        sources=_sources(episode, turn, heard, team) if settings.speech is not SpeechGradient.SCORE else (),
    )


def _heard(
    episode: Episode, agent: str, index: int, others: tuple[str, ...], team: GenerativeTeam
) -> tuple[Placed, ...]:
    """The latent messages in a turn's prompt."""
    turn = episode.trajectories[agent].turns[index]
    done = [earlier.action for earlier in episode.trajectories[agent].turns[:index]]
    return team.heard(agent, turn.observation, turn.inbox, others, done)


def _sources(episode: Episode, turn: Turn, heard: Sequence[Placed], team: GenerativeTeam) -> tuple[Source, ...]:
    """Where the latent messages of a turn came from; without an adapter where that is not known, because another
    message arrived than was sent."""
    found: list[Source] = []
    received = [message for message in turn.inbox if message.latent is not None]
    for message, placed in zip(received, heard, strict=True):
        theirs = episode.trajectories[message.sender].turns
        index = next((i for i, other in enumerate(theirs) if other.step == message.sent_at), None)
        source = Source((), "")
        if index is not None:
            sender = theirs[index]
            sent = sender.message.latent if sender.message is not None else None
            arrived = placed.latent.drawn  # fewer than were sent where the channel cuts messages short
            own = sent is not None and bool(arrived) and sent.drawn[: len(arrived)] == arrived
            if own and sender.adapter is not None:
                rest = tuple(other for other in episode.trajectories if other != message.sender)
                before = _heard(episode, message.sender, index, rest, team)
                source = Source(sender.prompt_ids + sender.completion_ids, sender.adapter, before)
        found.append(source)
    return tuple(found)


def _targets(
    episode: Episode, agent: str, index: int, others: tuple[str, ...], team: GenerativeTeam, bind_action: bool
) -> NDArray[np.int64]:
    """The tokens that the turn's predictions should have had, given what it had written before them.

    Within a span the target holds up to and including the first token at which the sampled word and the true one part;
    after it the truth no longer continues what was written. Forced tokens get no target.

    Where a message could end before a word that hindsight knows, both what was said there and the end are targets, the
    one as it should have been, the other as it was. On average that moves only the word and not whether it is said:
    how often each is a target is how likely it was.
    """
    turn = episode.trajectories[agent].turns[index]
    content = hindsight_content(episode, agent, index, team.language, team.settings.spans, team.format.speech)
    written = team.format.write(content, others, turn.observation.legal_actions)
    targets = np.full(len(turn.completion_ids), -1, dtype=np.int64)
    truths = true_slots(team.language)
    last = index + 1 == len(episode.trajectories[agent].turns)
    came_true = turn.forecast is not None and tuple(turn.forecast.fields.values()) == content.forecast != ()
    for sampled, true in zip(turn.spans, written.spans, strict=True):
        known = sampled.kind in (SpanKind.INTEND, SpanKind.FORESEE)
        known |= (sampled.kind, sampled.slot) in truths and not last
        known |= sampled.kind is SpanKind.ACT and bind_action and came_true
        if not known:
            continue
        for offset in range(min(sampled.end - sampled.start, true.end - true.start)):
            place, token = sampled.start + offset, written.ids[true.start + offset]
            if turn.sampled[place]:
                targets[place] = token
            if turn.completion_ids[place] != token:
                break
    return targets


def _span_mask(turn: Turn, length: int, team: GenerativeTeam, settings: RowSettings) -> NDArray[np.bool_]:
    """Everything but the spans that are not under reinforcement; tags and the end mark stay in."""
    mask = np.ones(length, dtype=bool)
    # Whether to say a word that hindsight knows is the task's business, where a message may end before it.
    truths = frozenset() if team.format.speech.stops else true_slots(team.language)
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
    targets, joint, kinds = (np.full(n, -1, dtype=np.int64) for _ in range(3))
    for part in parts:
        begin = len(part.prompt_ids) - start
        end = begin + len(part.completion_ids)
        if ids[len(part.prompt_ids) : len(part.prompt_ids) + len(part.completion_ids)] != part.completion_ids:
            raise TrainingError(f"the transcript does not hold the completion of {len(part.completion_ids)} tokens")
        policy[begin:end], logprobs[begin:end], targets[begin:end] = part.policy, part.logprobs, part.targets
        advantages[begin:end], allowed[begin:end], joint[begin:end] = part.advantages, part.allowed, part.joint
        kinds[begin:end] = part.kinds
    return Row(
        first.adapter,
        first.prompt_ids,
        ids[start:],
        policy,
        targets,
        logprobs,
        advantages,
        allowed,
        first.agent,
        joint,
        kinds,
        first.name,
    )


def worth_training(
    rows: Sequence[Row], fraction: float, seed: int, keep: bool = False, free: Sequence[Row] | None = None
) -> tuple[list[Row], int]:
    """Leave out rows without an advantage: they cannot change the policy.

    Rows with an advantage keep their hindsight targets, which cost nothing more. Of the others a share is kept for its
    targets alone, so that predictions are still trained where every episode ends the same way.

    Args:
        rows: of one rollout, or one process's part of it.
        fraction: share of the rows without an advantage to keep, 0 to 1.
        seed: chooses them, each by its name, so that a division of the rollout among processes chooses the same.
        keep: only take away their targets, for those who want to know the ratios of all rows.
        free: the same rows before messages were charged; these decide about targets, so that a price on messages
            changes nothing about what predictions are trained on. None where nothing was charged.

    Returns:
        The rows (one is always there, if need be without targets), and the number of policy tokens of all rows, by
        which the loss is divided all the same: the policy's gradient is that of the full set.
    """
    kept: list[Row] = []
    for row, plain in zip(rows, rows if free is None else free, strict=True):
        learns = plain.advantages.any() or bool(plain.said_advantage)
        if learns or ((row.targets >= 0).any() and _share_of(seed, row.name) < fraction):
            kept.append(row)
        elif keep or row.advantages.any() or row.said_advantage:
            kept.append(_without_targets(row))
    return kept or [_without_targets(row) for row in rows[:1]], sum(int(row.policy.sum()) for row in rows)


def trained_tokens(rows: Sequence[Row]) -> dict[str, int]:
    """How many tokens have an advantage other than 0, by span, and how many a hindsight target.

    `other` are sampled tokens outside of spans: the tags and the end of turns that are written without a grammar, and
    all of those that cannot be read.
    """
    counts = np.zeros(len(KINDS) + 1, dtype=np.int64)
    for row in rows:
        counts += np.bincount(row.kinds[row.policy & (row.advantages != 0)] + 1, minlength=len(counts))
    found = {kind.value: int(count) for kind, count in zip(KINDS, counts[1:], strict=True)}
    return {**found, "other": int(counts[0]), "hindsight": sum(int((row.targets >= 0).sum()) for row in rows)}


def _share_of(seed: int, name: str) -> float:
    return derive_seed(seed, name) / 2.0**63


def _without_targets(row: Row) -> Row:
    return replace(row, targets=np.full_like(row.targets, -1))
