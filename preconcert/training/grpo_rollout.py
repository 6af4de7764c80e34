"""What the trainer trains on in one iteration, and who collects it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from preconcert.core import Episode
from preconcert.training.credit import Number, TurnKey
from preconcert.training.rows import Row


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one iteration trains on."""

    rows: Sequence[Row]
    metrics: Mapping[str, float]
    """Logged with the step."""
    policy_tokens: int
    """The policy loss's denominator: its tokens, those of rows left out for want of an advantage included."""
    episodes: Sequence[Episode] = ()
    """What was played."""
    returns: Mapping[TurnKey, Number] | None = None
    """What a critic should have said about `episodes`, where the credit estimator works with one."""
    restarted: Sequence[str] = ()
    """Adapters whose weights were put back before the rollout: what the optimiser remembers of them is void."""


class RolloutSource(Protocol):
    """Plays and rewards; called once per iteration."""

    def collect(self, iteration: int) -> Rollout:
        """This process's share of the rollout, groups kept whole."""
        ...
