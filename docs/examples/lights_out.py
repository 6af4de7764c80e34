"""A task of your own, from nothing but the `Env` protocol: `task: lights_out:LightsOut`.

Two agents sit in two rooms with three lamps each. Each sees the lamps of the other's room and has the switches of its
own. Both rooms must be dark at the end, so each has to tell the other which switch to press.

Test it from this folder:
python -c "from preconcert.envs import *; print(check_env(lambda seed: make_env('lights_out:LightsOut', {}, seed)))"
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from preconcert.core import EnvError, Observation, Slot, StepResult, TaskLanguage

LAMPS = ("1", "2", "3")


class LightsOut:
    """One instance: built with parameters, a seed and a split, played once."""

    agents = ("agent_0", "agent_1")
    language = TaskLanguage(
        actions=("press1", "press2", "press3", "wait"),
        message=(Slot("lamp", (*LAMPS, "none")),),
        forecast=(Slot("mate", (*LAMPS, "dark", "many")),),
        rewards=("0", "1"),
        default_action="wait",
    )
    words = ("left", "mate", "dark", "many", *map(str, range(10)))

    def __init__(self, params: Mapping[str, Any], seed: int, split: str = "train") -> None:
        self.horizon = int(params.get("horizon", 3))
        rng = np.random.default_rng([seed, split == "heldout"])
        self.lit: dict[str, frozenset[str]] = {agent: frozenset([str(rng.choice(LAMPS))]) for agent in self.agents}
        self.steps = 0

    def reset(self) -> Mapping[str, Observation]:
        return {agent: self._view(agent) for agent in self.agents}

    def step(self, actions: Mapping[str, str]) -> StepResult:
        if self.steps >= self.horizon:
            raise EnvError(f"step after the end at step {self.steps}")
        if set(actions) != set(self.agents) or not set(actions.values()) <= set(self.language.actions):
            raise EnvError(f"one legal action per agent is needed, not {dict(actions)!r}")
        for agent, action in actions.items():
            self.lit[agent] = self.lit[agent] ^ (frozenset() if action == "wait" else {action[-1]})
        self.steps += 1
        done = self.steps == self.horizon
        success = done and not any(self.lit.values())
        return StepResult(self.reset(), dict.fromkeys(self.agents, float(success)), done, success if done else None)

    def _view(self, agent: str) -> Observation:
        lit = self.lit[self.agents[1 - self.agents.index(agent)]]
        mate = "dark" if not lit else next(iter(lit)) if len(lit) == 1 else "many"
        text = f"left {self.horizon - self.steps} mate {mate}"
        return Observation(agent, text, self.language.actions, self.steps, {"mate": mate})

    def state(self) -> str:
        return " ".join(f"{agent} {' '.join(sorted(self.lit[agent])) or 'dark'}" for agent in self.agents)

    def snapshot(self) -> tuple[dict[str, frozenset[str]], int]:
        return dict(self.lit), self.steps

    def restore(self, snapshot: tuple[dict[str, frozenset[str]], int]) -> None:
        self.lit, self.steps = dict(snapshot[0]), snapshot[1]

    def legal_actions(self, agent: str) -> tuple[str, ...]:
        return self.language.actions
