"""Imagination: what a world model is asked, what it answers, how it is judged, and what a planner weighs.

A world model belongs to the floor of one agent: it sees what that agent has seen and imagines what it will see.
`WorldModel` steps a batch of such imaginations at once; whoever calls it decides what is done in each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from preconcert.core.candidate import Move
from preconcert.core.message import Message
from preconcert.core.observation import Observation
from preconcert.core.protocols import TurnRequest
from preconcert.core.turn import Turn


@dataclass(frozen=True, slots=True)
class ImaginedStep:
    """What a world model says one move leads to."""

    observation: Observation | None
    """The next view, its `fields` and `legal_actions` filled like a real one's; None where it is malformed."""
    inbox: tuple[Message, ...]
    """The agent's inbox then."""
    others: Mapping[str, str]
    """What the other agents do in this step, given or imagined."""
    reward: float
    """What this step pays the agent."""
    done: bool
    """Is the episode over?"""
    value: float | None
    """Expected sum of the rewards after this step; 0 at the end, None where the model has no idea of values."""
    belief: Any
    """Where to go on from; opaque, and never changed by going on."""
    malformed: bool = False
    """The model wrote something that is no step; the imagination ends here."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What really happened in one step, for a model to be judged by."""

    observation: Observation
    others: Mapping[str, str]
    """What each other agent did."""
    reward: float
    done: bool


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a model thought of an outcome before it happened: probabilities, teacher-forced."""

    view_nll: float
    """Negative log-probability in nats of the whole next view, given the move and the others' real actions."""
    reward_probability: float
    """Given to the real reward."""
    done_probability: float
    """That the episode is over after this step."""
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By other agent the probability of every action, before anything about the outcome is known."""


@runtime_checkable
class WorldModel(Protocol):
    """Imagines, batch-wise and step by step, what one agent will see.

    The answers to a batch do not depend on what else is in it.
    """

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        """Beliefs about the present moments.

        Args:
            requests: the moments: observation and inbox of one agent each.
            pasts: the same agents' earlier turns in their episodes, oldest first.
        """
        ...

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        """One imagined step each.

        Args:
            beliefs: from `begin` or from `ImaginedStep.belief`; the same one may appear many times.
            moves: what is done.
            seeds: everything random follows from them.
        """
        ...

    def judge(
        self, beliefs: Sequence[Any], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        """What the model would have thought of real outcomes; None where it has no probabilities to give."""
        ...

    def finish(self, episode: str) -> None:
        """The episode is over: what is held for it can be let go."""
        ...


@runtime_checkable
class Planner(Protocol):
    """Chooses by search in a world model."""

    def plan(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn per request, in order; `Turn.candidates` holds what was weighed."""
        ...
