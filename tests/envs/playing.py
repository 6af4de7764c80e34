"""One episode by players, with messages delivered one step later; the tests' own small loop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from preconcert.core import Env, Message
from preconcert.envs import make_env, tasks

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def play(env: Env, task: str, kind: str, seed: int, talk: bool = True) -> bool:
    """Whether a team of `kind` players solved the instance."""
    players = {agent: tasks()[task].player(kind) for agent in env.agents}
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
        if result.done:
            return bool(result.success)
    raise AssertionError("the episode did not end")


def assert_sayable(env: Env, message: str) -> None:
    """Every word is a choice of its slot."""
    for word, slot in zip(message.split(), env.language.message, strict=True):
        assert word in slot.choices, (word, slot)


def success(task: str, params: Mapping[str, Any], kind: str, split: str, count: int, talk: bool = True) -> float:
    """Share of solved instances over seeds 0, 1, ..."""
    return float(np.mean([play(make_env(task, params, seed, split), task, kind, seed, talk) for seed in range(count)]))
