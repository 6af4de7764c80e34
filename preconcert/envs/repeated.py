"""What repeated games share: simultaneous actions round after round, a window on the past, nothing drawn by chance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic

import numpy as np

from preconcert.core import ConfigError
from preconcert.envs.task import Outcome, ParamsT, Task, Variety

Rounds = tuple[tuple[str, ...], ...]
"""The joint action of every round played, each in the order of the agents."""
NONE = "none"
"""Stands for the action of a round that was not played."""


class RepeatedGame(Task[ParamsT, Rounds], Generic[ParamsT]):
    """Everyone acts at once, is paid by the joint action, and may see what was done before.

    A subclass sets `agents`, `horizon` (the rounds), `language` and `words` in `_setup`, which returns ().
    """

    variety = Variety.NOTHING

    @abstractmethod
    def _setup(self, rng: np.random.Generator) -> Rounds:
        """Set the public attributes; no round is played yet."""

    @abstractmethod
    def _pay(self, actions: tuple[str, ...]) -> Sequence[float]:
        """What a joint action pays, in the order of the agents."""

    def played(self, agent: str) -> tuple[str, ...]:
        """An agent's actions so far, oldest first."""
        index = self.agents.index(agent)
        return tuple(actions[index] for actions in self._state)

    def recent(self, agent: str, rounds: int) -> tuple[str, ...]:
        """An agent's last actions, oldest first, `none` in front for rounds that were not played."""
        padded = (NONE,) * rounds + self.played(agent)
        return padded[len(padded) - rounds :]

    def others(self, agent: str) -> tuple[str, ...]:
        """Everyone else, in order."""
        return tuple(other for other in self.agents if other != agent)

    def _advance(self, actions: Mapping[str, str]) -> Outcome[Rounds]:
        joint = tuple(actions[agent] for agent in self.agents)
        state = (*self._state, joint)
        rewards = dict(zip(self.agents, map(float, self._pay(joint)), strict=True))
        done = len(state) == self.horizon
        return Outcome(state, rewards, done, self._success(state) if done else None)

    def _success(self, rounds: Rounds) -> bool | None:
        """The success of a finished episode; None: paid for themselves, the agents have none in common."""
        return None

    def state(self) -> str:
        """The round and everyone's actions so far."""
        return " ".join((f"round {self._step}", *(" ".join((each, *self.played(each))) for each in self.agents)))

    def board(self) -> list[str]:
        """One row per agent: its actions, oldest first."""
        width = max(map(len, self.language.actions))
        return [f"{each}  {' '.join(action.ljust(width) for action in self.played(each))}".rstrip()
                for each in self.agents]

    def layout_key(self) -> str:
        """There is no layout."""
        return "always the same game"


def reward_words(task: str, payoffs: Iterable[float]) -> tuple[str, ...]:
    """Payoffs as the reward words of a language, from the lowest to the highest.

    Args:
        task: named in errors.
        payoffs: finite numbers; equal ones share a word.

    Raises:
        ConfigError: two different payoffs are too close for words to tell them apart.
    """
    values = sorted({float(payoff) + 0.0 for payoff in payoffs})
    for low, high in zip(values, values[1:], strict=False):
        if high - low < _APART:
            raise ConfigError(f"{task}: payoffs {low} and {high} are closer than {_APART}, too close for two words")
    return tuple(f"{value:.12g}" for value in values)


_APART = 0.002
"""A reward belongs to a word within half of this."""
