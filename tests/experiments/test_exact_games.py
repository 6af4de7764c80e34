"""Exact games against what is known about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from preconcert.agents import AgentSettings, Context, GenerativeTeam
from preconcert.envs import Matrix, make_env
from preconcert.envs.kuhn_exploitability import INFORMATION_SETS, InformationSet
from preconcert.experiments.exact_games import KuhnGame, MatrixGame, Strategy, exact_game
from preconcert.prompts import SpanSettings
from preconcert.training.recipe import Recipe
from tests.training.teams import load, starter_checkpoint

ACT = AgentSettings(spans=SpanSettings(intend=False, foresee=False, say=False))
AGENTS = ("agent_0", "agent_1")
TEAMS = (("agent_0", "agent_1"), ("agent_2", "agent_3"))


def script(game: KuhnGame | MatrixGame, name: str) -> Strategy:
    found = game.script(name)
    assert found is not None
    return found


# ---- Kuhn poker


def test_the_equilibrium_is_worth_what_kuhn_said() -> None:
    found = KuhnGame({}).worth(script(KuhnGame({}), "equilibrium"))
    assert found.exploitability == pytest.approx(0, abs=1e-12)
    assert dict(found.values) == pytest.approx({"first": -1 / 18, "second": 1 / 18})
    assert (found.unit, found.samples) == ("pots", None)


def test_random_play_is_exploited() -> None:
    """0.9167 chips for both seats' best responses together, a known number."""
    found = KuhnGame({}).worth(script(KuhnGame({}), "random"))
    assert found.nash_conv == pytest.approx(11 / 12)
    assert found.exploitability == pytest.approx(11 / 48)
    assert found.values["first"] == pytest.approx(1 / 8)


def test_agents_may_differ() -> None:
    """Each agent has a table of its own; the figures are means over who sits first."""
    game = KuhnGame({})
    honest, random = script(game, "honest").tables["agent_0"], script(game, "random").tables["agent_0"]
    mixed = game.worth(Strategy({"agent_0": honest, "agent_1": random}))
    from preconcert.envs.kuhn_exploitability import exploitability

    one, two = exploitability(honest, random), exploitability(random, honest)
    assert mixed.nash_conv == pytest.approx((one.total + two.total) / 2)
    assert game.returns([script(game, "honest"), script(game, "random")]) == pytest.approx(
        [(one.value - two.value) / 2, (two.value - one.value) / 2]
    )
    seated = KuhnGame({"first": "agent_1"})
    assert seated.worth(Strategy({"agent_0": honest, "agent_1": random})).nash_conv == pytest.approx(two.total)


def test_an_average_plays_like_drawing_one_before_each_hand() -> None:
    """Weighted by how often each gets there: against anyone it wins the mean of what they win."""
    game = KuhnGame({})
    rng = np.random.default_rng(0)

    def drawn() -> Strategy:
        return Strategy({agent: {each: float(rng.random()) for each in INFORMATION_SETS} for agent in AGENTS})

    some = [drawn() for _ in range(3)]
    mean = game.average(some)
    for _ in range(5):
        other = drawn()
        apart = [game.returns([each, other])[0] for each in some]
        assert game.returns([mean, other])[0] == pytest.approx(np.mean(apart))
    never = {**dict.fromkeys(INFORMATION_SETS, 0.0), InformationSet("king", ()): 1.0}
    table = game.average([Strategy(dict.fromkeys(AGENTS, never))] * 2).tables["agent_0"]
    assert table[InformationSet("king", ("pass", "bet"))] == 0.0


def test_a_team_is_asked(tmp_path: Path) -> None:
    model = load(starter_checkpoint(tmp_path / "starter", "kuhn", {}), ("main", "past"), deviation=0.5)
    team = GenerativeTeam(model, make_env("kuhn", {}, 0).language, ACT, dict.fromkeys(AGENTS, "main"))
    game = KuhnGame({})
    strategy = game.ask(team)
    assert set(strategy.tables) == set(AGENTS)
    assert all(set(table) == set(INFORMATION_SETS) for table in strategy.tables.values())
    assert strategy.samples is None
    assert game.ask(team, "past").tables != strategy.tables
    assert 0 < game.worth(strategy).exploitability < 1


# ---- normal form


def matrix(game: str, sides: tuple[tuple[str, ...], ...]) -> MatrixGame:
    env = make_env("matrix", {"game": game}, 0)
    assert isinstance(env, Matrix)
    return MatrixGame(env, sides)


def test_the_trap_of_the_counter_example() -> None:
    """All on `a`: no agent gains alone, a team of two gains 3. All on `b`: nobody gains."""
    alone, together = matrix("fxp-counterexample", (("agent_0",), ("agent_1",), *TEAMS[1:])), matrix(
        "fxp-counterexample", TEAMS
    )
    pure = {"a": np.array([1.0, 0, 0, 0]), "b": np.array([0, 0, 0, 1.0])}
    worth = {
        name: together.worth(Strategy(dict.fromkeys(("agent_0+agent_1", "agent_2+agent_3"), each)))
        for name, each in pure.items()
    }
    assert (worth["a"].exploitability, worth["b"].exploitability) == (3.0, 0.0)
    assert worth["a"].values == {"agent_0+agent_1": 0.0, "agent_2+agent_3": 0.0}
    single = alone.worth(script(alone, "expert"))
    assert single.gains["agent_0"] == 0.0
    assert together.describe(script(together, "expert"))["agent_0+agent_1"] == {
        "a a": 1.0, "a b": 0.0, "b a": 0.0, "b b": 0.0,
    }  # fmt: skip


def test_teams_are_averaged_as_teams() -> None:
    """Half the time both on `a`, half the time both on `b`, is never split."""
    game = matrix("fxp-counterexample", TEAMS)
    names = ("agent_0+agent_1", "agent_2+agent_3")
    a, b = (Strategy(dict.fromkeys(names, each)) for each in (np.array([1.0, 0, 0, 0]), np.array([0, 0, 0, 1.0])))
    mean = game.average([a, b])
    assert mean.tables[names[0]].tolist() == [0.5, 0, 0, 0.5]
    assert game.returns([mean, a]) == pytest.approx([1.5, -1.5])
    assert game.returns([b, a]) == pytest.approx([3, -3])


def test_sides_need_not_be_neighbours() -> None:
    crossed = matrix("fxp-counterexample", (("agent_2", "agent_3"), ("agent_0", "agent_1")))
    straight = matrix("fxp-counterexample", TEAMS)
    assert crossed.returns([script(crossed, "random"), script(crossed, "expert")]) == pytest.approx(
        straight.returns([script(straight, "random"), script(straight, "expert")])
    )


def test_which_tasks_are_exact() -> None:
    sides = (("agent_0",), ("agent_1",))
    assert isinstance(exact_game(Recipe(task="kuhn"), sides), KuhnGame)
    assert isinstance(exact_game(Recipe(task="matrix"), sides), MatrixGame)
    assert exact_game(Recipe(task="matrix", params={"rounds": 2}), sides) is None
    assert exact_game(Recipe(task="dilemma"), sides) is None
    assert exact_game(Recipe(task="kuhn", agent=AgentSettings(memory=1)), sides) is None
    assert exact_game(Recipe(task="kuhn", agent=AgentSettings(context=Context.TRANSCRIPT)), sides) is None
