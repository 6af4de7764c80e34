"""Whole trajectories compared within a group: GRPO (arXiv 2402.03300, outcome supervision) and its agent-wise form.

A = (R − μ) / (σ + ε) for every turn of a trajectory with return R. `global` takes μ and σ over all agents of the task
instance, as plain GRPO would. Then E[A_k²] = (σ_k² + (μ_k − μ)²) / σ², so an agent whose returns lie far from the
others' gets larger gradients; `agent` takes them per agent (Dr. MAS) and has E[A_k²] = 1. Without `scale`, A = R − μ
(Dr. GRPO, arXiv 2503.20783).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import StrEnum
from typing import Literal

import numpy as np

from preconcert.training.credit.estimator import Credit, Estimator, Shift, compared, per_strand
from preconcert.training.credit.ledger import Game, Ledger


class Weighting(StrEnum):
    """What μ and σ are taken over."""

    TRAJECTORIES = "trajectories"
    """Every trajectory counts once, as in TRL."""
    TURNS = "turns"
    """Every trajectory counts once per turn, as in Dr. MAS; long ones then draw the mean."""


class GroupRelative(Estimator):
    """What `agent` and `global` share."""

    scale: bool = True
    """Divide by the standard deviation; false only centres."""
    weighting: Weighting = Weighting.TRAJECTORIES
    """Count each trajectory once (`trajectories`) or once per turn (`turns`)."""

    def key(self, game: Game, agent: str) -> Hashable:
        """What an agent's return is compared with."""
        raise NotImplementedError

    def group_of(self, game: Game, agent: str, index: int) -> Hashable | None:
        """All turns of a trajectory are equal; which of them count is the weighting. Only learners are compared."""
        if not game.strands[agent].learns:
            return None
        return self.key(game, agent) if index == 0 or self.weighting is Weighting.TURNS else None

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per trajectory of a learner; 0 for those of others."""
        strands = [(self.key(game, agent), strand) for game in ledger for agent, strand in game.strands.items()]
        by_turn = self.weighting is Weighting.TURNS
        counts = np.array(
            [(strand.turns if by_turn else 1) if strand.learns else 0 for _, strand in strands], dtype=np.int64
        )
        keys = [key for (key, _), count in zip(strands, counts, strict=True) for _ in range(count)]
        totals = np.repeat([strand.total for _, strand in strands], counts)
        found = compared(keys, totals.tolist(), self.scale)
        first = np.cumsum(counts) - counts
        advantages = np.zeros(len(strands))
        advantages[counts > 0] = found[first[counts > 0]]
        return Credit(per_strand(ledger, advantages))


class AgentCredit(GroupRelative):
    """Per task instance and agent (Dr. MAS): no agent's scale leaks into another's gradient."""

    type: Literal["agent"] = "agent"

    def key(self, game: Game, agent: str) -> Hashable:
        """An agent's own returns on the task instance."""
        return (game.group, agent)


class GlobalCredit(GroupRelative):
    """Per task instance, all agents pooled (plain GRPO)."""

    type: Literal["global"] = "global"

    @property
    def shift(self) -> Shift:
        """Agents are compared with each other."""
        return Shift.TEAM

    def key(self, game: Game, agent: str) -> Hashable:
        """All returns on the task instance."""
        return game.group
