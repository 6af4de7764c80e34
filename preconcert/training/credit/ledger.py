"""The record that estimators read: who was paid what, and when, without words, tokens or tensors.

Parts: `TurnKey` names a turn, `Strand` is one agent's side of a game, `Game` is one episode, a `Ledger` is a rollout,
and `ledger_of` makes one from episodes. How rewards are put together beforehand is in `rewards.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preconcert.core import Episode, TrainingError
from preconcert.training.credit.rewards import RewardSettings, shaped_rewards


@dataclass(frozen=True, slots=True)
class TurnKey:
    """Names one turn among the episodes of a rollout."""

    episode: int
    """Position in the sequence of episodes."""
    agent: str
    index: int
    """Which of the agent's turns, from 0."""


Number = float | NDArray[np.float64]
"""One number for a whole turn, or one per completion token."""

Values = Mapping[TurnKey, Number]
"""A critic's estimate of what is still to come: before the turn, or before each of its completion tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Strand:
    """One agent's side of a game. All sequences have one entry per turn."""

    agent: str
    rewards: NDArray[np.float64]
    """As the estimators shall see them, shape (turns,)."""
    sampled: tuple[tuple[bool, ...], ...]
    """Per completion token, whether it was a choice. Empty for the turns of players that do not learn."""
    values: NDArray[np.float64] | None = None
    """The critic's estimate before each turn, shape (turns,)."""
    token_values: tuple[NDArray[np.float64], ...] | None = None
    """The critic's estimate before each completion token, where it gives one."""

    @property
    def turns(self) -> int:
        """How many."""
        return len(self.rewards)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Completion tokens per turn."""
        return tuple(len(turn) for turn in self.sampled)

    @property
    def learns(self) -> bool:
        """Written by an adapter that learns. Scripted players and frozen adapters are part of the world."""
        return any(self.sampled)

    @property
    def total(self) -> float:
        """The undiscounted return."""
        return sum(self.rewards.tolist())

    def to_go(self, gamma: float = 1.0) -> NDArray[np.float64]:
        """The discounted return from each turn on, its own reward included."""
        return discounted(self.rewards, gamma)


@dataclass(frozen=True, slots=True, eq=False)
class Game:
    """One episode."""

    group: str
    """Games of one group are samples of the same task instance, or of the same moment of one."""
    strands: Mapping[str, Strand]
    """By agent name, in the order in which the agents act."""


Ledger = Sequence[Game]


def ledger_of(
    episodes: Sequence[Episode],
    rewards: RewardSettings | None = None,
    values: Values | None = None,
    learners: Collection[str] | None = None,
) -> list[Game]:
    """A rollout as estimators read it.

    Args:
        episodes: the rollout; their own rewards stay as the environment paid them.
        rewards: how rewards are put together; None takes them as they are.
        values: a critic's estimates, for every turn of a learner.
        learners: the adapters that learn; None for all.

    Raises:
        TrainingError: a reward or a value is not finite, a value is missing, or does not fit its turn.
    """
    settings = rewards or RewardSettings()
    return [
        Game(
            episode.group,
            {
                agent: _strand(position, episode, agent, paid, values, learners)
                for agent, paid in shaped_rewards(episode, settings).items()
            },
        )
        for position, episode in enumerate(episodes)
    ]


def discounted(amounts: NDArray[np.float64], decay: float) -> NDArray[np.float64]:
    """Σ_{k≥t} decay^{k−t} amounts_k for every t."""
    found = np.empty(len(amounts), dtype=np.float64)
    running = 0.0
    for index in range(len(amounts) - 1, -1, -1):
        running = float(amounts[index]) + decay * running
        found[index] = running
    return found


def _strand(
    position: int,
    episode: Episode,
    agent: str,
    paid: NDArray[np.float64],
    values: Values | None,
    learners: Collection[str] | None,
) -> Strand:
    sampled = tuple(
        turn.sampled if learners is None or turn.adapter in learners else ()
        for turn in episode.trajectories[agent].turns
    )
    if values is None or not any(sampled):
        return Strand(agent, paid, sampled)
    where = f"of {agent!r} in group {episode.group}"
    given: list[Number] = []
    for index, tokens in enumerate(sampled):
        key = TurnKey(position, agent, index)
        if key not in values:
            raise TrainingError(f"no value for turn {index} {where}, episode {position}")
        if not tokens:
            raise TrainingError(f"turn {index} {where} is empty, others are not")
        value = values[key]
        if isinstance(value, np.ndarray) and value.shape != (len(tokens),):
            raise TrainingError(f"{value.size} values for the {len(tokens)} tokens of turn {index} {where}")
        given.append(value)
    per_token = [np.asarray(value, dtype=np.float64) for value in given if isinstance(value, np.ndarray)]
    if per_token and len(per_token) != len(given):
        raise TrainingError(f"values per token at {len(per_token)} of {len(given)} turns {where}")
    if not np.isfinite(np.hstack(given)).all():
        wrong = next(index for index, value in enumerate(given) if not np.isfinite(value).all())
        raise TrainingError(f"value {given[wrong]} at turn {wrong} {where}")
    first = [value[0] for value in per_token] or given
    return Strand(agent, paid, sampled, np.array(first, dtype=np.float64), tuple(per_token) or None)
