"""PettingZoo both ways."""

import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from mpe2 import simple_spread_v3
from pettingzoo.test import parallel_api_test

from preconcert.core import ConfigError, EnvError
from preconcert.envs import check_env, from_pettingzoo, make_env, tasks, to_pettingzoo
from tests.envs.playing import EXAMPLES


def wrapped(task: str, **options: Any) -> Any:
    return to_pettingzoo(lambda seed: make_env(task, {}, seed), **options)


def spread(**options: Any) -> Any:
    options = {"describe": lambda agent, seen: " ".join(f"{number:.3f}" for number in seen), "horizon": 6, **options}
    return from_pettingzoo(lambda: simple_spread_v3.parallel_env(N=2, max_cycles=5), **options)


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("task", sorted(tasks()))
def test_out_passes_pettingzoos_own_test(task: str, messages: bool) -> None:
    if messages and not make_env(task, {}, 0).language.message:
        with pytest.raises(ConfigError, match="has no message slots, so messages=True is not possible"):
            wrapped(task, messages=True)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_api_test(wrapped(task, messages=messages), num_cycles=40)


def test_out_same_seed_same_episode_and_views_within_their_space() -> None:
    env, again = wrapped("rendezvous"), wrapped("rendezvous")
    for _ in range(3):
        (views, infos), (views_again, _) = (each.reset(seed=7) for each in (env, again))
        for agent in env.agents:
            assert env.observation_space(agent).contains(views[agent])
            np.testing.assert_array_equal(views[agent]["observation"], views_again[agent]["observation"])
            words = {number: word for word, number in env.ids.items()}
            assert " ".join(words[number] for number in views[agent]["observation"]) == infos[agent]["text"]
    assert env.reset()[1] != again.reset(seed=7)[1]
    assert env.state().shape == (2 * env.length,)


def test_out_messages_arrive_one_step_later() -> None:
    env = wrapped("signal", messages=True)
    env.reset(seed=1)
    wait, word = 4, 2
    assert env.action_space("agent_0") == spaces.MultiDiscrete([5, 9])
    views, *_ = env.step({"agent_0": np.array([wait, word]), "agent_1": np.array([wait, 8])})
    assert views["agent_1"]["observation"][-1] == env.ids["green"]
    assert views["agent_0"]["observation"][-1] == env.ids["none"]


@pytest.mark.parametrize("action", [[4, -1], [4, 9], [5, 0], [4], [4, 0, 0]])
def test_out_refuses_what_is_not_in_the_action_space(action: list[int]) -> None:
    env = wrapped("signal", messages=True)
    env.reset(seed=1)
    with pytest.raises(EnvError, match=r"of 'agent_0': expected 2 numbers from 0, below \[5, 9\]"):
        env.step({"agent_0": np.array(action), "agent_1": np.array([4, 8])})


def test_out_ends_with_success_in_the_infos() -> None:
    env = wrapped("rendezvous")
    env.reset(seed=0)
    for _ in range(8):
        _, _, terminated, truncated, infos = env.step(dict.fromkeys(env.possible_agents, 4))
    assert env.agents == []
    assert set(terminated.values()) == {True}
    assert set(truncated.values()) == {False}
    assert infos["agent_0"]["success"] is False
    with pytest.raises(EnvError, match="after the end"):
        env.step(dict.fromkeys(env.possible_agents, 4))


def test_out_needs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    parallel_api_test(to_pettingzoo(lambda seed: make_env("lights_out:LightsOut", {}, seed)), num_cycles=5)
    with pytest.raises(ConfigError, match="has no `words`"):
        to_pettingzoo(spread())
    short = to_pettingzoo(lambda seed: make_env("rendezvous", {}, seed), words=("left", "row"))
    with pytest.raises(EnvError, match="'8' is not among the known words"):
        short.reset(seed=0)


def test_in_keeps_the_protocol() -> None:
    assert check_env(spread())
    env = spread(actions=("stay", "west", "east", "south", "north"))(3)
    assert env.language.actions[0] == "stay"
    assert spread()(3).language.actions == ("a0", "a1", "a2", "a3", "a4")


def test_in_plays_what_pettingzoo_plays() -> None:
    env, original = spread()(3), simple_spread_v3.parallel_env(N=2, max_cycles=5)
    views, (seen, _) = env.reset(), original.reset(seed=3)
    for number in (1, 3, 0, 4, 2):
        assert views["agent_1"].text == " ".join(f"{part:.3f}" for part in seen["agent_1"])
        result = env.step(dict.fromkeys(env.agents, f"a{number}"))
        seen, rewards, *_ = original.step(dict.fromkeys(original.agents, number))
        assert result.rewards == rewards
        views = result.observations
    assert (result.done, result.truncated) == (True, True)


def test_in_refuses_what_has_no_names() -> None:
    with pytest.raises(ConfigError, match=r"2 action names .* for 5 actions"):
        spread(actions=("go", "stay"))(0)
    with pytest.raises(ConfigError, match="only Discrete"):
        from_pettingzoo(lambda: simple_spread_v3.parallel_env(continuous_actions=True), lambda agent, seen: "x", 5)(0)
    env = spread()(0)
    with pytest.raises(EnvError, match="before reset"):
        env.step({})
    env.reset()
    with pytest.raises(EnvError, match="illegal action 'a9' of 'agent_0'"):
        env.step({"agent_0": "a9", "agent_1": "a0"})


def test_in_refuses_agents_who_are_not_there_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    env = spread()(0)
    reset = env._env.reset
    monkeypatch.setattr(env._env, "reset", lambda seed: ({"agent_0": reset(seed=seed)[0]["agent_0"]}, {}))
    with pytest.raises(EnvError, match="no view of 'agent_1' at reset"):
        env.reset()
