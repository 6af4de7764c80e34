"""Statistics over training seeds: interquartile means, bootstrap intervals, paired comparisons.

A sample is `{task: [value per seed]}`; tasks are the strata. Everything is numpy, short, and tested against numbers
worked out by hand. The definitions are those of `rliable` (Agarwal et al. 2021, arXiv 2108.13264), which brings `arch`,
`statsmodels` and `seaborn` along for the same percentile bootstrap.

Resampling takes seeds with replacement within each task. Where two arms are compared, both are resampled by the same
draw, since arms share their seeds: the task instances, the starter and the warm start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preconcert.core import ConfigError

Sample = Mapping[str, Sequence[float]]
"""Values by task, one per seed."""
Statistic = Callable[[np.ndarray], np.ndarray]
"""From (..., values) to (...): reduces the last axis."""
RESAMPLES = 10_000
_MOST_FLIPS = 16
"""Up to this many pairs, all sign flips are tried; beyond, as many are drawn."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float
    count: int
    """Values behind it."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against another on the seeds that both have."""

    difference: Estimate
    """Interquartile mean of the paired differences."""
    improvement: Estimate
    """Probability that a run of the first is better than a run of the second on the same task; ties count half."""
    p_value: float
    """Two-sided, by sign flips of the paired differences."""
    p_floor: float
    """The smallest p-value that this number of pairs could give."""

    @property
    def verdict(self) -> int:
        """1 if the first is better by both intervals, −1 if it is worse by both, otherwise 0. Says nothing of p."""
        if self.difference.low > 0 and self.improvement.low > 0.5:
            return 1
        if self.difference.high < 0 and self.improvement.high < 0.5:
            return -1
        return 0


def iqm(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half along the last axis; a quarter, rounded down, is cut off at each end."""
    ordered = np.sort(np.asarray(values, dtype=float), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)


def estimate(sample: Sample, seed: int, resamples: int = RESAMPLES, statistic: Statistic = iqm) -> Estimate | None:
    """A statistic of all values together, and its stratified percentile-bootstrap interval.

    Args:
        sample: values by task.
        seed: of the resampling.
        resamples: how many.
        statistic: of the values pooled over tasks.

    Returns:
        None where there is no value. With a single value per task the interval is that point: nothing is known of it.
    """
    strata = _strata(sample)
    if not strata:
        return None
    rng = np.random.default_rng(seed)
    drawn = [values[rng.integers(len(values), size=(resamples, len(values)))] for values in strata]
    pooled = np.concatenate(strata)
    return _estimate(float(statistic(pooled)), statistic(np.concatenate(drawn, axis=1)), len(pooled))


def compare(
    first: Mapping[str, Mapping[int, float]],
    second: Mapping[str, Mapping[int, float]],
    seed: int,
    resamples: int = RESAMPLES,
) -> Comparison | None:
    """Compare two arms, paired by task and seed.

    Args:
        first: value by seed by task.
        second: the same for the other arm.
        seed: of the resampling.
        resamples: how many.

    Returns:
        None where no task has a seed in common.
    """
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for task, values in first.items():
        both = [number for number in values if number in second.get(task, {})]
        if both:
            pairs.append((np.array([values[n] for n in both]), np.array([second[task][n] for n in both])))
    if not pairs:
        return None
    rng = np.random.default_rng(seed)
    differences: list[np.ndarray] = []
    improvements: list[np.ndarray] = []
    for one, other in pairs:
        index = rng.integers(len(one), size=(resamples, len(one)))
        differences.append(one[index] - other[index])
        improvements.append(probability_of_improvement(one[index], other[index]))
    plain = np.concatenate([one - other for one, other in pairs])
    better = float(np.mean([probability_of_improvement(one, other) for one, other in pairs]))
    p_value, p_floor = sign_flip(plain, seed)
    return Comparison(
        _estimate(float(iqm(plain)), iqm(np.concatenate(differences, axis=1)), len(plain)),
        _estimate(better, np.mean(improvements, axis=0), len(plain)),
        p_value,
        p_floor,
    )


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The share of all pairs of values (last axes) in which the first is larger; ties count half (Mann–Whitney)."""
    one, other = np.asarray(first)[..., :, None], np.asarray(second)[..., None, :]
    return ((one > other) + 0.5 * (one == other)).mean(axis=(-1, -2))


def sign_flip(differences: Sequence[float] | np.ndarray, seed: int) -> tuple[float, float]:
    """Two-sided p-value of a zero mean difference if signs are exchangeable, and the smallest possible one.

    Args:
        differences: paired.
        seed: of the draw, where there are too many pairs to try all flips.
    """
    values = np.asarray(differences, dtype=float)
    count = len(values)
    seen = abs(values.mean())
    if count <= _MOST_FLIPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
        means = np.abs(signs @ values) / count
        return float(np.mean(means >= seen - 1e-12)), 2.0 / 2**count if count else 1.0
    flips = 2**_MOST_FLIPS
    rng = np.random.default_rng(seed)
    means = np.abs(rng.choice((1.0, -1.0), size=(flips, count)) @ values) / count
    return float((1 + np.sum(means >= seen - 1e-12)) / (1 + flips)), 1 / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests, in the given order (Holm 1979)."""
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def p_shown(p_value: float) -> str:
    """A p-value to three places; one that would read 0.000 as what it is below."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def mean(values: np.ndarray) -> np.ndarray:
    """The mean along the last axis, as a statistic."""
    return np.asarray(values, dtype=float).mean(axis=-1)


def _strata(sample: Sample) -> list[np.ndarray]:
    strata = [np.asarray(values, dtype=float) for values in sample.values() if len(values)]
    for values in strata:
        if not np.isfinite(values).all():
            raise ConfigError(f"a sample holds {values[~np.isfinite(values)][0]}; only finite values can be averaged")
    return strata


def _estimate(value: float, resampled: np.ndarray, count: int) -> Estimate:
    low, high = np.percentile(resampled, (2.5, 97.5))
    assert math.isfinite(value)
    return Estimate(value, float(low), float(high), count)
