"""Each return against the mean of the others: RLOO (arXiv 2402.14740), per agent.

A_i = R_i − 1/(n−1) Σ_{j≠i} R_j = n/(n−1) · (R_i − mean R). Unlike GRPO's, this baseline does not contain the return
that it is subtracted from, so the gradient is unbiased; and nothing is divided by a standard deviation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Literal

import numpy as np

from preconcert.training.credit.estimator import Credit, Estimator, compared, per_strand
from preconcert.training.credit.ledger import Game, Ledger


class LeaveOneOutCredit(Estimator):
    """An agent's return less the mean of its other returns on the task instance (RLOO)."""

    type: Literal["loo"] = "loo"

    def group_of(self, game: Game, agent: str, index: int) -> Hashable | None:
        """All turns of a trajectory are equal; one of them counts."""
        return (game.group, agent) if index == 0 else None

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per trajectory."""
        strands = [((game.group, agent), strand) for game in ledger for agent, strand in game.strands.items()]
        keys = [key for key, _ in strands]
        sizes = Counter(keys)
        factors = np.array([sizes[key] / max(1, sizes[key] - 1) for key in keys], dtype=np.float64)
        centred = compared(keys, [strand.total for _, strand in strands], scale=False)
        return Credit(per_strand(ledger, factors * centred))
