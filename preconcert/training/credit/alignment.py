"""Advantages that mind what the other learns from: advantage alignment (arXiv 2406.14662; AdAlign for LLMs).

    A*_t = A¹_t + β (Σ_{k<t} γ^{t−k} A¹_k) A²_t

where A¹ is the agent's own advantage and A² the other's, summed over the others where there are several. What went
well for me so far makes me want what is good for the other now: it will reinforce the actions that got us here. The
base advantages are discounted returns-to-go, centred per task instance, agent and turn index. β = 0 is the plain
learner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from preconcert.training.credit.estimator import Credit, Estimator, Shift
from preconcert.training.credit.ledger import Ledger, Number, TurnKey, discounted
from preconcert.training.credit.turn import TurnCredit


class AlignedCredit(Estimator):
    """Opponent-aware advantages (advantage alignment). Centred before the other's part is added, not after."""

    type: Literal["adalign"] = "adalign"
    beta: float = Field(1.0, allow_inf_nan=False)
    """Weight of the other's advantage; 0 leaves one's own."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per turn."""
    scale: bool = False
    """Divide the base advantages by their standard deviation."""

    @property
    def shift(self) -> Shift:
        """That of the base."""
        return Shift.AGENT if self.gamma == 1 else Shift.NONE

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per turn."""
        base = TurnCredit(gamma=self.gamma, per_index=True, scale=self.scale).estimate(ledger).advantages
        found: dict[TurnKey, Number] = {}
        for position, game in enumerate(ledger):
            own: dict[str, NDArray[np.float64]] = {
                agent: np.array([base[TurnKey(position, agent, index)] for index in range(strand.turns)], dtype=float)
                for agent, strand in game.strands.items()
            }
            for agent, mine in own.items():
                # Σ_{k<t} γ^{t−k} A_k is the discounted sum of the past: the recursion of returns, run forwards.
                past = np.append(0.0, self.gamma * discounted(mine[::-1], self.gamma)[::-1][:-1]) if len(mine) else mine
                others = sum((theirs for other, theirs in own.items() if other != agent), np.zeros_like(mine))
                aligned = mine + self.beta * past * others
                found.update({TurnKey(position, agent, i): float(value) for i, value in enumerate(aligned)})
        return Credit(found)
