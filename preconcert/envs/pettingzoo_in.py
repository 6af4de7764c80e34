"""Play a PettingZoo environment as a task of this package: the user says how an observation reads in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from gymnasium import spaces
from pettingzoo.utils.env import ParallelEnv

from preconcert.core import ConfigError, Env, EnvError, Observation, Slot, StepResult, TaskLanguage, nearest

AnyParallelEnv: TypeAlias = ParallelEnv[Any, Any, Any]


class FromPettingZoo:
    """One episode of a `ParallelEnv` with `Discrete` actions, as an `Env`.

    An agent that leaves early keeps its last view, does its first action without effect and is paid 0. Legal actions
    come from an `action_mask` in the observation or in the infos, where there is one.
    """

    def __init__(
        self,
        make: Callable[[], AnyParallelEnv],
        seed: int,
        describe: Callable[[str, Any], str],
        horizon: int,
        actions: Sequence[str] | None = None,
        fields: Callable[[str, Any], Mapping[str, str]] | None = None,
        forecast: tuple[Slot, ...] = (),
        message: tuple[Slot, ...] = (),
        rewards: tuple[str, ...] = (),
        success: Callable[[AnyParallelEnv], bool] | None = None,
    ) -> None:
        """
        Args:
            make: builds the PettingZoo environment.
            seed: given to its `reset`; with it the environment must be deterministic.
            describe: the view in words, from the agent's name and its observation.
            horizon: the episode is cut off after so many steps.
            actions: the actions' names, `a0`, `a1`, ... by default.
            fields: the forecast slots' words, from the agent's name and its observation.
            forecast: what agents foretell; each name is a key of `fields`.
            message: the words of a message.
            rewards: the rewards as words, where they are few.
            success: asked at the end: was it solved?
        """
        env = make()
        self.agents: tuple[str, ...] = tuple(str(agent) for agent in env.possible_agents)
        self.horizon = horizon
        self._names = dict(zip(self.agents, env.possible_agents, strict=True))
        sizes = {agent: _action_count(env, name) for agent, name in self._names.items()}
        words = tuple(actions) if actions is not None else tuple(f"a{number}" for number in range(max(sizes.values())))
        if len(words) != max(sizes.values()):
            raise ConfigError(f"{len(words)} action names {words!r} for {max(sizes.values())} actions")
        self.language = TaskLanguage(words, message, forecast, rewards, words[0])
        self._sizes = sizes
        self._seed, self._describe, self._fields, self._success = seed, describe, fields, success
        self._make, self._env = make, env
        self._seen: dict[str, Any] = {}
        self._infos: dict[str, Any] = {}
        self._done: list[dict[Any, int]] = []
        self._phase = "fresh"

    def reset(self) -> Mapping[str, Observation]:
        """The first view of every agent."""
        if self._phase != "fresh":
            raise EnvError("reset a second time; an instance is played once, make a new one")
        seen, infos = self._env.reset(seed=self._seed)
        unseen = [name for name in self._names.values() if name not in seen]
        if unseen:
            raise EnvError(f"no view of {', '.join(map(repr, unseen))} at reset; all must be there from the start")
        self._take(seen, infos)
        self._phase = "running"
        return self._views()

    def step(self, actions: Mapping[str, str]) -> StepResult:
        """Carry out one legal action per agent."""
        if self._phase != "running":
            when = "before reset" if self._phase == "fresh" else f"after the end at step {len(self._done)}"
            raise EnvError(f"step {when}")
        self._check(actions)
        live = {agent for agent, name in self._names.items() if name in self._env.agents}
        numbers = {self._names[agent]: self.language.actions.index(actions[agent]) for agent in sorted(live)}
        seen, paid, ended, _, infos = self._env.step(numbers)
        self._take(seen, infos)
        self._done.append(numbers)
        done = not self._env.agents or len(self._done) >= self.horizon
        truncated = done and not all(ended.get(self._names[agent], False) for agent in live)
        if done:
            self._phase = "over"
        rewards = {agent: float(paid.get(name, 0.0)) for agent, name in self._names.items()}
        success = self._success(self._env) if done and self._success is not None else None
        return StepResult(self._views(), rewards, done, success, truncated)

    def state(self) -> str:
        """Every agent's view, one after the other."""
        return " ".join(f"{agent} {self._describe(agent, seen)}" for agent, seen in self._seen.items())

    def snapshot(self) -> Any:
        """The phase and the actions so far.

        PettingZoo environments cannot be copied in general: those built on `EzPickle` come back as new.
        """
        return self._phase, tuple(dict(numbers) for numbers in self._done)

    def restore(self, snapshot: Any) -> None:
        """Build the environment anew from the seed and repeat the actions; takes as long as they took."""
        self._phase, done = snapshot
        self._env, self._seen, self._infos = self._make(), {}, {}
        self._done = [dict(numbers) for numbers in done]
        if self._phase != "fresh":
            self._take(*self._env.reset(seed=self._seed))
        for numbers in self._done:
            seen, _, _, _, infos = self._env.step(numbers)
            self._take(seen, infos)

    def legal_actions(self, agent: str) -> tuple[str, ...]:
        """All actions of the agent's own space, less those masked out."""
        if agent not in self.agents:
            raise EnvError(f"unknown agent {agent!r}; {nearest(agent, self.agents)}")
        words = self.language.actions[: self._sizes[agent]]
        if self._names[agent] not in self._env.agents:
            return words[:1]
        seen = self._seen.get(agent)
        mask = seen.get("action_mask") if isinstance(seen, Mapping) else None
        mask = self._infos.get(agent, {}).get("action_mask") if mask is None else mask
        return words if mask is None else tuple(word for word, legal in zip(words, mask, strict=True) if legal)

    def _take(self, seen: Mapping[Any, Any], infos: Mapping[Any, Any]) -> None:
        """Remember the latest view of whoever has one."""
        for agent, name in self._names.items():
            if name in seen:
                self._seen[agent], self._infos[agent] = seen[name], infos.get(name, {})

    def _views(self) -> dict[str, Observation]:
        return {
            agent: Observation(
                agent, self._describe(agent, self._seen[agent]), self.legal_actions(agent), len(self._done),
                self._fields(agent, self._seen[agent]) if self._fields is not None else {},
            )
            for agent in self.agents
        }

    def _check(self, actions: Mapping[str, str]) -> None:
        for agent in actions:
            if agent not in self.agents:
                raise EnvError(f"action for unknown agent {agent!r}; {nearest(agent, self.agents)}")
        for agent in self.agents:
            if agent not in actions:
                raise EnvError(f"no action for {agent!r} at step {len(self._done)}")
            legal = self.legal_actions(agent)
            if actions[agent] not in legal:
                hint = nearest(str(actions[agent]), legal)
                raise EnvError(f"illegal action {actions[agent]!r} of {agent!r} at step {len(self._done)}; {hint}")


def _action_count(env: AnyParallelEnv, agent: Any) -> int:
    space = env.action_space(agent)
    if not isinstance(space, spaces.Discrete) or space.start != 0:
        raise ConfigError(f"action space of {agent!r} is {space}; only Discrete(n) can be named in words")
    return int(space.n)


def from_pettingzoo(
    make: Callable[[], AnyParallelEnv], describe: Callable[[str, Any], str], horizon: int, **options: Any
) -> Callable[[int], Env]:
    """A factory of instances by seed, e.g. for `check_env`. To name the task in a recipe, subclass `FromPettingZoo`.

    Args:
        make: builds the PettingZoo environment.
        describe: the view in words, from the agent's name and its observation.
        horizon: the episode is cut off after so many steps.
        options: the other arguments of `FromPettingZoo`.
    """
    return lambda seed: FromPettingZoo(make, seed, describe, horizon, **options)
