"""Matrix games: any payoff tensor, the games with a name, and the traps that two of them set for self-play."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from preconcert.core import ConfigError
from preconcert.envs import Matrix, make_env
from preconcert.envs.normal_form import GAMES, NormalForm
from tests.envs.playing import play, success

PENNIES = [[[1, -1], [-1, 1]], [[-1, 1], [1, -1]]]
Vector = NDArray[np.float64]


@pytest.mark.parametrize(
    ("payoffs", "finding"),
    [
        ([1, 2], r"payoffs = \[1, 2\]: two agents take three levels of lists, this has 1"),
        ([[1, 2], [3, 4]], "this has 2"),
        ([[[1, 1], []], [[1, 1], [1, 1]]], r"payoffs\[0\]\[1\] has 0 entries, its neighbours have 2"),
        ([[], []], r"payoffs\[0\] is an empty list"),
        ([[[1, 1], [2, 2]], [[3, 3]]], r"payoffs\[1\] has 1 entries, its neighbours have 2"),
        ([[[1, 1], [2, "x"]], [[3, 3], [4, 4]]], r"payoffs\[0\]\[1\]\[1\] = 'x' is not a finite number"),
        ([[[1, 1], [2, 2]], [[3, 3], [4, True]]], r"payoffs\[1\]\[1\]\[1\] = True is not a finite number"),
        ([[[1, 1], [2, 2]], [[3, float("inf")], [4, 4]]], r"payoffs\[1\]\[0\]\[1\] = inf is not a finite number"),
        ([[[1, 1], [2, 2]], [7, [4, 4]]], r"payoffs\[1\]\[0\] = 7 is not a list of 2"),
        ([[[1, 1, 1], [2, 2, 2]], [[3, 3, 3], [4, 4, 4]]], "2 levels of actions and 3 numbers per joint action"),
        ([[[1, 1], [2, 2]]], "agent_0 has 1 actions, not 2 to 10"),
        ([[[0, 0]] * 11] * 2, "agent_1 has 11 actions, not 2 to 10"),
    ],
)
def test_what_is_no_tensor_is_refused_with_its_place(payoffs: Any, finding: str) -> None:
    with pytest.raises(ConfigError, match=finding):
        make_env("matrix", {"payoffs": payoffs}, 0)


def test_one_game_is_played() -> None:
    assert Matrix({"payoffs": PENNIES}, 0).params.game == "custom"
    again = Matrix(Matrix({"payoffs": PENNIES}, 0).params.model_dump(), 0)
    assert again.language.rewards == ("-1", "1")
    with pytest.raises(ConfigError, match="game = 'climbing' with payoffs of its own"):
        make_env("matrix", {"game": "climbing", "payoffs": PENNIES}, 0)
    with pytest.raises(ConfigError, match="game = 'custom' with no payoffs"):
        make_env("matrix", {"game": "custom"}, 0)
    with pytest.raises(ConfigError, match="unknown game 'climbin'; did you mean 'climbing'"):
        make_env("matrix", {"game": "climbin"}, 0)


def test_three_agents_with_different_actions_over_rounds() -> None:
    payoffs = np.arange(2 * 3 * 2 * 3, dtype=float).reshape(2, 3, 2, 3) / 4
    env = Matrix({"payoffs": payoffs.tolist(), "rounds": 2}, 0)
    views = env.reset()
    assert [views[agent].legal_actions for agent in env.agents] == [("a", "b"), ("a", "b", "c"), ("a", "b")]
    assert env.language.rewards == tuple(f"{number / 4:g}" for number in range(36))
    result = env.step({"agent_0": "b", "agent_1": "c", "agent_2": "a"})
    assert dict(result.rewards) == dict(zip(env.agents, payoffs[1, 2, 0], strict=True))
    assert result.observations["agent_1"].text == "round 1 agent_0 b agent_1 c agent_2 a"
    assert result.observations["agent_1"].fields == {"agent_0": "b", "agent_1": "c", "agent_2": "a"}
    assert result.observations["agent_1"].sees == ("agent_0", "agent_2")
    assert env.step({"agent_0": "a", "agent_1": "a", "agent_2": "a"}).success is None


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("game", [name for name, game in GAMES.items() if game.common])
def test_common_games_succeed_at_the_highest_payoff_of_every_round(game: str, rounds: int) -> None:
    params = {"game": game, "rounds": rounds}
    assert success("matrix", params, "expert", "train", 5) == 1.0
    assert success("matrix", params, "scripted", "train", 100) < 0.9
    best = GAMES[game].payoffs.max()
    assert play(make_env("matrix", params, 0), "matrix", "expert", 0).returns["agent_0"] == rounds * best


def test_games_with_a_name_pay_what_they_are_known_for() -> None:
    assert GAMES["climbing"].payoffs[..., 0].tolist() == [[11, -30, 0], [-30, 7, 6], [0, 0, 5]]
    assert GAMES["penalty"].payoffs[..., 0].tolist() == [[10, 0, -10], [0, 2, 0], [-10, 0, 10]]
    assert {name for name, game in GAMES.items() if game.common} == {"penalty", "climbing", "xor", "coordination"}
    assert GAMES["xor"].recommended() == (0, 1)
    assert GAMES["coordination"].recommended() == (0, 0)
    assert GAMES["cycle-trap"].recommended() == (3, 3)
    assert NormalForm.of(PENNIES).recommended() is None
    for name in ("cycle-trap", "fxp-counterexample"):
        payoffs = GAMES[name].payoffs
        assert not payoffs.sum(axis=-1).any()
        assert not np.signbit(payoffs[payoffs == 0]).any()


def test_players_act_at_random_where_nothing_pure_is_stable() -> None:
    returns = [play(make_env("matrix", {"payoffs": PENNIES}, 0), "matrix", "expert", seed).returns["agent_0"]
               for seed in range(100)]
    assert 20 < returns.count(1.0) < 80


# ---- cycle-trap: two agents


CIRCLE: Vector = GAMES["cycle-trap"].payoffs[..., 0]


def answer(policies: Sequence[int]) -> int:
    """The best response to playing against each of these equally often."""
    return int(np.argmax(CIRCLE[:, list(policies)].mean(axis=1)))


def test_self_play_goes_round_in_the_circle_for_ever() -> None:
    """Every action but the robust one comes up again and again; it would never lose."""
    current, seen = answer(range(4)), []
    for _ in range(300):
        seen.append(current)
        current = answer([current])
    assert seen == [0, 1, 2] * 100
    assert CIRCLE[3].min() == 0


def test_cross_play_and_averages_leave_the_circle() -> None:
    main = answer(range(4))
    past, counters = [main], []
    for _ in range(40):
        counters.append(answer(past))
        main = answer([main, *counters])
        past.append(main)
    assert past[-30:] == [3] * 30
    selves = [answer(range(4))]
    for _ in range(40):
        selves.append(answer(selves))
    assert selves[-30:] == [3] * 30


# ---- fxp-counterexample: two teams of two


TEAMS: Vector = GAMES["fxp-counterexample"].payoffs[..., 0]
Team = tuple[float, float]
"""Probability of `b` of each of a team's agents, who choose independently."""
START: Team = (0.5, 0.5)


