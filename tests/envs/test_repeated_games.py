"""Repeated rock-paper-scissors and the iterated prisoner's dilemma: rules, memory, characters to play against."""

from typing import Any

import numpy as np
import pytest

from preconcert.core import ConfigError, UnknownNameError
from preconcert.envs import Dilemma, RepeatedRps, make_env
from preconcert.envs.dilemma import STRATEGIES
from preconcert.envs.repeated import reward_words
from preconcert.envs.rps_players import MOVES, PATTERNS, PatternPlayer, beats, commonest
from tests.envs.playing import mean_returns


def rounds_of(task: str, opponent: str, params: dict[str, Any], actions: list[str]) -> list[str]:
    """What an opponent does against given actions of agent_0."""
    env = make_env(task, params, 0)
    player = type(env).player(opponent)  # type: ignore[attr-defined] # a built-in task
    rng = np.random.default_rng(0)
    views, answers = env.reset(), []
    for action in actions:
        answers.append(player.decide(env, views["agent_1"], (), rng).action)
        views = env.step({"agent_0": action, "agent_1": answers[-1]}).observations
    return answers


def test_rounds_of_rock_paper_scissors_are_paid_at_once() -> None:
    env = RepeatedRps({"rounds": 3, "history": 2}, 0)
    views = env.reset()
    assert views["agent_0"].text == "round 0 result none mine none none theirs none none"
    result = env.step({"agent_0": "rock", "agent_1": "paper"})
    assert (dict(result.rewards), result.done) == ({"agent_0": -1.0, "agent_1": 1.0}, False)
    assert result.observations["agent_0"].text == "round 1 result lost mine none rock theirs none paper"
    assert result.observations["agent_1"].fields == {"theirs": "rock", "result": "won"}
    assert dict(env.step({"agent_0": "paper", "agent_1": "paper"}).rewards) == {"agent_0": 0.0, "agent_1": 0.0}
    last = env.step({"agent_0": "scissors", "agent_1": "paper"})
    assert (dict(last.rewards), last.done, last.success) == ({"agent_0": 1.0, "agent_1": -1.0}, True, None)
    assert last.observations["agent_1"].text == "round 3 result lost mine paper paper theirs paper scissors"
    assert env.state() == "round 3 agent_0 rock paper scissors agent_1 paper paper paper"


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("always-rock", ["rock"] * 4),
        ("always-paper", ["paper"] * 4),
        ("always-scissors", ["scissors"] * 4),
        ("copycat", ["rock", "scissors", "scissors"]),
        ("beat-last", ["paper", "rock", "rock"]),
        ("frequency", ["paper", None, "rock"]),
    ],
)
def test_patterns_that_begin_anywhere_go_on_as_named(name: str, answers: list[str | None]) -> None:
    """Against rock, scissors, scissors, rock; the first answer of all but the constant ones is any move."""
    found = rounds_of("repeated-rps", name, {"history": 8}, ["rock", "scissors", "scissors", "rock"])
    wanted = answers if len(answers) == 4 else [None, *answers]
    assert all(want in (None, got) for got, want in zip(found, wanted, strict=True)), found


def test_patterns_that_follow_their_own_moves() -> None:
    assert PATTERNS["cycle"](["rock", "paper"], ["rock", "rock"]) == ("scissors",)
    assert PATTERNS["second-guess"](["rock"], ["rock"]) == ("scissors",)
    assert PATTERNS["win-stay-lose-shift"](["rock"], ["scissors"]) == ("rock",)
    assert PATTERNS["win-stay-lose-shift"](["rock"], ["rock"]) == ("paper",)
    assert PATTERNS["win-stay-lose-shift"](["rock"], ["paper"]) == ("paper",)
    assert [PATTERNS[name]([], []) for name in ("cycle", "copycat", "second-guess")] == [MOVES] * 3
    assert set(PATTERNS["frequency"]([], [])) == set(MOVES)
    assert commonest(["rock", "paper", "rock"]) == ("rock",)
    assert set(RepeatedRps.opponents) == set(PATTERNS)
    assert [beats(move) for move in MOVES] == ["paper", "scissors", "rock"]


def test_slips_are_random_moves() -> None:
    env = RepeatedRps({}, 0)
    view = env.reset()["agent_0"]
    rng = np.random.default_rng(0)
    player = PatternPlayer(PATTERNS["always-rock"], slip=0.5)
    moves = [player.decide(env, view, (), rng).action for _ in range(600)]
    assert moves.count("rock") == pytest.approx(400, abs=50)


