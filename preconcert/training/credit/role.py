"""A running baseline per role instead of a group: role-conditioned advantage estimation of SPIRAL (arXiv 2506.24119).

A = R − b_role, then b_role ← α b_role + (1 − α) R, starting from 0. The baseline is read before it is updated, so no
return is compared with itself. All games of a rollout are played by the same policy and read the same baseline; it
then moves as n single updates would move it on average over their orders: b ← αⁿ b + (1 − αⁿ) mean R. So the order of
the games does not matter, and one game per rollout is the paper's update.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from preconcert.training.credit.estimator import Credit, Estimator, Shift, per_strand
from preconcert.training.credit.ledger import Ledger


class RoleCredit(Estimator):
    """Returns less a running baseline per agent (SPIRAL). Its state is the baselines by agent name."""

    grouped: ClassVar[bool] = False

    type: Literal["role"] = "role"
    decay: float = Field(0.95, ge=0, lt=1)
    """α, per game."""

    @property
    def shift(self) -> Shift:
        """The baseline does not move along."""
        return Shift.NONE

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per trajectory of a learner; others move no baseline."""
        held = dict(state or {})
        strands = [(agent, strand) for game in ledger for agent, strand in game.strands.items()]
        advantages = np.array(
            [strand.total - held.get(agent, 0.0) if strand.learns else 0.0 for agent, strand in strands],
            dtype=np.float64,
        )
        returns: dict[str, list[float]] = defaultdict(list)
        for agent, strand in strands:
            if strand.learns:
                returns[agent].append(strand.total)
        for agent, totals in returns.items():
            kept = self.decay ** len(totals)
            held[agent] = kept * held.get(agent, 0.0) + (1.0 - kept) * float(np.mean(np.sort(totals)))
        return Credit(per_strand(ledger, advantages), state=held)
