"""What an agent is given to read, and what a step of the world returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Observation:
    """What one agent sees at one step."""

    agent: str
    """Whose view this is."""
    text: str
    """The view in words."""
    legal_actions: tuple[str, ...]
    """What the agent may do now; never empty while the episode runs."""
    step: int
    """Environment steps taken before this view, from 0."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """The parts of the view that forecasts refer to, one word each."""
    sees: tuple[str, ...] = ()
    """The other agents within view now."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one joint action led to."""

    observations: Mapping[str, Observation]
    """The next view of every agent; given at the end too, as the last thing seen."""
    rewards: Mapping[str, float]
    """This step's reward of every agent."""
    done: bool
    """No further step is possible."""
    success: bool | None = None
    """At the end: was the task solved? None where the task has no such notion."""
    truncated: bool = False
    """At the end: stopped by the horizon and not by the task itself."""
