"""Rewards as estimators see them: own, shared or mixed, scaled by agent, less a price per token.

What the environment paid stays in the episodes; reports read it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from preconcert.core import Episode, TrainingError, UnknownNameError

Finite = Annotated[float, Field(allow_inf_nan=False)]


class RewardMode(StrEnum):
    """Whose reward an agent learns from."""

    INDIVIDUAL = "individual"
    """Its own."""
    JOINT = "joint"
    """The mean of all agents' rewards. A mean and not a sum, so that its size does not grow with the team."""
    MIXED = "mixed"
    """(1 − weight) of its own and weight of the mean of all."""


class RewardSettings(BaseModel):
    """How rewards are put together, step by step: scaled, less the tokens' price, then mixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: RewardMode = RewardMode.INDIVIDUAL
    """`individual`, `joint` or `mixed`."""
    weight: float | None = Field(None, ge=0, le=1)
    """Of the mean of all, for `mixed` alone."""
    scale: Mapping[str, Finite] = Field(default_factory=dict)
    """Factor by agent name; 1 for agents that are not named."""
    token_cost: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Price of one sampled token, in reward; tokens that the grammar forces are free."""

    @model_validator(mode="after")
    def _weight_belongs_to_mixed(self) -> RewardSettings:
        if (self.weight is None) == (self.mode is RewardMode.MIXED):
            wanted = "needs a weight" if self.weight is None else f"takes no weight, and {self.weight:g} is given"
            raise ValueError(f"mode {self.mode.value} {wanted}")
        return self

    def check(self, agents: Iterable[str]) -> None:
        """Look whether the named agents exist.

        Raises:
            UnknownNameError: one does not.
        """
        known = tuple(agents)
        for agent in self.scale:
            if agent not in known:
                raise UnknownNameError("agent", agent, known)


def shaped_rewards(episode: Episode, settings: RewardSettings) -> dict[str, NDArray[np.float64]]:
    """Every agent's rewards per turn, as its estimator shall see them.

    Raises:
        TrainingError: a reward is not finite, or rewards are shared between agents with unequal numbers of turns.
    """
    paid: dict[str, NDArray[np.float64]] = {}
    for agent, trajectory in episode.trajectories.items():
        own = np.array([turn.reward for turn in trajectory.turns], dtype=np.float64)
        if not np.isfinite(own).all():
            step = int(np.flatnonzero(~np.isfinite(own))[0])
            raise TrainingError(f"reward {own[step]} of {agent!r} at turn {step} in group {episode.group}")
        if agent in settings.scale:
            own = own * settings.scale[agent]
        if settings.token_cost:
            own = own - settings.token_cost * np.array([sum(turn.sampled) for turn in trajectory.turns])
        paid[agent] = own
    if settings.mode is RewardMode.INDIVIDUAL:
        return paid
    shared = mean_reward(paid, episode.group)
    weight = 1.0 if settings.weight is None else settings.weight
    return {agent: (1.0 - weight) * own + weight * shared for agent, own in paid.items()}


def mean_reward(paid: Mapping[str, NDArray[np.float64]], group: str) -> NDArray[np.float64]:
    """The team's reward per step.

    Raises:
        TrainingError: the agents have unequal numbers of turns.
    """
    lengths = {agent: len(own) for agent, own in paid.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{agent} {length}" for agent, length in lengths.items())
        raise TrainingError(f"group {group}: a team's reward needs equally many turns of every agent, not {counts}")
    mean: NDArray[np.float64] = np.mean(list(paid.values()), axis=0)
    return mean
