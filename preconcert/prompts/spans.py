"""Which parts a turn has, and what is written in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field


class SpanSettings(BaseModel):
    """The parts of a turn. `act` is always there; the order is fixed: intend, foresee, say, act."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intend: bool = True
    """Write what every other agent is about to do."""
    intend_steps: int = Field(1, ge=1, le=8)
    """How many of its actions are foretold."""
    foresee: bool = True
    """Write the next observation's fields, the reward and whether the episode ends."""
    say: bool = True
    """Write a message."""


END_OF_PLAY = "over"
"""Stands for the actions after the episode's end in intentions longer than the rest of it."""


@dataclass(frozen=True, slots=True)
class TurnContent:
    """The words of one turn, before they are tokens or after they were parsed."""

    action: str
    intentions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Foretold actions by the other agent's name."""
    forecast: tuple[str, ...] = ()
    """One word per forecast slot."""
    reward: str | None = None
    done: str | None = None
    """`yes` or `no`."""
    message: tuple[str, ...] = ()
    """One word per message slot, in order; fewer where the message ends before."""
