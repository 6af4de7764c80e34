"""The sizes in which episodes last thirty steps and more: drawn quickly, solvable, imperfectly taught."""

import time
from typing import Any

import pytest

from preconcert.envs import make_env
from tests.envs.playing import success

LONG: list[tuple[str, dict[str, Any]]] = [
    ("rendezvous", {"size": 9, "horizon": 32}),
    ("box-push", {"size": 8, "horizon": 40, "push": 3}),
    ("pursuit", {"size": 9, "horizon": 32, "evaders": 2}),
]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("task", "params"), LONG)
def test_long_episodes_are_drawn_quickly_and_can_be_won(task: str, params: dict[str, Any], split: str) -> None:
    started = time.process_time()
    layouts = {make_env(task, params, seed, split).layout_key() for seed in range(25)}  # type: ignore[attr-defined]
    assert time.process_time() - started < 25 * 0.06
    assert len(layouts) == 25
    assert success(task, params, "expert", split, 25) == 1.0


@pytest.mark.parametrize(("task", "params"), LONG)
def test_long_episodes_are_taught_but_not_given_away(task: str, params: dict[str, Any]) -> None:
    assert 0.2 <= success(task, params, "scripted", "heldout", 60) <= 0.97
    assert success(task, params, "random", "heldout", 30) <= 0.1


@pytest.mark.parametrize(("task", "params"), LONG)
def test_nothing_but_success_ends_a_long_episode_early(task: str, params: dict[str, Any]) -> None:
    env = make_env(task, params, 0)
    env.reset()
    steps = 1
    while not env.step(dict.fromkeys(env.agents, "stay")).done:
        steps += 1
    assert steps == env.horizon >= 30
