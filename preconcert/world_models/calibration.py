"""Figures of foretold probabilities: ranking, reliability, calibration error, and the slope of an error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Of equal width, for the calibration error."""
Array = NDArray[np.float64]
ReliabilityBin = tuple[float, float, int]
"""Mean confidence, share that was right, how many."""


def auroc(scores: Sequence[float], truths: Sequence[bool]) -> float | None:
    """Probability that a true case scores higher than a false one, ties counting half; None without both kinds."""
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(truths, dtype=bool)
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # equal scores share the mean of their ranks
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def reliability_bins(confidence: Array, right: Array) -> tuple[ReliabilityBin, ...]:
    """Per bin of confidence that is not empty: mean confidence, share that was right, how many."""
    which = np.minimum((np.asarray(confidence) * BINS).astype(int), BINS - 1)
    return tuple(
        (float(confidence[which == b].mean()), float(right[which == b].mean()), int((which == b).sum()))
        for b in range(BINS)
        if (which == b).any()
    )


def calibration_error(bins: Sequence[ReliabilityBin]) -> float | None:
    """Mean distance of confidence from the share that was right, by how many (Guo et al. 2017); None without any."""
    total = sum(count for *_, count in bins)
    return sum(count * abs(said - was) for said, was, count in bins) / total if total else None


def slope(values: Sequence[float]) -> float | None:
    """Least-squares slope over 1, 2, ...; None for fewer than two."""
    if len(values) < 2:
        return None
    return float(np.polyfit(np.arange(1, len(values) + 1), np.asarray(values), 1)[0])
