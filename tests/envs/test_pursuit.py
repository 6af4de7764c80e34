"""Pursuit: what its evaders do, what a step is, and that foresight and messages are worth something."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from preconcert.core import ConfigError
from preconcert.envs import make_env
from preconcert.envs.evaders import RULES, Evader, Surroundings, begin, evade, path
from preconcert.envs.grid import Cell, cells
from preconcert.envs.pursuit_players import PursuitExpert
from tests.envs.playing import success


def around(size: int = 5, walls: frozenset[Cell] = frozenset(), agents: tuple[Cell, ...] = (), *did: str) -> Any:
    return Surroundings(size, walls, agents, did or ("stay",) * len(agents))


def moves(evader: Evader, count: int, scene: Surroundings) -> list[str]:
    made = []
    for _ in range(count):
        evader = evade(evader, scene)
        made.append(evader.went[0])
    return made


def test_patrol_turns_back_at_edges_and_walls() -> None:
    assert path(Evader("patrol", (2, 1), ("east",)), around(), 6) == [
        (2, 1), (2, 2), (2, 3), (2, 4), (2, 3), (2, 2), (2, 1),
    ]  # fmt: skip
    assert path(Evader("patrol", (2, 1), ("east",)), around(walls=frozenset({(2, 3)})), 3)[1:] == [
        (2, 2), (2, 1), (2, 0),
    ]  # fmt: skip
    walled = frozenset({(0, 1), (1, 0)})
    assert moves(Evader("patrol", (0, 0), ("south",)), 2, around(walls=walled)) == ["stay", "stay"]


@pytest.mark.parametrize(("rule", "turn"), [("clockwise", 1), ("counter", -1)])
@pytest.mark.parametrize("size", [4, 5, 7])
def test_orbits_go_round_the_middle_and_come_back(rule: str, turn: int, size: int) -> None:
    for start in cells(size):
        low = min(*start, size - 1 - start[0], size - 1 - start[1])
        side = size - 1 - 2 * low
        way = path(Evader(rule, start, (rule,)), around(size), max(1, 4 * side))
        assert way[-1] == start
        assert len(set(way)) == max(1, 4 * side)
        centre = (size - 1) / 2
        area = sum(
            (one[1] - centre) * (two[0] - centre) - (two[1] - centre) * (one[0] - centre)
            for one, two in zip(way, way[1:], strict=False)
        )
        assert np.sign(area) == (turn if side else 0)


def test_an_orbit_turns_round_where_it_is_shut() -> None:
    way = path(Evader("clockwise", (0, 1), ("clockwise",)), around(walls=frozenset({(0, 3)})), 4)
    assert way == [(0, 1), (0, 2), (0, 1), (0, 0), (1, 0)]


def test_stairs_alternate_and_are_thrown_back() -> None:
    assert moves(Evader("stairs", (2, 2), ("north", "east")), 6, around()) == [
        "north", "east", "north", "east", "south", "west",
    ]  # fmt: skip


def test_pause_rests_and_square_turns() -> None:
    assert moves(Evader("pause", (0, 0), ("east", "0")), 6, around()) == [
        "east", "east", "stay", "east", "east", "stay",
    ]  # fmt: skip
    assert moves(Evader("square", (2, 2), ("east", "0")), 6, around()) == [
        "east", "east", "south", "south", "west", "west",
    ]  # fmt: skip
    assert moves(Evader("square", (0, 4), ("north", "0")), 2, around()) == ["south", "south"]


def test_flee_runs_from_the_nearest_and_only_when_it_is_near() -> None:
    assert moves(Evader("flee", (2, 2)), 1, around(agents=((2, 0), (4, 4)))) == ["north"]
    assert moves(Evader("flee", (2, 2)), 1, around(agents=((2, 1), (1, 2)))) == ["north"]
    assert moves(Evader("flee", (2, 2)), 1, around(agents=((1, 2), (2, 1)))) == ["south"]
    assert moves(Evader("flee", (0, 0)), 1, around(agents=((4, 4),))) == ["stay"]
    assert moves(Evader("flee", (0, 0)), 1, around(agents=((1, 1),))) == ["stay"]


def test_mirror_does_what_the_nearest_did() -> None:
    assert moves(Evader("mirror", (2, 2)), 1, around(5, frozenset(), ((2, 4), (2, 1)), "north", "west")) == ["west"]
    assert moves(Evader("mirror", (2, 0)), 1, around(5, frozenset(), ((2, 4),), "west")) == ["stay"]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_evaders_stay_on_the_board_and_show_their_last_moves(rule: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        grid = cells(6)
        walls = frozenset(grid[index] for index in rng.choice(36, size=8, replace=False))
        free = [cell for cell in grid if cell not in walls]
        evader = begin(rule, free[rng.integers(len(free))], 6, walls, rng)
        for _ in range(12):
            agents = tuple(free[index] for index in rng.integers(len(free), size=2))
            did = tuple(str(word) for word in rng.choice(["north", "south", "east", "west", "stay"], size=2))
            after = evade(evader, Surroundings(6, walls, agents, did))
            assert after.cell in free
            assert after.went[1] == evader.went[0]
            assert (after.went[0] == "stay") == (after.cell == evader.cell)
            evader = after
    assert evade(replace(evader, caught=True), around(6)).cell == evader.cell


def staged(agents: tuple[Cell, ...], evader: Evader, **params: Any) -> Any:
    """An instance in which everything stands where the test wants it."""
    env = make_env("pursuit", {"size": 7, "agents": len(agents), **params}, 0)
    env.reset()
    snapshot = env.snapshot()
    rested = ("stay",) * len(agents)
    state = replace(snapshot.state, agents=agents, evaders=(evader, *snapshot.state.evaders[1:]), did=rested)
    env.restore(replace(snapshot, state=state))
    return env


def test_two_hands_at_once_catch_and_everyone_is_paid() -> None:
    runner = Evader("patrol", (3, 3), ("east",), ("east", "east"))
    env = staged(((3, 6), (2, 4), (0, 0)), runner)
    result = env.step({"agent_0": "west", "agent_1": "stay", "agent_2": "stay"})
    assert (result.done, result.success, result.truncated) == (True, True, False)
    assert set(result.rewards.values()) == {1.0}
    assert env.evaders[0].caught
    assert result.observations["agent_0"].text.split()[8:13] == ["prey", "far", "far", "went", "none"]

    env = staged(((3, 6), (0, 0)), runner)
    result = env.step({"agent_0": "west", "agent_1": "stay"})
    assert (result.done, set(result.rewards.values())) == (False, {0.0})


def test_those_who_swap_cells_pass() -> None:
    runner = Evader("patrol", (3, 3), ("east",), ("east", "east"))
    alone = {"reach": 0, "hands": 1}
    passing = staged(((3, 4), (0, 0)), runner, **alone).step({"agent_0": "west", "agent_1": "stay"})
    waiting = staged(((3, 4), (0, 0)), runner, **alone).step({"agent_0": "stay", "agent_1": "stay"})
    assert (passing.done, waiting.done) == (False, True)


def test_what_is_near_is_seen_with_its_last_moves() -> None:
    env = staged(((3, 1), (1, 1)), Evader("patrol", (3, 3), ("east",), ("east", "north")))
    seen = env.step({"agent_0": "east", "agent_1": "west"}).observations
    assert seen["agent_0"].text == (
        "left 13 did east row 3 col 2 prey v0 e2 went east east mate n2 w2 did west"
    )
    assert seen["agent_0"].sees == ("agent_1",)
    assert seen["agent_0"].fields == {"row": "3", "col": "2", "prey_down": "v0", "prey_right": "e2"}
    assert seen["agent_1"].text == (
        "left 13 did west row 1 col 0 prey far far went none none mate s2 e2 did east"
    )


def test_at_first_one_agent_sees_the_evader_and_waiting_shows_it_to_no_other() -> None:
    for seed in range(60):
        env: Any = make_env("pursuit", {"agents": 3}, seed)
        views = env.reset()
        seeing = {agent for agent, view in views.items() if view.fields["prey_down"] != "far"}
        assert len(seeing) == 1
        for _ in range(env.horizon):
            result = env.step(dict.fromkeys(env.agents, "stay"))
            assert {agent for agent, view in result.observations.items() if view.fields["prey_down"] != "far"} <= seeing
            if result.done:
                break


def rules(split: str, **params: Any) -> set[str]:
    return {make_env("pursuit", params, seed, split).evaders[0].rule for seed in range(60)}  # type: ignore[attr-defined]


def test_held_out_families_are_met_on_demand_only() -> None:
    usual, unseen = {"patrol", "clockwise", "counter", "stairs"}, {"square", "pause", "flee"}
    assert rules("train") == rules("heldout") == rules("train", novel=True) == usual
    assert rules("heldout", novel=True) == unseen
    assert rules("heldout", novel=True, heldout_families=["mirror"]) == {"mirror"}


@pytest.mark.parametrize(
    ("params", "finding"),
    [
        ({"hands": 3}, "hands = 3 is more than agents = 2"),
        ({"families": ["patrol", "teleport"]}, "families = .*'teleport'.* must be some of patrol, clockwise"),
        ({"heldout_families": []}, r"heldout_families = \[\] must be some of patrol"),
        ({"families": ["flee", "patrol"], "reach": 0}, "reach = 0 catches nothing that reacts: leave flee out of fam"),
    ],
)
def test_parameters_that_cannot_be_played_are_refused(params: dict[str, Any], finding: str) -> None:
    with pytest.raises(ConfigError, match=finding):
        make_env("pursuit", params, 0)


def test_foresight_is_worth_a_lot_and_so_are_messages() -> None:
    """The two players differ in nothing but where they run to."""
    chaser, interceptor = (success("pursuit", {}, kind, "heldout", 250) for kind in ("scripted", "interceptor"))
    assert interceptor >= chaser + 0.25
    assert success("pursuit", {}, "interceptor", "heldout", 150, talk=False) <= 0.15
    exact = {"reach": 0}
    assert success("pursuit", exact, "scripted", "train", 60) <= 0.1
    assert success("pursuit", exact, "interceptor", "train", 60) >= 0.5


@pytest.mark.parametrize("params", [{}, {"agents": 3, "evaders": 2}])
def test_the_expert_announces_the_move_it_makes_next(params: dict[str, Any]) -> None:
    expert, kept, rng = PursuitExpert(), 0, np.random.default_rng(0)
    for seed in range(6):
        env: Any = make_env("pursuit", params, seed)
        views, announced = env.reset(), None
        while True:
            decided = {agent: expert.decide(env, view, (), rng) for agent, view in views.items()}
            moves = {agent: decision.action for agent, decision in decided.items()}
            if announced is not None:
                assert moves == announced
                kept += 1
            announced = {agent: decision.message.split()[-1] for agent, decision in decided.items()}
            result = env.step(moves)
            views = result.observations
            if result.done:
                break
    assert kept > 10
