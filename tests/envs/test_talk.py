"""Rounds of talk: the world stands still, everything else is as it was, and the environment keeps the protocol."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from preconcert.core import ConfigError, EnvError
from preconcert.envs import (
    LISTEN,
    TALK_ROUNDS,
    TalkRounds,
    check_env,
    make_env,
    rounds_of,
    talking,
    tasks,
    with_rounds,
    without_rounds,
)

TALKING = [name for name in tasks() if make_env(name, {}, 0).language.message]


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("task", TALKING)
def test_rounds_of_talk_keep_the_protocol(task: str, rounds: int) -> None:
    check_env(lambda seed: make_env(task, {TALK_ROUNDS: rounds}, seed))


@pytest.mark.parametrize("task", TALKING)
def test_the_world_is_the_same_but_for_the_rounds(task: str) -> None:
    rounds, rng = 3, np.random.default_rng(0)
    plain, talks = make_env(task, {}, 5), make_env(task, {TALK_ROUNDS: rounds}, 5)
    assert isinstance(talks, TalkRounds)
    assert (talks.agents, talks.horizon) == (plain.agents, rounds * plain.horizon)
    assert talks.language.message == plain.language.message
    assert talks.language.actions == (*plain.language.actions, LISTEN)
    views, shown = plain.reset(), talks.reset()
    done = False
    while not done:
        for left in range(rounds - 1, -1, -1):
            assert talks.state() == f"talk {left} {plain.state()}"
            for agent, view in shown.items():
                legal = (LISTEN,) if left else views[agent].legal_actions
                assert talking(view) == bool(left)
                assert view.legal_actions == talks.legal_actions(agent) == legal
                assert view.text == f"talk {left} {views[agent].text}"
                assert view.fields == {**views[agent].fields, "talk": str(left)}
                assert view.step == rounds * views[agent].step + rounds - 1 - left
            if left:
                result = talks.step(dict.fromkeys(talks.agents, LISTEN))
                assert not result.done
                assert set(result.rewards.values()) == {0.0}
                shown = result.observations
        actions = {agent: str(rng.choice(view.legal_actions)) for agent, view in views.items()}
        one, other = plain.step(actions), talks.step(actions)
        assert (one.rewards, one.done, one.success) == (other.rewards, other.done, other.success)
        assert one.truncated == other.truncated
        views, shown, done = one.observations, other.observations, one.done
    with pytest.raises(EnvError, match="after the end"):
        talks.step(dict.fromkeys(talks.agents, LISTEN))


def test_what_is_not_allowed() -> None:
    env = make_env("rendezvous", {TALK_ROUNDS: 2}, 0)
    with pytest.raises(EnvError, match="before reset"):
        env.step(dict.fromkeys(env.agents, LISTEN))
    env.reset()
    with pytest.raises(EnvError, match="illegal action 'stay' of 'agent_0' in a round of talk; known: listen"):
        env.step({"agent_0": "stay", "agent_1": LISTEN})
    with pytest.raises(EnvError, match="no action for 'agent_1'"):
        env.step({"agent_0": LISTEN})
    with pytest.raises(EnvError, match="cannot restore from a str"):
        env.restore("step 3")
    with pytest.raises(ConfigError, match="Kuhn has no messages, so there is nothing to say in 2 rounds"):
        make_env("kuhn", {TALK_ROUNDS: 2}, 0)
    for wrong in (0, -1, 1.5, True, "2", 17, 10**9):
        with pytest.raises(ConfigError, match="talk_rounds"):
            make_env("rendezvous", {TALK_ROUNDS: wrong}, 0)


def test_what_else_an_environment_offers_is_there() -> None:
    plain, talks = make_env("rendezvous", {}, 3), make_env("rendezvous", {TALK_ROUNDS: 2}, 3)
    for env in (plain, talks):
        env.reset()
    assert isinstance(talks, TalkRounds)
    assert talks.board() == plain.board()  # type: ignore[attr-defined]  # both draw
    assert talks.positions() == plain.positions()  # type: ignore[attr-defined]  # both are grids
    assert set(talks.words) == {*plain.words, "talk", "0", "1"}  # type: ignore[attr-defined]  # built in
    view = replace(talks.inner_view("agent_0"), text="talk 1 anything")
    assert talks.role(view) == "agent_0"
    assert not hasattr(talks, "no_such_thing")
    again = copy.deepcopy(talks)
    again.step(dict.fromkeys(talks.agents, LISTEN))
    assert (again.state()[:6], talks.state()[:6]) == ("talk 0", "talk 1")


def test_players_say_what_they_will_do_and_listen() -> None:
    env = make_env("rendezvous", {TALK_ROUNDS: 2}, 3)
    views = env.reset()
    player = env.player("expert")  # type: ignore[attr-defined]  # built in
    informed = next(agent for agent, view in views.items() if "open unknown" not in view.text)
    first = player.decide(env, views[informed], (), np.random.default_rng(0))
    assert first.action == LISTEN
    views = env.step(dict.fromkeys(env.agents, LISTEN)).observations
    second = player.decide(env, views[informed], (), np.random.default_rng(0))
    assert first.message is not None
    assert first.message.split()[1] == second.action, "what comes next is what was announced"
    assert second.action in env.legal_actions(informed)


def test_rounds_in_parameters() -> None:
    assert with_rounds({"size": 4}, 3) == {"size": 4, TALK_ROUNDS: 3}
    assert with_rounds({"size": 4, TALK_ROUNDS: 3}, 1) == without_rounds({"size": 4, TALK_ROUNDS: 2}) == {"size": 4}
    assert [rounds_of({}), rounds_of({TALK_ROUNDS: 4})] == [1, 4]
