"""Measures on hand-made episodes, where every figure can be counted on the fingers; and the gate's words."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from preconcert.core import ConfigError, GateError, Slot, TaskLanguage
from preconcert.models import TransformersModel
from preconcert.prompts import SpanSettings
from preconcert.training.gate import GateResult, check_gate, run_gate
from preconcert.training.measures import measure, wilson
from tests.training.episodes import ACTIONS, episode, forecast, intention, message, observation, turn
from tests.training.teams import recipe_of, team_on

LANGUAGE = TaskLanguage(
    actions=ACTIONS,
    message=(Slot("what", ("a", "b")),),
    forecast=(Slot("row", ("0", "1", "2")), Slot("col", ("0", "1"))),
    rewards=("0", "1"),
)
SPANS = SpanSettings()
COL = observation("x", 0).fields["col"]


def test_intentions_count_where_the_other_was_perceived_and_had_a_choice() -> None:
    seen = {"observation": observation("x", 0, sees=["y"])}
    heard = {"inbox": (message("y", 0, ["x"]),)}
    played = episode(
        {
            "x": [
                turn("x", 0, intentions=(intention("y", "north"),), **seen),  # right
                turn("x", 1, intentions=(intention("y", "north"),), **heard),  # wrong: y goes south
                turn("x", 2, intentions=(intention("y", "north"),)),  # neither seen nor heard: does not count
                turn("x", 3, malformed=True, **heard),  # counts as wrong
                turn("x", 4, intentions=(intention("y", "stay"),), **heard),  # y had no choice: does not count
            ],
            "y": [
                turn("y", 0, "north"),
                turn("y", 1, "south"),
                turn("y", 2, "north"),
                turn("y", 3, "north"),
                turn("y", 4, "stay", observation=observation("y", 4, legal=["stay"])),
            ],
        }
    )
    found = measure([played], LANGUAGE, SPANS)
    assert found.intention_count == 3
    assert found.intention_accuracy == pytest.approx(1 / 3)
    assert found.intention_copy_last == pytest.approx(1 / 3)  # only at step 3 y repeated itself
    assert found.intention_chance == pytest.approx(1 / 3)
    assert found.malformed_rate == pytest.approx(1 / 10)


def test_forecasts_count_exactly_and_malformed_turns_are_wrong() -> None:
    played = episode(
        {
            "x": [
                turn("x", 0, forecast=forecast("1", COL, "0", False)),  # all right
                turn("x", 1, forecast=forecast("1", COL, "0", False)),  # the row is wrong
                turn("x", 2, forecast=forecast("0", COL, "1", True), reward=1.0),  # end and reward are wrong/right
                turn("x", 3, malformed=True, reward=1.0),
            ]
        }
    )
    found = measure([played], LANGUAGE, SPANS)
    assert found.forecast_count == 4
    assert found.forecast_exact_match == pytest.approx(2 / 4)
    assert found.forecast_copy_last == 0.0  # the row changes at every step
    assert found.forecast_reward_accuracy == pytest.approx(3 / 4)
    assert found.forecast_done_accuracy == pytest.approx(2 / 4)
    assert found.return_mean == 2.0


def test_messages_tokens_and_success() -> None:
    played = [
        episode({"x": [turn("x", 0, message=message("x", 0, ["y"], bits=3.0)), turn("x", 1)]}, success=True),
        episode({"x": [turn("x", 0), turn("x", 1)]}, success=False),
        episode({"x": [turn("x", 0), turn("x", 1)]}, success=None),
    ]
    found = measure(played, LANGUAGE, SPANS)
    assert found.episodes == 3
    assert found.success_rate == pytest.approx(1 / 2)
    assert found.success_ci95 == wilson(1, 2)
    assert found.message_bits_per_turn == pytest.approx(3.0 / 6)
    assert found.message_tokens_per_turn == pytest.approx(2 / 6)
    assert found.generated_tokens == 6 * 2
    assert found.steps_mean == 2.0


def test_what_nothing_counted_towards_is_none() -> None:
    scripted = {"completion_ids": (), "logprobs": (), "sampled": (), "prompt_ids": ()}
    found = asdict(measure([episode({"x": [turn("x", 0, **scripted)]})], LANGUAGE, SPANS))
    for name in ("success_rate", "intention_accuracy", "forecast_exact_match", "message_bits_per_turn"):
        assert found[name] is None
    assert found["malformed_rate"] == 0.0
    off = measure(
        [episode({"x": [turn("x", 0)], "y": [turn("y", 0)]})], LANGUAGE, SpanSettings(intend=False, foresee=False)
    )
    assert (off.intention_count, off.forecast_count) == (0, 0)
    with pytest.raises(ConfigError, match="no episodes"):
        measure([], LANGUAGE, SPANS)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # From R: prop.test(x, n, correct = FALSE)$conf.int.
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (10, 10, 0.7224672, 1.0), (81, 263, 0.2552789, 0.3662180)],
)
def test_wilson_intervals_are_the_known_ones(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert found == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_gate_says_why_and_what_to_do() -> None:
    check_gate(GateResult(0.5, 0.3, 0.15, 100))
    check_gate(GateResult(0.3, 0.3, 0.0, 100))
    check_gate(GateResult(0.2, 0.3, 0.0, 100))  # without a minimum, chance cannot close it
    check_gate(GateResult(None, None, 0.15, 100))  # nor can a task without success
    with pytest.raises(GateError) as raised:
        check_gate(GateResult(0.42, 0.37, 0.15, 100))
    text = str(raised.value)
    for part in ("0.42", "0.37", "0.05", "gate.min_gap", "0.15", "warm_start.steps"):
        assert part in text


def test_the_gate_plays_both_arms_on_the_same_layouts(starter: TransformersModel) -> None:
    result = run_gate(recipe_of(), team_on(starter))
    assert result.episodes == 4
    assert 0.0 <= result.shuffled <= 1.0
    assert result.min_gap == 0.0
    assert result == run_gate(recipe_of(), team_on(starter)), "the gate is a function of the recipe and the team"
