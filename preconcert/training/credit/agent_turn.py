"""Candidate turns compared at one moment: AT-GRPO (Stronger-MAS, arXiv 2510.11062).

The games of a group branch off one snapshot of a running game and differ in the turn taken there; A of that first
turn is (G − μ) / (σ + ε) over the branches, per agent, with G the branch's return. What follows the first turn only
served to find G and gets exactly 0. The branches are made by `preconcert/training/branching.py`; on ordinary
episodes, whose moment is the beginning, only the first turns learn.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import StrEnum
from typing import ClassVar, Literal

from pydantic import Field

from preconcert.training.credit.estimator import Credit, Estimator, compared, turns_of
from preconcert.training.credit.ledger import Game, Ledger


class Score(StrEnum):
    """What a candidate turn is judged by."""

    IMMEDIATE = "immediate"
    """The reward of its own step. Blind where rewards come late."""
    ROLLOUT = "rollout"
    """The return of one sampled continuation to the end (Monte Carlo, as in VinePPO, arXiv 2410.01679)."""


class Follow(StrEnum):
    """Which branch the game goes on with."""

    BEST = "best"
    """The highest score, averaged over agents; ties to the first. Where agents are opposed, that mean says nothing."""
    FIRST = "first"
    """The first, whatever its score: the moments visited are then those of the policy itself."""


class AgentTurnCredit(Estimator):
    """Several turns from the same moment, compared per agent (AT-GRPO); `group` is their number."""

    branches: ClassVar[bool] = True

    type: Literal["agent-turn"] = "agent-turn"
    lines: int = Field(1, ge=1)
    """Games per task instance from whose moments branches are taken."""
    score: Score = Score.ROLLOUT
    """`rollout` to the end, or the `immediate` reward."""
    follow: Follow = Follow.BEST
    """Go on with the `best` branch or with the `first`."""
    scale: bool = True
    """Divide by the standard deviation; false only centres."""

    def group_of(self, game: Game, agent: str, index: int) -> Hashable | None:
        """The first turns."""
        return (game.group, agent) if index == 0 else None

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per branch and agent, at its first turn."""
        strands = [
            (position, agent, game.group, strand.total)
            for position, game in enumerate(ledger)
            for agent, strand in game.strands.items()
        ]
        found = compared([(s[2], s[1]) for s in strands], [s[3] for s in strands], self.scale).tolist()
        firsts = {(s[0], s[1]): number for s, number in zip(strands, found, strict=True)}
        return Credit(
            {key: firsts[(key.episode, key.agent)] if key.index == 0 else 0.0 for key in turns_of(ledger)}
        )
