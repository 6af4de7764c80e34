"""One return for the whole team: MAGRPO (arXiv 2508.04652).

A_t = R_t − mean over the group of R_t, the same for every agent, with R_t the team's return from turn t on. The
paper's team has one reward; here it is the mean of the agents' rewards.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal

import numpy as np

from preconcert.training.credit.estimator import Credit, Estimator, compared, turns_of
from preconcert.training.credit.ledger import Game, Ledger, discounted
from preconcert.training.credit.rewards import mean_reward


class JointCredit(Estimator):
    """The team's return, compared per task instance and turn index (MAGRPO)."""

    type: Literal["joint"] = "joint"
    scale: bool = False
    """Divide by the standard deviation."""

    def group_of(self, game: Game, agent: str, index: int) -> Hashable | None:
        """The games that got as far as this turn."""
        return (game.group, index)

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per turn, equal for all agents."""
        to_go = [
            discounted(mean_reward({a: s.rewards for a, s in game.strands.items()}, game.group), 1.0)
            for game in ledger
        ]
        places = [(position, index) for position, mine in enumerate(to_go) for index in range(len(mine))]
        values = np.concatenate(to_go).tolist() if to_go else []
        found = compared([(ledger[p].group, index) for p, index in places], values, self.scale)
        by_turn = dict(zip(places, found.tolist(), strict=True))
        return Credit({key: by_turn[(key.episode, key.index)] for key in turns_of(ledger)})