def plays(team: Team) -> Vector:
    """Probabilities of a team's joint actions, shape (2, 2)."""
    one, two = ((1 - bet, bet) for bet in team)
    return np.outer(one, two)


def wins(team: Vector, other: Vector) -> float:
    """What each agent of a team gets on average."""
    return float(np.einsum("ij,ijkl,kl->", team, TEAMS, other))


def learn(team: Team, other: Callable[[Team], Vector], steps: int = 300, rate: float = 0.1) -> Team:
    """Both agents at once, each by itself: step towards the best response to mate and opponents as they are now."""
    for _ in range(steps):
        against = other(team)
        now = []
        for agent in (0, 1):
            options: list[Team] = [(choice, team[1]) if agent == 0 else (team[0], choice) for choice in (0.0, 1.0)]
            a, b = (wins(plays(option), against) for option in options)
            now.append(team[agent] + rate * (float(b > a) - team[agent] if a != b else 0.0))
        team = (now[0], now[1])
    return team


def team_gain(team: Team) -> float:
    """What another team can win from this one by agreeing on an answer."""
    return max(wins(plays((one, two)), plays(team)) for one in (0.0, 1.0) for two in (0.0, 1.0))


def average(teams: Sequence[Team]) -> Vector:
    """How a team plays that is one of these, drawn anew each time."""
    return np.mean([plays(team) for team in teams], axis=0)


def test_the_robust_solution_is_b_and_a_is_a_trap() -> None:
    game = GAMES["fxp-counterexample"]
    assert game.is_equilibrium((0, 0, 0, 0))
    assert game.is_equilibrium((1, 1, 1, 1))
    assert (team_gain((0.0, 0.0)), team_gain((1.0, 1.0))) == (3.0, 0.0)


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_self_play_of_teams_is_stuck(rate: float) -> None:
    """From uniform play, against the latest self and against the average of all past selves."""
    latest = learn(START, plays, rate=rate, steps=2000)
    assert latest == pytest.approx((0, 0), abs=1e-6)
    past = [START]
    for _ in range(30):
        past.append(learn(past[-1], lambda team: average([*past, team]), rate=rate))
    assert past[-1] == pytest.approx((0, 0), abs=1e-6)
    assert team_gain(past[-1]) == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_fictitious_cross_play_reaches_the_robust_solution(rate: float) -> None:
    """Main: goes on learning against itself and every counter. Counters: start afresh against the main's past."""
    main = learn(START, plays, rate=rate)
    past, counters, exploited = [main], [], [team_gain(main)]
    for _ in range(8):
        counters.append(learn(START, lambda _: average(past), rate=rate))
        main = learn(main, lambda team: average([team, *counters]), rate=rate)
        past.append(main)
        exploited.append(team_gain(main))
    assert exploited[0] == pytest.approx(3, abs=1e-4)
    assert counters[0] == pytest.approx((1, 1), abs=1e-6)
    assert main == pytest.approx((1, 1), abs=1e-6)
    assert exploited[-1] == pytest.approx(0, abs=1e-4)
