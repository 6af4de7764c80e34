"""Play a task of this package from PettingZoo: word ids as observations, numbered actions, masks for legality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from pettingzoo.utils.env import ParallelEnv

from preconcert.core import ConfigError, Env, EnvError, Observation

Action = int | NDArray[np.int64]


class PettingZooTask(ParallelEnv[str, dict[str, Any], Action]):  # type: ignore[misc,unused-ignore] # untyped library
    """A `ParallelEnv` whose every reset makes a new instance of the task.

    An observation is a dict: `observation` holds the ids of the text's words (0 pads), `action_mask` what is legal;
    `infos` carry the `text`, the `action_mask`, and at the end `success`. With `messages` an action is an array: the
    action and one choice per message slot. What the others said last then follows the text's ids, agent by agent, 0
    before the first message, so that a numeric learner knows exactly what a reader of the texts knows.
    """

    metadata: dict[str, Any] = {"name": "preconcert", "render_modes": []}  # noqa: RUF012 - PettingZoo's attribute

    def __init__(
        self, make: Callable[[int], Env], messages: bool = False, words: Iterable[str] | None = None,
        length: int | None = None,
    ) -> None:
        """
        Args:
            make: builds an instance from a seed.
            messages: can the agents talk?
            words: every word an observation may contain; the instance's own `words` where it has them.
            length: words per observation; the longest first view where it is not given.
        """
        probe = make(0)
        known = words if words is not None else getattr(probe, "words", None)
        if known is None:
            raise ConfigError(f"{type(probe).__name__} has no `words`; pass words= with every word of its observations")
        if messages and not probe.language.message:
            raise ConfigError(f"{type(probe).__name__} has no message slots, so messages=True is not possible")
        self._make = make
        self._language = probe.language
        self._slots = probe.language.message if messages else ()
        vocabulary = {*known, *(word for slot in self._slots for word in slot.choices)}
        self.ids: Mapping[str, int] = {word: number for number, word in enumerate(sorted(vocabulary), start=1)}
        """The id of every word; 0 is padding."""
        self.length = length or max(len(view.text.split()) for view in probe.reset().values())
        """Words per text."""
        self.possible_agents = list(probe.agents)
        self.agents: list[str] = []
        total = self.length + (len(self.possible_agents) - 1) * len(self._slots)
        self._observation_spaces = {agent: self._view_space(total) for agent in self.possible_agents}
        self._action_spaces = {agent: self._choice_space() for agent in self.possible_agents}
        self._seeds = np.random.default_rng(0)
        self._env: Env | None = None
        self._views: Mapping[str, Observation] = {}
        self._said: dict[str, tuple[str, ...]] = {}

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """The same object at every call."""
        return self._observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """The same object at every call."""
        return self._action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Start the instance `make(seed)`; without a seed, the next of the sequence that the last seed began."""
        if seed is not None:
            self._seeds = np.random.default_rng(seed)
        self._env = self._make(int(self._seeds.integers(2**31)) if seed is None else seed)
        self.agents = list(self.possible_agents)
        self._said = {}
        self._views = views = self._env.reset()
        return self._encode(views), {agent: self._info(view) for agent, view in views.items()}

    def step(self, actions: dict[str, Action]) -> tuple[
        dict[str, dict[str, Any]], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]
    ]:
        """Carry out one action per agent."""
        if self._env is None:
            raise EnvError("step before reset")
        chosen = {agent: self._parts(agent, action) for agent, action in actions.items()}
        result = self._env.step({agent: self._language.actions[parts[0]] for agent, parts in chosen.items()})
        self._said = {
            agent: tuple(slot.choices[part] for slot, part in zip(self._slots, parts[1:], strict=True))
            for agent, parts in chosen.items()
        }
        self._views = result.observations
        infos = {agent: self._info(view) for agent, view in self._views.items()}
        if result.done:
            self.agents = []
            for info in infos.values():
                info["success"] = result.success
        ended = dict.fromkeys(self.possible_agents, result.done and not result.truncated)
        cut = dict.fromkeys(self.possible_agents, result.truncated)
        rewards = {agent: float(reward) for agent, reward in result.rewards.items()}
        return self._encode(self._views), rewards, ended, cut, infos

    def _parts(self, agent: str, action: Action) -> list[int]:
        """An action's number, and those of a message's words.

        Raises:
            EnvError: it is not in the agent's action space.
        """
        parts = [int(part) for part in np.atleast_1d(action)]
        sizes = [len(self._language.actions), *(len(slot.choices) for slot in self._slots)]
        if len(parts) != len(sizes) or not all(0 <= part < size for part, size in zip(parts, sizes, strict=True)):
            raise EnvError(f"action {parts} of {agent!r}: expected {len(sizes)} numbers from 0, below {sizes}")
        return parts

    def state(self) -> NDArray[np.int64]:
        """The word ids of what every agent was given, one agent after the other."""
        if self._env is None:
            raise EnvError("state before reset")
        return np.concatenate([self._word_ids(view) for view in self._views.values()])

    def _view_space(self, total: int) -> spaces.Dict:
        masks: spaces.Space[Any] = spaces.MultiBinary(len(self._language.actions))
        if self._slots:
            masks = spaces.Tuple([masks, *(spaces.MultiBinary(len(slot.choices)) for slot in self._slots)])
        return spaces.Dict({"observation": spaces.MultiDiscrete([len(self.ids) + 1] * total), "action_mask": masks})

    def _choice_space(self) -> spaces.Space[Any]:
        actions = len(self._language.actions)
        if not self._slots:
            return spaces.Discrete(actions)
        return spaces.MultiDiscrete([actions, *(len(slot.choices) for slot in self._slots)])

    def _encode(self, views: Mapping[str, Observation]) -> dict[str, dict[str, Any]]:
        return {
            agent: {"observation": self._word_ids(view), "action_mask": self._mask(view)}
            for agent, view in views.items()
        }

    def _word_ids(self, view: Observation) -> NDArray[np.int64]:
        words = view.text.split()
        if len(words) > self.length:
            raise EnvError(f"view of {view.agent!r} has {len(words)} words, but length = {self.length}")
        unknown = next((word for word in words if word not in self.ids), None)
        if unknown is not None:
            raise EnvError(f"view of {view.agent!r} at step {view.step}: {unknown!r} is not among the known words")
        row = [self.ids[word] for word in words] + [0] * (self.length - len(words))
        for other in self.possible_agents:
            if other != view.agent:
                row += [self.ids[word] for word in self._said.get(other, ())] or [0] * len(self._slots)
        return np.array(row, dtype=np.int64)

    def _mask(self, view: Observation) -> Any:
        legal = np.array([action in view.legal_actions for action in self._language.actions], dtype=np.int8)
        if not self._slots:
            return legal
        return (legal, *(np.ones(len(slot.choices), dtype=np.int8) for slot in self._slots))

    def _info(self, view: Observation) -> dict[str, Any]:
        return {"text": view.text, "action_mask": self._mask(view)}


def to_pettingzoo(
    make: Callable[[int], Env], messages: bool = False, words: Iterable[str] | None = None, length: int | None = None
) -> PettingZooTask:
    """A task as a PettingZoo `ParallelEnv`.

    Args:
        make: builds an instance from a seed, e.g. `lambda seed: make_env("signal", {}, seed)`.
        messages: can the agents talk? An action is then an array, the action and one choice per message slot.
        words: every word an observation may contain; needed where instances have no `words`.
        length: words per observation; the longest first view where it is not given.
    """
    return PettingZooTask(make, messages, words, length)
