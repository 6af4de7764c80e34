"""What can be said in a task: the closed vocabularies of its actions, messages and forecasts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from preconcert.core.view import View

REWARD_TOLERANCE = 1e-3
"""A word may stand for a reward that it rounds, from less than so far away."""


class Truth(StrEnum):
    """Where the true value of a message slot is known from once the episode is over."""

    NONE = "none"
    """The slot is the speaker's choice; nothing says afterwards what it should have been."""
    OWN_NEXT_ACTION = "own_next_action"
    """The slot announces the speaker's action one step later; hindsight can fill it in."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One word position with a closed set of words."""

    name: str
    """What the word stands for, e.g. `row`."""
    choices: tuple[str, ...]
    """The words allowed here, each without white space."""
    truth: Truth = Truth.NONE
    """For message slots: whether hindsight knows the right word."""
    null: str | None = None
    """The word that says nothing, e.g. `unknown`; None where every word says something."""


@dataclass(frozen=True, slots=True)
class TaskLanguage:
    """The closed vocabularies of one task; the same for every agent and every step."""

    actions: tuple[str, ...]
    """Every action any agent may ever take; `Observation.legal_actions` is a subset of it."""
    message: tuple[Slot, ...] = ()
    """The words of one message, in order. Empty: agents cannot talk."""
    forecast: tuple[Slot, ...] = ()
    """The observation fields an agent foretells, in order; each name is a key of `Observation.fields`."""
    rewards: tuple[str, ...] = ()
    """The rewards of one step as words, e.g. `("0", "1")`; empty: rewards are not foretold."""
    default_action: str = ""
    """The action taken for a turn that cannot be parsed; empty means the first legal one."""
    view: View | None = None
    """What an observation's text consists of; None: words of any kind."""
    words: tuple[str, ...] = ()
    """Every word that an observation's text can contain, for tasks without a view. Empty: not known."""
    views: tuple[tuple[str, View], ...] = ()
    """Where agents see different things: by agent, what its observations consist of. `view` is then None, and a
    world model writes plain words."""

    def reward_word(self, reward: float) -> str | None:
        """The word that stands for a reward: the nearest within `REWARD_TOLERANCE`. None where there is none."""
        nearest = min(self.rewards, key=lambda word: abs(float(word) - reward), default=None)
        return nearest if nearest is not None and abs(float(nearest) - reward) < REWARD_TOLERANCE else None

    def view_of(self, agent: str) -> View | None:
        """What an agent's observations consist of; None: words of any kind."""
        return dict(self.views).get(agent, self.view)
