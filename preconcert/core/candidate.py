"""Plans as records: what is done in an imagined step, and what a planner weighed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Move:
    """What is done in one step of an imagination."""

    action: str
    """The agent's own action."""
    message: str | None = None
    """The words it sends; None for silence."""
    others: Mapping[str, str] | None = None
    """The other agents' actions where they are given; None leaves them to the model."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plan that was weighed: a first move, and what was imagined to follow."""

    action: str
    message: str | None
    score: float
    """What it was chosen by: the mean return, less what spread and disagreement weigh, and more or less by how often
    the policy proposed it."""
    mean: float
    """Mean imagined return."""
    spread: float
    """Standard deviation of the imagined returns."""
    disagreement: float
    """Share of the view's fields on which the samples differ, from 0 to 1."""
    visits: int
    """Imagined steps spent on it; by tree search, visits of the first move."""
    chosen: bool
    path: tuple[str, ...] = ()
    """The views imagined on the way of one sample, as texts."""
    moves: tuple[Move, ...] = ()
    """What the agent and the others do on that way, the candidate's own first move included."""
    rewards: tuple[float, ...] = ()
    """What that way pays, step by step."""