@pytest.mark.parametrize("opponent", sorted(set(PATTERNS) - {"random"}))
def test_the_expert_recognises_every_pattern(opponent: str) -> None:
    returns = mean_returns("repeated-rps", {}, {"agent_0": "expert", "agent_1": opponent}, 60)
    assert returns["agent_0"] > 3
    assert returns["agent_1"] == -returns["agent_0"]


def test_the_teacher_reads_habits_and_can_be_read() -> None:
    against = {
        name: mean_returns("repeated-rps", {}, {"agent_0": "scripted", "agent_1": name}, 150)["agent_0"]
        for name in ("always-paper", "second-guess", "random")
    }
    assert against["always-paper"] > 4
    assert against["second-guess"] < -3
    assert abs(against["random"]) < 1


def test_the_dilemma_pays_by_its_parameters() -> None:
    env = Dilemma({"rounds": 4, "history": 2, "temptation": 3.5, "reward": 2, "punishment": 0.25, "sucker": -1}, 0)
    assert env.language.rewards == ("-1", "0.25", "2", "3.5")
    assert env.reset()["agent_0"].text == "round 0 mine none none theirs none none defections 0 0"
    paid = [
        (2, 2, "cooperate", "cooperate"), (3.5, -1, "defect", "cooperate"),
        (-1, 3.5, "cooperate", "defect"), (0.25, 0.25, "defect", "defect"),
    ]  # fmt: skip
    for one, two, mine, theirs in paid:
        result = env.step({"agent_0": mine, "agent_1": theirs})
        assert dict(result.rewards) == {"agent_0": one, "agent_1": two}
    assert (result.done, result.success) == (True, None)
    assert result.observations["agent_1"].text == (
        "round 4 mine defect defect theirs cooperate defect defections 2 2"
    )
    assert result.observations["agent_0"].fields == {"theirs": "defect"}


@pytest.mark.parametrize(
    ("params", "finding"),
    [
        ({"temptation": 3.0}, "temptation = 3, reward = 3, punishment = 1, sucker = 0 must fall in this order"),
        ({"sucker": 1.5}, "sucker = 1.5 must fall in this order"),
        ({"temptation": 6.0}, r"2 \* reward = 6 must exceed temptation \+ sucker = 6"),
        ({"reward": float("nan")}, "parameter 'reward' = nan: .*finite"),
    ],
)
def test_what_is_no_dilemma_is_refused(params: dict[str, float], finding: str) -> None:
    with pytest.raises(ConfigError, match=f"dilemma: .*{finding}"):
        make_env("dilemma", params, 0)


def test_payoffs_that_no_words_can_tell_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dilemma: payoffs 1.0 and 1.001 are closer than 0.002"):
        make_env("dilemma", {"punishment": 1.0, "reward": 1.001, "temptation": 1.2, "sucker": 0}, 0)
    assert reward_words("x", [-0.0, 0, 1 / 3, 123456.789]) == ("0", "0.333333333333", "123456.789")


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("tit-for-tat", "CCDCC"),
        ("always-defect", "DDDDD"),
        ("always-cooperate", "CCCCC"),
        ("grim", "CCDDD"),
        ("win-stay-lose-shift", "CCDDD"),
    ],
)
def test_strategies_answer_as_named(name: str, answers: str) -> None:
    """Against cooperate, defect, cooperate, cooperate, cooperate, with the last round alone in view."""
    words = {"C": "cooperate", "D": "defect"}
    actions = [words[letter] for letter in "CDCCC"]
    found = rounds_of("dilemma", name, {"rounds": 5, "history": 1}, actions)
    assert found == [words[letter] for letter in answers]
    assert set(Dilemma.opponents) == {*STRATEGIES, "random"}


def test_win_stay_lose_shift_comes_back_after_a_round_lost_together() -> None:
    answers = rounds_of("dilemma", "win-stay-lose-shift", {"rounds": 4}, ["defect"] * 4)
    assert answers == ["cooperate", "defect", "cooperate", "defect"]


def test_the_expert_cooperates_with_itself_and_loses_one_round_to_a_defector() -> None:
    assert mean_returns("dilemma", {}, {"agent_0": "expert", "agent_1": "expert"}, 3) == {
        "agent_0": 24.0, "agent_1": 24.0
    }  # fmt: skip
    against = mean_returns("dilemma", {}, {"agent_0": "expert", "agent_1": "always-defect"}, 3)
    assert against == {"agent_0": 7.0, "agent_1": 12.0}


def test_opponents_are_known_by_name() -> None:
    with pytest.raises(UnknownNameError, match="unknown player 'tit-for-tt'; did you mean 'tit-for-tat'"):
        Dilemma.player("tit-for-tt")
