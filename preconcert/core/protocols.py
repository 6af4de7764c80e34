"""What users write: the protocols every other floor is built on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from preconcert.core.language import TaskLanguage
from preconcert.core.message import Message
from preconcert.core.observation import Observation, StepResult
from preconcert.core.turn import Decision, Turn


@runtime_checkable
class Env(Protocol):
    """One instance of a task: built with a seed, played once, thrown away."""

    agents: tuple[str, ...]
    """Names of the agents, fixed for the episode."""
    horizon: int
    """The episode is over after this many steps at the latest."""
    language: TaskLanguage

    def reset(self) -> Mapping[str, Observation]:
        """The first view of every agent. Called once, before the first step."""
        ...

    def step(self, actions: Mapping[str, str]) -> StepResult:
        """Carry out one legal action per agent.

        Raises:
            EnvError: an agent is missing or unknown, an action is not legal, or the episode is over.
        """
        ...

    def state(self) -> str:
        """The whole truth in words, for critics and for people; never shown to an agent."""
        ...

    def snapshot(self) -> Any:
        """A picklable value from which `restore` continues exactly; later steps do not change it."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Go back to a snapshot taken from an instance with the same seed and parameters."""
        ...

    def legal_actions(self, agent: str) -> tuple[str, ...]:
        """What the agent may do now."""
        ...


class Located(Protocol):
    """An environment whose agents are somewhere; only then can messages go to the nearest."""

    def positions(self) -> Mapping[str, tuple[int, ...]]:
        """Where every agent is now, e.g. (row, column)."""
        ...


@runtime_checkable
class Player(Protocol):
    """A program that plays one agent of one task."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Choose an action and words. Only an expert may look into `env`."""
        ...


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """Everything one agent's decision may depend on."""

    episode: str
    """Unique name of the running episode."""
    agent: str
    observation: Observation
    inbox: tuple[Message, ...]
    """Last message received from each other agent, oldest first."""
    others: tuple[str, ...]
    """The other agents of the episode, in its order."""
    language: TaskLanguage
    seed: int
    """Everything random in the decision follows from it."""
    env: Env
    """The running instance, for scripted players and oracles; a learned policy does not look at it."""
    player: str | None = None
    """Who decides, where the episode's cast says so: the name of an adapter. None leaves it to the policy."""
    partners: str | None = None
    """What kind of players the others are, where that is known and not the policy's own team: a word that the world
    model has learned (`TokenBelief.partners`)."""


@runtime_checkable
class Policy(Protocol):
    """Decides for any number of agents and episodes at once."""

    version: int
    """Number of updates behind it; -1 where nothing is learned."""

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn per request, in order; `Turn.reward` is still 0."""
        ...

    def finish(self, episode: str) -> None:
        """The episode is over: what is held for it can be let go."""
        ...


class Codec(Protocol):
    """Turns what an agent has to say into what is sent, and back."""

    def encode(self, turn: Turn) -> Message | None:
        """The message of a finished turn; None for silence."""
        ...

    def decode(self, message: Message) -> str:
        """The words that the receiver reads."""
        ...
