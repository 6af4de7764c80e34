"""What all searches are made of: turns proposed by the policy, and imagined ways that are stepped in one batch.

Parts: `Proposal` and `propose`, `Path` with `advance` and `respond`, `Moment` (one decision to be planned) and `Plan`
(what came out of it). Everything random follows from the seed of the request. The number of a candidate plays no part
in it, so candidates are compared on the same luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preconcert.agents.planners.scoring import disagreement, mean_and_spread, return_of, worst_return
from preconcert.agents.planners.settings import ScoreSettings
from preconcert.core import (
    Candidate,
    ImaginedStep,
    Message,
    Move,
    Observation,
    Rehearsing,
    Turn,
    TurnRequest,
    WorldModel,
    derive_seed,
)

Critic = Callable[[Sequence[TurnRequest]], Sequence[float]]
"""Values of imagined moments, for world models that have none."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One decision to be planned."""

    request: TurnRequest
    memory: Any
    """The policy's, of the agent."""
    belief: Any
    """The world model's."""
    horizon: int
    """Steps to imagine at the most."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A turn that the policy would take, and how often it was sampled."""

    turn: Turn
    memory: Any
    """The policy's after it."""
    count: int

    @property
    def move(self) -> Move:
        """What it does."""
        return move_of(self.turn)


@dataclass(slots=True)
class Path:
    """One imagined way."""

    request: TurnRequest
    seed: int
    belief: Any
    memory: Any
    """The policy's, the last move included."""
    moves: list[Move] = field(default_factory=list)
    steps: list[ImaginedStep] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Has it come to an end?"""
        return bool(self.steps) and (self.steps[-1].done or self.steps[-1].malformed)

    @property
    def observation(self) -> Observation:
        """The last view."""
        seen = self.steps[-1].observation if self.steps else self.request.observation
        assert seen is not None
        return seen

    @property
    def inbox(self) -> tuple[Message, ...]:
        """As it then is."""
        return self.steps[-1].inbox if self.steps else self.request.inbox

    def copy(self) -> Path:
        """To go on from in another way."""
        return replace(self, moves=list(self.moves), steps=list(self.steps))

    def asked(self, seed: int) -> TurnRequest:
        """The imagined moment as the policy is asked about it."""
        return replace(self.request, observation=self.observation, inbox=self.inbox, seed=seed)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a search settled on."""

    chosen: Proposal
    candidates: tuple[Candidate, ...]
    """Best first."""
    paths: tuple[Path, ...]
    """The imagined ways of the chosen one."""


def move_of(turn: Turn) -> Move:
    """What a turn does to the world."""
    return Move(turn.action, None if turn.message is None else turn.message.payload)


def propose(
    policy: Rehearsing, asked: Sequence[TurnRequest], memories: Sequence[Any], number: int
) -> list[list[Proposal]]:
    """Sample turns at each moment, all in one call; equal (action, message) become one.

    The first is drawn with the request's own seed: it is the turn that the policy alone would take. Malformed turns are
    dropped; where nothing else was drawn, the first stands with its default action.
    """
    if not asked:
        return []
    drawn = [
        replace(request, seed=request.seed if draw == 0 else derive_seed(request.seed, "candidate", draw))
        for request in asked
        for draw in range(number)
    ]
    answers = policy.rehearse(drawn, [memory for memory in memories for _ in range(number)])
    return [distinct(answers[first : first + number]) for first in range(0, len(answers), number)]


def distinct(answers: Sequence[tuple[Turn, Any]]) -> list[Proposal]:
    """The different turns among some, in the order of their first appearance."""
    sound = [answer for answer in answers if not answer[0].malformed] or answers[:1]
    counts: dict[Move, int] = {}
    first: dict[Move, tuple[Turn, Any]] = {}
    for turn, memory in sound:
        move = move_of(turn)
        counts[move] = counts.get(move, 0) + 1
        first.setdefault(move, (turn, memory))
    return [Proposal(*first[move], count) for move, count in counts.items()]


