"""Ratings and the draw of opponents, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from preconcert.training.matchmaking import Sampler, chances, score, updated


def test_a_game_is_won_lost_or_drawn() -> None:
    assert [score(2.0, -2.0), score(-1.0, 1.0), score(3.0, 3.0)] == [1.0, 0.0, 0.5]


def test_a_batch_moves_a_rating_as_its_games_do_on_average() -> None:
    assert updated(0.4, [], 0.9) == 0.4
    assert updated(0.4, [1.0], 0.9) == pytest.approx(0.9 * 0.4 + 0.1)
    assert updated(0.4, [1.0, 1.0], 0.9) == pytest.approx(0.9 * (0.9 * 0.4 + 0.1) + 0.1)
    scores = [1.0, 0.0, 0.5, 1.0]
    assert updated(0.4, scores, 0.9) == updated(0.4, scores[::-1], 0.9) == pytest.approx(0.6561 * 0.4 + 0.3439 * 0.625)
    assert updated(0.4, scores, 0.0) == pytest.approx(0.625)


def test_those_that_are_not_beaten_are_met_more_often() -> None:
    ratings = [0.9, 0.5, 0.1]
    assert chances(ratings, Sampler.UNIFORM, 2.0, 0.0).tolist() == pytest.approx([1 / 3] * 3)
    found = chances(ratings, Sampler.RATING, 2.0, 0.0)
    assert found.tolist() == pytest.approx([0.01 / 1.07, 0.25 / 1.07, 0.81 / 1.07])
    floored = chances(ratings, Sampler.RATING, 2.0, 0.3)
    assert floored.tolist() == pytest.approx((0.1 + 0.7 * found).tolist())
    assert floored.min() >= 0.1
    assert floored.sum() == pytest.approx(1.0)


def test_without_preference_everyone_is_met_equally() -> None:
    assert chances([0.9, 0.1], Sampler.RATING, 0.0, 0.0).tolist() == [0.5, 0.5]
    assert chances([1.0, 1.0], Sampler.RATING, 2.0, 0.0).tolist() == [0.5, 0.5]
    assert chances([1.0, 0.0], Sampler.RATING, 2.0, 1.0).tolist() == [0.5, 0.5]
    assert len(chances([], Sampler.RATING, 2.0, 0.2)) == len(np.zeros(0))
