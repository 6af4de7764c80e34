"""What the built-in tasks share: single use, argument checks, splits by layout, snapshots.

A user's own environment needs none of this; the `Env` protocol of `preconcert.core` is enough.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from preconcert.core import (
    ConfigError,
    EnvError,
    Observation,
    Player,
    StepResult,
    TaskLanguage,
    UnknownNameError,
    nearest,
)
from preconcert.envs.random_player import RandomPlayer

SPLITS: tuple[str, ...] = ("train", "heldout")


class Variety(StrEnum):
    """What distinguishes the instances of a task, and so what a held-out split can mean."""

    LAYOUTS = "layouts"
    """Layouts; no layout of the held-out split is met in training."""
    CHANCE = "chance"
    """Chance moves drawn from the seed. All of them belong to the one game that is learned, so nothing is held out:
    the splits draw from different random streams and share what they draw."""
    NOTHING = "nothing"
    """Nothing: every seed of either split gives the same game, and episodes differ by their players' choices alone."""


PLAYERS: tuple[str, ...] = ("expert", "scripted", "random")
_MAX_DRAWS = 20_000


class TaskParams(BaseModel):
    """Parameters of a task: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


ParamsT = TypeVar("ParamsT", bound=BaseModel)
StateT = TypeVar("StateT")
LayoutT = TypeVar("LayoutT")


class _Phase(StrEnum):
    FRESH = "fresh"
    RUNNING = "running"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class TaskSnapshot:
    """Where an episode stood; frozen all the way down, so it is its own copy."""

    task: str
    layout: str
    phase: str
    step: int
    state: Any


@dataclass(frozen=True, slots=True)
class Outcome(Generic[StateT]):
    """What one joint action does to the mutable part of a task."""

    state: StateT
    rewards: Mapping[str, float]
    done: bool = False
    success: bool | None = None
    truncated: bool = False


class Task(ABC, Generic[ParamsT, StateT]):
    """One instance of a built-in task.

    A subclass draws its layout in `_setup` and is otherwise a function of frozen states, so that everything random
    follows from the seed at construction.
    """

    name: ClassVar[str]
    Params: ClassVar[type[BaseModel]]
    variety: ClassVar[Variety] = Variety.LAYOUTS
    opponents: ClassVar[Mapping[str, Callable[[], Player]]] = MappingProxyType({})
    """Players with a character of their own by name, for `player`: a population to train or to measure against."""

    agents: tuple[str, ...]
    horizon: int
    language: TaskLanguage
    words: tuple[str, ...]
    """Every word that an observation or the state may contain, sorted."""

    def __init__(self, params: ParamsT | Mapping[str, Any], seed: int, split: str = "train") -> None:
        """
        Args:
            params: the task's `Params`, or a mapping of them.
            seed: not negative; everything random follows from it.
            split: `train` or `heldout`; what that keeps apart is the task's `variety`.
        """
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
        if seed < 0:
            raise ConfigError(f"{self.name}: seed = {seed} is negative")
        self.params: ParamsT = parse_params(self.name, self.Params, params)  # type: ignore[assignment]
        self.seed, self.split = seed, split
        self._phase = _Phase.FRESH
        self._step = 0
        # not 0: numpy pads seeds with zeros, and default_rng([seed, 0]) is the stream of default_rng(seed)
        self._state: StateT = self._setup(np.random.default_rng([seed, 1 + SPLITS.index(split)]))

    @abstractmethod
    def _setup(self, rng: np.random.Generator) -> StateT:
        """Set the public attributes, draw the layout, return the first state."""

    @abstractmethod
    def _observe(self, agent: str) -> Observation:
        """The agent's view of the present state."""

    @abstractmethod
    def _advance(self, actions: Mapping[str, str]) -> Outcome[StateT]:
        """What checked actions do. `self._step` is still the number of steps before them."""

    @abstractmethod
    def _legal(self, agent: str) -> tuple[str, ...]:
        """Legal actions of a known agent."""

    @abstractmethod
    def state(self) -> str:
        """The whole truth in words."""

    @abstractmethod
    def board(self) -> list[str]:
        """A small drawing of the global state for people, one string per row."""

    @abstractmethod
    def layout_key(self) -> str:
        """The part of the layout that splits are made by, in words.

        Without layouts, what chance drew; a fixed phrase where it draws nothing.
        """

    @classmethod
    @abstractmethod
    def no_message_ceiling(cls, params: ParamsT) -> float | None:
        """The success probability that no team without messages can exceed.

        None where it is not known exactly, where there are no messages, and where episodes have no success.
        """

    @classmethod
    def player(cls, kind: str) -> Player:
        """A program that plays any one agent.

        Args:
            kind: `expert` (always succeeds; where there is no success, plays well against anyone), `scripted` (an
                imperfect teacher), `random`, or one of the task's `opponents`.
        """
        if kind in PLAYERS:
            return RandomPlayer() if kind == "random" else cls._player(kind)
        if kind not in cls.opponents:
            raise UnknownNameError("player", kind, (*PLAYERS, *cls.opponents))
        return cls.opponents[kind]()

    @classmethod
    @abstractmethod
    def _player(cls, kind: str) -> Player:
        """The `expert` or the `scripted` player."""

    @staticmethod
    def role(observation: Observation) -> str:
        """What tells an agent's part in the game from the others', read from a view: its name, if nothing else does."""
        return observation.agent

    def reset(self) -> Mapping[str, Observation]:
        """The first view of every agent."""
        if self._phase is not _Phase.FRESH:
            raise EnvError(f"{self.name}: reset a second time; an instance is played once, make a new one")
        self._phase = _Phase.RUNNING
        return self._observations()

    def step(self, actions: Mapping[str, str]) -> StepResult:
        """Carry out one legal action per agent."""
        if self._phase is not _Phase.RUNNING:
            why = "before reset" if self._phase is _Phase.FRESH else f"after the end at step {self._step}"
            raise EnvError(f"{self.name}: step {why}")
        self._check(actions)
        outcome = self._advance(actions)
        self._state, self._step = outcome.state, self._step + 1
        if outcome.done:
            self._phase = _Phase.OVER
        return StepResult(
            self._observations(), dict(outcome.rewards), outcome.done, outcome.success, outcome.truncated
        )

    def legal_actions(self, agent: str) -> tuple[str, ...]:
        """What the agent may do now."""
        if agent not in self.agents:
            raise EnvError(f"{self.name}: unknown agent {agent!r}; {nearest(agent, self.agents)}")
        return self._legal(agent)

    def snapshot(self) -> TaskSnapshot:
        """A picklable value from which `restore` continues exactly."""
        return TaskSnapshot(self.name, self.layout_key(), self._phase.value, self._step, self._state)

    def restore(self, snapshot: TaskSnapshot) -> None:
        """Go back to a snapshot of an instance with the same seed, split and parameters."""
        if not isinstance(snapshot, TaskSnapshot):
            raise EnvError(f"{self.name}: cannot restore from a {type(snapshot).__name__}")
        if (snapshot.task, snapshot.layout) != (self.name, self.layout_key()):
            raise EnvError(
                f"{self.name}: snapshot of {snapshot.task} with layout {snapshot.layout!r}, "
                f"but this instance has layout {self.layout_key()!r}"
            )
        self._phase, self._step, self._state = _Phase(snapshot.phase), snapshot.step, snapshot.state

    def _observations(self) -> dict[str, Observation]:
        return {agent: self._observe(agent) for agent in self.agents}

    def _check(self, actions: Mapping[str, str]) -> None:
        """Exactly one legal action per agent."""
        for agent in actions:
            if agent not in self.agents:
                raise EnvError(f"{self.name}: action for unknown agent {agent!r}; {nearest(agent, self.agents)}")
        for agent in self.agents:
            if agent not in actions:
                raise EnvError(f"{self.name}: no action for {agent!r} at step {self._step}")
            action, legal = actions[agent], self._legal(agent)
            if action not in legal:
                raise EnvError(
                    f"{self.name}: illegal action {action!r} of {agent!r} at step {self._step}; "
                    f"{nearest(str(action), legal)}"
                )

    def _search(self, draw: Callable[[], LayoutT | None], key: Callable[[LayoutT], str]) -> LayoutT:
        """Draw until there is a layout of this instance's split.

        Args:
            draw: one try; None where it did not work out.
            key: the words that decide about the split.
        """
        for _ in range(_MAX_DRAWS):
            drawn = draw()
            if drawn is not None and split_of(key(drawn)) == self.split:
                return drawn
        raise ConfigError(f"{self.name}: no {self.split} layout in {_MAX_DRAWS} draws with {self.params!r}")


def split_of(layout_key: str) -> str:
    """The split that a layout belongs to: one in five is held out."""
    digest = hashlib.blake2b(layout_key.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % 5 == 0 else "train"


def parse_params(task: str, model: type[BaseModel], params: BaseModel | Mapping[str, Any]) -> BaseModel:
    """Validate parameters against a task's `Params`.

    Raises:
        ConfigError: one line with the key, the value and what would have been accepted.
    """
    if isinstance(params, model):
        return params
    values = params.model_dump() if isinstance(params, BaseModel) else dict(params)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(key, model.model_fields)
            raise ConfigError(f"{task}: unknown parameter {key!r} = {first['input']!r}; {hint}") from None
        if not key:
            raise ConfigError(f"{task}: parameters {values!r}: {first['msg']}") from None
        raise ConfigError(f"{task}: parameter {key!r} = {first['input']!r}: {first['msg']}") from None
