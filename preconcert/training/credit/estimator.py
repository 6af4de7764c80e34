"""What every estimator is: settings, one pure function, and what it promises.

An estimator is a frozen settings object with `estimate(ledger, state)`. Its promises (`group_of`, `shift`, `grouped`,
`local`) are what the property tests hold it to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from preconcert.training.credit.ledger import Game, Ledger, Number, TurnKey

EPSILON = 1e-4
"""Added to standard deviations; TRL's."""


class Shift(StrEnum):
    """Which constant, added to returns at the last turn, changes no advantage."""

    NONE = "none"
    TEAM = "team"
    """The same for all agents."""
    AGENT = "agent"
    """One for each agent."""


@dataclass(frozen=True, slots=True)
class Credit:
    """What an estimator finds."""

    advantages: Mapping[TurnKey, Number]
    """For every turn of the ledger."""
    returns: Mapping[TurnKey, Number] | None = None
    """What a critic should have said, where values went in."""
    state: Mapping[str, float] = field(default_factory=dict)
    """To be given to the next call."""


class Estimator(BaseModel):
    """From a ledger to advantages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs_values: ClassVar[bool] = False
    """Works on ledgers with a critic's values only."""
    branches: ClassVar[bool] = False
    """Made for games that branch off a common moment."""
    grouped: ClassVar[bool] = True
    """A group of one, or without variance, gives exactly 0."""

    @property
    def shift(self) -> Shift:
        """Which constant changes nothing."""
        return Shift.AGENT

    @property
    def local(self) -> bool:
        """With the same state, two halves of whole groups give what the whole gives."""
        return True

    def group_of(self, game: Game, agent: str, index: int) -> Hashable | None:
        """Turns of equal key have advantages of mean zero; None for a turn that enters no such mean."""
        return None

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """Advantages of all turns.

        Args:
            ledger: a rollout.
            state: of the previous call.
        """
        raise NotImplementedError


def compared(keys: Sequence[Hashable], values: Sequence[float], scale: bool) -> NDArray[np.float64]:
    """(value − mean) / (std + ε) within each group of equal keys.

    The standard deviation has the n − 1 denominator, as in TRL. A group of one, or without variance, gives exactly 0.

    Args:
        keys: one per value.
        values: what is compared.
        scale: divide by the standard deviation; False only centres.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        groups[key].append(position)
    everything = np.asarray(values, dtype=np.float64)
    found = np.zeros(len(everything), dtype=np.float64)
    for places in groups.values():
        members = everything[places]
        if np.ptp(members) > 0:
            centred = members - members.mean()
            found[places] = centred / (members.std(ddof=1) + EPSILON) if scale else centred
    return found


def per_strand(ledger: Ledger, advantages: NDArray[np.float64]) -> dict[TurnKey, Number]:
    """One number per (game, agent), in the ledger's order, given to all turns of the strand."""
    numbers = iter(advantages.tolist())
    found: dict[TurnKey, Number] = {}
    for position, game in enumerate(ledger):
        for agent, strand in game.strands.items():
            number = next(numbers)
            for index in range(strand.turns):
                found[TurnKey(position, agent, index)] = number
    return found


def turns_of(ledger: Ledger) -> list[TurnKey]:
    """Every turn, in the order of games, agents and turns."""
    return [
        TurnKey(position, agent, index)
        for position, game in enumerate(ledger)
        for agent, strand in game.strands.items()
        for index in range(strand.turns)
    ]
