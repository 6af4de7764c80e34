"""Fidelity measures on futures that are known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from preconcert.core import ConfigError
from preconcert.world_models.calibration import auroc, calibration_error, reliability_bins, slope
from preconcert.world_models.consistency import claims, consistency_of, success_threshold
from preconcert.world_models.fidelity import NLL_CEILING, Mode, choose_starts, measure_fidelity
from preconcert.world_models.tables import CopyLast
from tests.world_models.worlds import LANGUAGE, Knowing, cases, counted

UP, ONE, NONE = ("up", "up"), ("up", "stay"), ("stay", "stay")
EPISODES = [
    counted([ONE, NONE, UP, ONE], ["red", "red", "red", "green", "green"]),
    counted([NONE, ONE, ONE], ["green", "green", "red", "red"]),
]
HORIZONS = (1, 2, 4)


@pytest.mark.parametrize("mode", Mode)
def test_a_perfect_model_is_perfect(mode: Mode) -> None:
    asked = cases(EPISODES, LANGUAGE, HORIZONS)
    found = measure_fidelity(Knowing(asked), asked, mode, HORIZONS, samples=2)
    assert set(found.figures) == {1, 2, 4}
    for h, figures in found.figures.items():
        wrong = ("mse", "nll", "reward_error", "malformed", "ended_early", "mate_ce", "mate_brier", "mate_ece")
        assert [figures[name] for name in wrong] == [0.0] * len(wrong), h
        right = ("exact", "field_exact", "determined", "mate_accuracy")
        assert [figures[name] for name in right] == [1.0] * len(right), h
        assert figures["auroc"] == (1.0 if h < 4 else None)  # four steps always reach the end here
    assert found.mse == (0.0,) * 4
    assert found.drift == pytest.approx(0.0)


def test_what_is_malformed_is_wrong_in_the_worst_way() -> None:
    asked = cases(EPISODES, LANGUAGE, HORIZONS)
    found = measure_fidelity(Knowing(asked, malformed_from=2), asked, Mode.GIVEN, HORIZONS)
    assert found.figures[1]["mse"] == 0.0
    for h in (2, 4):
        figures = found.figures[h]
        expected = {
            "mse": 1.0, "exact": 0.0, "field_exact": 0.0, "determined": 0.0, "nll": 2 * NLL_CEILING,
            "reward_error": 1.0, "malformed": 1.0, "mate_accuracy": 0.0, "mate_ce": NLL_CEILING, "mate_brier": 1.0,
            "mate_ece": 1.0, "auroc": 0.0 if h == 2 else None, "ended_early": 0.0,
        }  # fmt: skip
        assert figures == pytest.approx(expected), h
    assert found.mse == (0.0, 1.0, 1.0, 1.0)
    assert found.drift == pytest.approx(0.3)


def test_an_end_too_early_is_an_error_from_there_on() -> None:
    episode = counted([ONE, ONE, UP], ["red"] * 4)
    asked = [case for case in cases([episode], LANGUAGE, (3,), 1) if len(case.outcomes) == 3]
    found = measure_fidelity(Knowing(asked, ends_at=1), asked, Mode.GIVEN, (1, 2, 3))
    assert found.figures[1]["ended_early"] == 0.0
    assert found.figures[2]["ended_early"] == 1.0
    # The height stays at 1 while it becomes 2 and 4; the light is right.
    assert found.figures[2]["mse"] == pytest.approx((1 / 4) ** 2 / 2)
    assert found.figures[3]["mse"] == pytest.approx((3 / 4) ** 2 / 2)
    assert found.figures[3]["field_exact"] == 0.5
    assert found.figures[3]["determined"] == 0.0
    assert found.figures[3]["reward_error"] == 1.0
    assert found.figures[3]["nll"] == 2 * NLL_CEILING


def test_copying_costs_what_changed() -> None:
    episode = counted([ONE, ONE, UP], ["red", "red", "green", "green"])
    asked = [case for case in cases([episode], LANGUAGE, (3,), 1) if len(case.outcomes) == 3]
    found = measure_fidelity(CopyLast(EPISODES, LANGUAGE), asked, Mode.IMAGINED, (1, 2, 3))
    assert [found.figures[h]["mse"] for h in (1, 2, 3)] == pytest.approx([1 / 32, (4 / 16 + 1) / 2, (1 + 1) / 2])
    assert [found.figures[h]["determined"] for h in (1, 2, 3)] == [0.0, 0.0, 0.0]
    assert found.figures[3]["reward_error"] == 1.0
    assert found.cases == {1: 2, 2: 2, 3: 2}
    assert found.measures(Mode.IMAGINED)["mse_b_1"] == found.figures[1]["mse"]


def test_starts_include_the_first_and_some_that_reach_the_end() -> None:
    starts = choose_starts(20, (1, 5, 10, 20), 4, 3)
    assert starts == sorted(set(starts))
    assert 0 in starts
    assert len(starts) == 4
    assert {19, 15, 10, 0} & set(starts) - {0}
    assert choose_starts(2, (1, 5), 9, 0) == [0, 1]


def test_ranking_and_calibration_by_hand() -> None:
    assert auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert auroc([0.5, 0.5], [True, False]) == 0.5
    assert auroc([0.5, 0.7], [True, True]) is None

    bins = reliability_bins(np.array([0.95, 0.97, 0.5, 1.0]), np.array([1.0, 0.0, 1.0, 1.0]))
    assert bins == ((0.5, 1.0, 1), (pytest.approx((0.95 + 0.97 + 1) / 3), pytest.approx(2 / 3), 3))
    assert calibration_error(bins) == pytest.approx((0.5 + 3 * abs(2.92 / 3 - 2 / 3)) / 4)
    assert calibration_error(()) is None
    assert slope([1.0, 3.0, 5.0]) == pytest.approx(2.0)
    assert slope([1.0]) is None


def test_consistency_of_verdicts() -> None:
    found = consistency_of([True, True, False, None], [True, False, True, False])
    assert (found.claimed, found.kept, found.agreement, found.trusted) == (0.5, 0.5, 0.25, 0.5)
    assert found.ratio == 1.0
    assert consistency_of([False], [True]).ratio is None
    with pytest.raises(ValueError):
        consistency_of([True], [])


def test_the_threshold_tells_success_from_failure() -> None:
    assert success_threshold([0.0, 1.0, 1.0], [False, True, True]) == 0.5
    assert success_threshold([-1.0, 0.25, 2.0], [False, False, True]) == pytest.approx(1.125)
    assert success_threshold([0.0, 0.0], [False, False]) > 0


def test_claims_are_the_world_s_own_where_the_model_is_perfect() -> None:
    asked = [case for case in cases(EPISODES, LANGUAGE, (3, 4)) if case.request.observation.step == 0]
    verdicts = [case.request.episode.startswith("e0") for case in asked]
    assert claims(Knowing(asked), asked, 0.5) == verdicts == [True, True, False, False]
    assert claims(Knowing(asked, malformed_from=3), asked, 0.5) == [None] * 4


def test_nothing_to_measure_is_an_error() -> None:
    asked = cases(EPISODES, LANGUAGE, HORIZONS)
    with pytest.raises(ConfigError, match="no case"):
        measure_fidelity(Knowing([]), [], Mode.GIVEN)
    with pytest.raises(ConfigError, match="goes on for 9 steps"):
        measure_fidelity(Knowing(asked), asked, Mode.GIVEN, (9,))
    assert math.isclose(NLL_CEILING, 9.21034, rel_tol=1e-5)