def shares(proposals: Sequence[Proposal]) -> list[float]:
    """Of the samples that were not malformed, the share that proposed each."""
    total = sum(proposal.count for proposal in proposals)
    return [proposal.count / total for proposal in proposals]


def start(moment: Moment, proposal: Proposal, sample: int) -> Path:
    """A way that begins with a proposal."""
    return Path(moment.request, derive_seed(moment.request.seed, "sample", sample), moment.belief, proposal.memory)


def advance(world: WorldModel, paths: Sequence[Path], moves: Sequence[Move]) -> None:
    """One imagined step on all of these ways, in one call."""
    if not paths:
        return
    seeds = [derive_seed(path.seed, "world", len(path.steps)) for path in paths]
    steps = world.advance([path.belief for path in paths], moves, seeds)
    for path, move, step in zip(paths, moves, steps, strict=True):
        path.moves.append(move)
        path.steps.append(step)
        path.belief = step.belief


def respond(policy: Rehearsing, paths: Sequence[Path]) -> list[Turn]:
    """The policy's own next turn on all of these ways, in one call; the ways remember it."""
    if not paths:
        return []
    requests = [path.asked(derive_seed(path.seed, "turn", len(path.steps))) for path in paths]
    answers = policy.rehearse(requests, [path.memory for path in paths])
    for path, (_, memory) in zip(paths, answers, strict=True):
        path.memory = memory
    return [turn for turn, _ in answers]


def ends(paths: Sequence[Path], critic: Critic | None) -> list[float | None]:
    """A critic's values after the last steps of these ways, where there is one and the model has none."""
    found: list[float | None] = [None] * len(paths)
    if critic is None:
        return found
    open_ends = [place for place, path in enumerate(paths) if not path.over and path.steps[-1].value is None]
    if open_ends:
        values = critic([paths[place].asked(paths[place].request.seed) for place in open_ends])
        for place, value in zip(open_ends, values, strict=True):
            found[place] = float(value)
    return found


def worst_of(moment: Moment, settings: ScoreSettings) -> float:
    """The least that the rest of the episode can pay."""
    request = moment.request
    return worst_return(request.language, request.env.horizon - request.observation.step, settings.gamma)


def weigh(
    paths: Sequence[Path], last: Sequence[float | None], moment: Moment, settings: ScoreSettings, share: float = 1.0
) -> tuple[float, float, float, float]:
    """Score, mean, spread and disagreement of the ways of one candidate.

    Args:
        paths: its ways.
        last: values after their last steps, where the model has none.
        moment: the decision.
        settings: what a way is worth.
        share: of the policy's samples that proposed it.
    """
    worst = worst_of(moment, settings)
    returns = [return_of(path.steps, settings, worst, end) for path, end in zip(paths, last, strict=True)]
    mean, spread = mean_and_spread(returns)
    differ = disagreement([path.steps for path in paths], moment.request.language.view)
    score = mean - settings.spread_weight * spread - settings.disagreement_weight * differ
    score += settings.prior_weight * math.log(share)
    return score, mean, spread, differ


def rounded(score: float) -> float:
    """For comparisons: sums of the same numbers in another order are ties."""
    return round(score, 9) + 0.0


def candidate(
    move: Move, weighed: tuple[float, float, float, float], shown: Path, visits: int, chosen: bool
) -> Candidate:
    """The record of a candidate.

    Args:
        move: its first.
        weighed: score, mean, spread and disagreement.
        shown: the way that is put on record.
        visits: imagined steps spent on it.
        chosen: was it taken?
    """
    score, mean, spread, differ = weighed
    return Candidate(
        action=move.action,
        message=move.message,
        score=score,
        mean=mean,
        spread=spread,
        disagreement=differ,
        visits=visits,
        chosen=chosen,
        path=tuple("malformed" if each.observation is None else each.observation.text for each in shown.steps),
        moves=tuple(
            replace(move, others=dict(step.others)) for move, step in zip(shown.moves, shown.steps, strict=True)
        ),
        rewards=tuple(step.reward for step in shown.steps),
    )
