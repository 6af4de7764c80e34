"""Turns compared by what came after them: the turn-level estimator of MARS / MARSHAL (arXiv 2510.15414).

A_t = G_t − μ with G_t = Σ_{k≥t} γ^{k−t} r_k, first summed, then centred over the turns of one agent on one task
instance ("sum, then normalise"). A turn is not paid for what came before it. With a reward at the end only, and γ =
1, all turns of a trajectory have the same G, and the estimator differs from `agent` by its weighting alone.

μ is one number for early and late turns, so a late turn's advantage has a constant of its own; `per_index` compares
turns of the same index, where that constant vanishes. Statistics run over turns, not over the distinct values among
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from preconcert.training.credit.estimator import Credit, Estimator, Shift, compared, turns_of
from preconcert.training.credit.ledger import Game, Ledger


class TurnCredit(Estimator):
    """Reward-to-go, centred per task instance and agent (MARS)."""

    type: Literal["turn"] = "turn"
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per turn."""
    per_index: bool = False
    """Compare only turns of the same index."""
    scale: bool = False
    """Divide by the standard deviation."""

    @property
    def shift(self) -> Shift:
        """A discount makes what is paid at the end count less in early turns."""
        return Shift.AGENT if self.gamma == 1 else Shift.NONE

    def group_of(self, game: Game, agent: str, index: int) -> Hashable | None:
        """The agent's turns, or its turns of one index."""
        return (game.group, agent, index if self.per_index else -1)

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per turn; 0 where the task instance was played once, since there is nothing to compare."""
        games = Counter(game.group for game in ledger)
        keys = turns_of(ledger)
        to_go = [strand.to_go(self.gamma) for game in ledger for strand in game.strands.values()]
        groups = [self.group_of(ledger[key.episode], key.agent, key.index) for key in keys]
        found = compared(groups, np.concatenate(to_go).tolist() if to_go else [], self.scale)
        alone = np.array([games[ledger[key.episode].group] == 1 for key in keys], dtype=bool)
        found[alone] = 0.0
        return Credit(dict(zip(keys, found.tolist(), strict=True)))
