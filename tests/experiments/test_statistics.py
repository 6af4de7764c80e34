"""Statistics against numbers worked out by hand and against other implementations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconcert.core import ConfigError
from preconcert.experiments.statistics import (
    compare,
    estimate,
    holm,
    iqm,
    mean,
    p_shown,
    probability_of_improvement,
    sign_flip,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0], 1.0),
        ([1.0, 5.0], 3.0),
        ([0.0, 1.0, 2.0, 100.0], 1.5),
        ([9.0, 1.0, 2.0, 3.0, -50.0], 2.0),  # a quarter of five, rounded down, is one
        (list(range(8)), 3.5),
    ],
)
def test_iqm(values: list[float], expected: float) -> None:
    assert iqm(np.array(values)) == pytest.approx(expected)


def test_iqm_is_scipys_trimmed_mean() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=(4, 13))
    assert iqm(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=-1))


def test_an_interval_of_a_mean_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(2.0, 1.0, size=30)
    found = estimate({"task": values.tolist()}, 0, 20_000, mean)
    assert found is not None
    wanted = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile").confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.02)


def test_intervals_cover() -> None:
    """95% intervals of a mean of 30 normal values hold the truth in about 95 of 100 cases."""
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        found = estimate({"task": rng.normal(0.0, 1.0, 30).tolist()}, trial, 500, mean)
        assert found is not None
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_strata_are_resampled_apart() -> None:
    """Two tasks that differ by much and do not vary: pooled resampling would show an interval, stratified none."""
    found = estimate({"easy": [1.0] * 5, "hard": [0.0] * 5}, 0)
    assert found is not None
    assert (found.value, found.low, found.high, found.count) == (0.5, 0.5, 0.5, 10)


def test_a_single_seed_has_no_width_and_none_has_no_estimate() -> None:
    found = estimate({"task": [0.3]}, 0)
    assert found is not None
    assert (found.low, found.value, found.high, found.count) == (0.3, 0.3, 0.3, 1)
    assert estimate({"task": []}, 0) is None
    with pytest.raises(ConfigError, match="nan"):
        estimate({"task": [0.1, float("nan")]}, 0)


def test_estimates_are_repeatable() -> None:
    sample = {"task": [0.1, 0.5, 0.9, 0.2, 0.4]}
    assert estimate(sample, 3) == estimate(sample, 3)


def test_probability_of_improvement() -> None:
    # 2 > 1, 2 = 2, 4 > 1, 4 > 2: three wins and a tie of four
    assert probability_of_improvement(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)
    same = np.arange(5.0)
    assert probability_of_improvement(same, same) == pytest.approx(0.5)


def test_sign_flips_by_hand() -> None:
    assert sign_flip([1.0, 1.0, 1.0], 0) == (0.25, 0.25)  # +++ and −−− of eight
    # means of ±3 ±1: only (+,+) and (−,−) reach 2
    assert sign_flip([3.0, 1.0], 0) == (0.5, 0.5)
    assert sign_flip([0.0, 0.0], 0) == (1.0, 0.5)


def test_sign_flips_of_many_pairs_are_drawn() -> None:
    rng = np.random.default_rng(4)
    small, floor = sign_flip(rng.normal(3.0, 1.0, 20), 0)
    assert small == pytest.approx(floor)
    assert sign_flip(rng.normal(0.0, 1.0, 20), 0)[0] > 0.05


def test_holm_by_hand() -> None:
    # ordered .01 .02 .03 .04 → ×4 ×3 ×2 ×1 = .04 .06 .06 .04, made monotone
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=lambda each: p_values[each])
    assert [adjusted[each] for each in order] == sorted(adjusted)


def test_a_comparison_pairs_seeds() -> None:
    """Seeds vary by far more than the arms differ; paired, the difference is exact."""
    second = {"a": {seed: float(seed) for seed in range(6)}, "b": {seed: 10.0 * seed for seed in range(6)}}
    first = {task: {seed: value + 0.1 for seed, value in values.items()} for task, values in second.items()}
    first["a"][99] = 1000.0  # a seed that only one arm has is left out
    found = compare(first, second, 0)
    assert found is not None
    assert found.difference.count == 12
    assert (found.difference.value, found.difference.low, found.difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p_value == pytest.approx(2 / 2**12)
    assert found.p_value == found.p_floor
    # within a task, 6 pairs of one seed and 15 of a larger first seed win, 15 lose
    assert found.improvement.value == pytest.approx(21 / 36)


def test_verdicts() -> None:
    low = {"a": {seed: 0.1 + 0.01 * seed for seed in range(5)}}
    high = {"a": {seed: 0.8 + 0.01 * seed for seed in range(5)}}
    for one, other, expected in ((high, low, 1), (low, high, -1), (low, low, 0)):
        found = compare(one, other, 0)
        assert found is not None
        assert found.verdict == expected
    assert compare(low, {"b": {0: 1.0}}, 0) is None


def test_a_p_value_never_reads_as_nothing() -> None:
    assert p_shown(0.0004) == "< 0.001"
    assert p_shown(0.0124) == "0.012"
    assert p_shown(1.0) == "1.000"
