"""Kuhn poker: its rules, and what strategies are worth by numbers worked out by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from preconcert.core import ConfigError, UnknownNameError
from preconcert.envs import Kuhn, decision_points
from preconcert.envs.kuhn import HONEST, SCRIPT, information_set_of
from preconcert.envs.kuhn_exploitability import (
    INFORMATION_SETS,
    InformationSet,
    best_response,
    equilibrium,
    exploitability,
    game_value,
    information_sets,
)
from tests.envs.playing import mean_returns

FIRST, SECOND = information_sets("first"), information_sets("second")
ALWAYS, NEVER, UNIFORM = (dict.fromkeys(INFORMATION_SETS, bet) for bet in (1.0, 0.0, 0.5))


def dealt(first_card: str, second_card: str, first: str = "agent_0") -> Kuhn:
    """An instance with this deal."""
    for seed in range(1000):
        env = Kuhn({"first": first}, seed)
        other = "agent_1" if first == "agent_0" else "agent_0"
        if (env.card_of(first), env.card_of(other)) == (first_card, second_card):
            return env
    raise AssertionError("no such deal")


@pytest.mark.parametrize(
    ("moves", "higher", "lower"),
    [
        (("pass", "pass"), 1, -1),
        (("pass", "bet", "pass"), -1, -1),
        (("pass", "bet", "bet"), 2, -2),
        (("bet", "pass"), 1, 1),
        (("bet", "bet"), 2, -2),
    ],
)
def test_hands_end_as_the_rules_say(moves: tuple[str, ...], higher: int, lower: int) -> None:
    """What the first seat wins with the higher and with the lower card."""
    for cards, won in ((("king", "jack"), higher), (("jack", "queen"), lower)):
        for first, second in (("agent_0", "agent_1"), ("agent_1", "agent_0")):
            env = dealt(*cards, first=first)
            env.reset()
            for number, move in enumerate(moves, start=1):
                mover = (first, second)[(number - 1) % 2]
                waiter = (first, second)[number % 2]
                assert (env.legal_actions(mover), env.legal_actions(waiter)) == (("pass", "bet"), ("wait",))
                result = env.step({mover: move, waiter: "wait"})
                assert result.done == (number == len(moves))
                assert result.done or set(result.rewards.values()) == {0.0}
            assert result.rewards == {first: won, second: -won}
            assert (result.success, result.truncated) == (None, False)
            shown = {agent: view.fields["shown"] for agent, view in result.observations.items()}
            folded = moves[-1] == "pass" and "bet" in moves
            assert shown == dict.fromkeys((first, second), "none") if folded else {first: cards[1], second: cards[0]}
            assert result.observations[first].text.split()[7] == str(2 + moves.count("bet"))


def test_an_agent_sees_its_card_and_the_moves_and_no_more() -> None:
    env, other = dealt("queen", "jack"), dealt("queen", "king")
    for each in (env, other):
        assert each.reset()["agent_0"].text == (
            "seat first card queen turn mine pot 2 moves none none none shown none"
        )
    joint = {"agent_0": "pass", "agent_1": "wait"}
    views, others = env.step(joint).observations, other.step(joint).observations
    assert views["agent_0"] == others["agent_0"]
    assert views["agent_1"].text == "seat second card jack turn mine pot 2 moves pass none none shown none"
    assert (views["agent_1"].fields, views["agent_1"].sees) == ({"move": "pass", "shown": "none"}, ("agent_0",))


def test_seats_and_cards_are_drawn_evenly_or_fixed() -> None:
    drawn = Counter(Kuhn({}, seed).layout_key() for seed in range(1200))
    assert len(drawn) == 12
    assert max(drawn.values()) < 1.6 * min(drawn.values())
    assert {Kuhn({"first": "agent_1"}, seed).seat_of("agent_1") for seed in range(30)} == {"first"}
    with pytest.raises(ConfigError, match="kuhn: parameter 'first' = 'agent_2'"):
        Kuhn({"first": "agent_2"}, 0)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.25, 1 / 3])
def test_the_equilibria_cannot_be_exploited(alpha: float) -> None:
    table = equilibrium(alpha)
    found = exploitability(table, table)
    assert found.value == pytest.approx(-1 / 18)
    assert (found.first_gain, found.second_gain) == pytest.approx((0, 0), abs=1e-12)
    assert game_value(table, equilibrium(0.2)) == pytest.approx(-1 / 18)


def test_only_those_are_equilibria() -> None:
    for each in FIRST + SECOND:
        table = equilibrium(0.2)
        moved = {**table, each: table[each] + (0.1 if table[each] < 0.5 else -0.1)}
        assert exploitability(moved, moved).total > 0.005, each
    with pytest.raises(ConfigError, match=r"alpha = 0.4 is not between 0 and 1/3"):
        equilibrium(0.4)


def test_uniform_play_by_hand() -> None:
    """Showdowns even out. The first seat loses 1 where it folds, 1/2 · 1/2 · 1/2, and wins 1 where the second does,
    1/2 · 1/2. A best response with king, queen, jack wins 3/2, 1/2, -1/2 in the first seat (it always bets) and
    7/4, 1/4, -3/4 in the second (it bets, calls with the king and folds the jack)."""
    found = exploitability(UNIFORM, UNIFORM)
    assert found.value == pytest.approx(1 / 8)
    assert best_response("first", UNIFORM)[1] == pytest.approx(1 / 2)
    assert best_response("second", UNIFORM)[1] == pytest.approx(5 / 12)
    assert found.total == pytest.approx(1 / 2 + 5 / 12)
    assert found.mean == pytest.approx(11 / 24)
    assert found.pot_share == pytest.approx(11 / 48)


def test_always_betting_by_hand() -> None:
    """Every hand is a called bet and even. Against it the king wins 2, the queen 0 and the jack folds for -1."""
    found = exploitability(ALWAYS, ALWAYS)
    assert found.value == 0
    assert (found.first_gain, found.second_gain) == pytest.approx((1 / 3, 1 / 3))
    table, won = best_response("second", ALWAYS)
    assert won == pytest.approx(1 / 3)
    assert [table[InformationSet(card, ("bet",))] for card in ("jack", "king")] == [0.0, 1.0]


def test_never_betting_by_hand() -> None:
    """Every hand is a showdown for 1 and even. Against it any bet is folded to and wins 1."""
    found = exploitability(NEVER, NEVER)
    assert (found.value, found.first_gain, found.second_gain) == (0, 1, 1)


def test_the_teacher_can_be_taught() -> None:
    assert 0.1 < exploitability(SCRIPT, SCRIPT).mean < 0.3
    assert exploitability(HONEST, HONEST).mean == pytest.approx(1 / 4)


def test_strategies_are_checked() -> None:
    short = {each: 0.5 for each in SECOND if each.moves == ("bet",)}
    with pytest.raises(ConfigError, match="strategy of the second seat: no probability for 'jack after pass'"):
        game_value(UNIFORM, short)
    with pytest.raises(ConfigError, match=r"'queen after nothing' has probability 1.5, not in \[0, 1\]"):
        exploitability({**UNIFORM, InformationSet("queen"): 1.5}, UNIFORM)
    with pytest.raises(UnknownNameError, match="unknown seat 'frist'; did you mean 'first'"):
        best_response("frist", UNIFORM)


def test_best_responses_win_what_they_promise() -> None:
    for seat, table in (("first", SCRIPT), ("second", HONEST)):
        response, won = best_response(seat, table)
        value = game_value(response, table) if seat == "first" else -game_value(table, response)
        assert value == pytest.approx(won)


def test_every_information_set_can_be_asked() -> None:
    for agent in ("agent_0", "agent_1"):
        points = decision_points(agent)
        assert [point.information_set for point in points] == list(INFORMATION_SETS)
        assert len({point.observation.text for point in points}) == 12
        for point in points:
            assert information_set_of(point.observation) == point.information_set
            assert point.env.legal_actions(agent) == point.observation.legal_actions == ("pass", "bet")
            assert point.observation.agent == agent
    assert [point.information_set for point in decision_points("agent_1", {"first": "agent_0"})] == list(SECOND)
    with pytest.raises(UnknownNameError, match="unknown agent 'agent_2'"):
        decision_points("agent_2")


def test_play_comes_out_as_computed() -> None:
    """4,000 hands in drawn seats: half the difference of both seats' values, within four standard errors."""
    expert = equilibrium(1 / 3)
    expected = (game_value(expert, ALWAYS) - game_value(ALWAYS, expert)) / 2
    found = mean_returns("kuhn", {}, {"agent_0": "expert", "agent_1": "always-bet"}, 4000)
    assert found["agent_0"] == pytest.approx(expected, abs=0.11)
    assert found["agent_1"] == -found["agent_0"]


def test_restored_hands_go_on() -> None:
    env = dealt("king", "queen")
    env.reset()
    snapshot = replace(env.snapshot(), step=2, state=("pass", "bet"))
    env.restore(snapshot)
    assert env.step({"agent_0": "bet", "agent_1": "wait"}).rewards == {"agent_0": 2.0, "agent_1": -2.0}
