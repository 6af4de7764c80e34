"""Finished play: trajectories by agent name, and how they ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from preconcert.core.message import Delivery
from preconcert.core.observation import Observation
from preconcert.core.turn import Turn


class StopReason(StrEnum):
    """Why an agent's trajectory ended."""

    TERMINATED = "terminated"
    """The task reached an end of its own."""
    TRUNCATED = "truncated"
    """The horizon was reached."""
    CUT = "cut"
    """Nobody played on: a candidate turn that was judged by its own step."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """All turns of one agent in one episode."""

    agent: str
    turns: tuple[Turn, ...]
    policy_version: int
    """How many updates the policy had had when it wrote these turns; -1 for scripted players."""
    stop_reason: StopReason
    final_observation: Observation
    """What the agent saw after its last turn."""

    @property
    def total_reward(self) -> float:
        """The undiscounted return."""
        return sum(turn.reward for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished play of one task instance by one team."""

    task: str
    params: Mapping[str, Any]
    seed: int
    """Seed of the task instance; members of a group share it."""
    split: str
    group: str
    """Episodes with the same group are samples of the same task instance."""
    sample: int
    """Index within the group."""
    iteration: int
    """The rollout it belongs to, from 0; -1 outside training."""
    trajectories: Mapping[str, Trajectory]
    success: bool | None
    states: tuple[str, ...]
    """Global state in words before each step and at the end: steps + 1 entries."""
    deliveries: tuple[Delivery, ...] = ()
    """What became of every message, by the time it was sent."""

    @property
    def steps(self) -> int:
        """Environment steps taken."""
        return len(self.states) - 1
