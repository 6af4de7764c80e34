"""One episode by players, with messages delivered one step later; the tests' own small loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preconcert.core import Env, Message
from preconcert.envs import make_env, tasks

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@dataclass(frozen=True)
class Played:
    """How an episode ended."""

    success: bool | None
    returns: Mapping[str, float]


def play(env: Env, task: str, kind: str | Mapping[str, str], seed: int, talk: bool = True) -> Played:
    """One episode by players of a kind, one for all or one by agent."""
    kinds = dict.fromkeys(env.agents, kind) if isinstance(kind, str) else kind
    players = {agent: tasks()[task].player(kinds[agent]) for agent in env.agents}
    returns = dict.fromkeys(env.agents, 0.0)
    rng = np.random.default_rng(seed)
    views = env.reset()
    inbox: dict[str, dict[str, Message]] = {agent: {} for agent in env.agents}
    for step in range(env.horizon):
        decisions = {
            agent: players[agent].decide(env, views[agent], tuple(inbox[agent].values()), rng) for agent in env.agents
        }
        result = env.step({agent: decision.action for agent, decision in decisions.items()})
        for sender, decision in decisions.items():
            others = tuple(agent for agent in env.agents if agent != sender)
            if decision.message is not None and talk:
                assert_sayable(env, decision.message)
                for other in others:
                    inbox[other].pop(sender, None)
                    inbox[other][sender] = Message(sender, others, decision.message, 0.0, 0, step)
        views = result.observations
        returns = {agent: returns[agent] + result.rewards[agent] for agent in env.agents}
        if result.done:
            return Played(result.success, returns)
    raise AssertionError("the episode did not end")


def assert_sayable(env: Env, message: str) -> None:
    """Every word is a choice of its slot."""
    for word, slot in zip(message.split(), env.language.message, strict=True):
        assert word in slot.choices, (word, slot)


def success(task: str, params: Mapping[str, Any], kind: str, split: str, count: int, talk: bool = True) -> float:
    """Share of solved instances over seeds 0, 1, ..."""
    solved = [play(make_env(task, params, seed, split), task, kind, seed, talk).success for seed in range(count)]
    assert None not in solved, f"{task} has no success"
    return float(np.mean([found is True for found in solved]))


def mean_returns(task: str, params: Mapping[str, Any], kinds: Mapping[str, str], count: int) -> dict[str, float]:
    """Mean return of every agent over seeds 0, 1, ..., each agent played by its own kind."""
    played = [play(make_env(task, params, seed), task, kinds, seed).returns for seed in range(count)]
    return {agent: float(np.mean([returns[agent] for returns in played])) for agent in kinds}
