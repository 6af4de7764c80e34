"""Who plays whom in a league: what a learner's games against each opponent say, and whom it meets next.

Parts: `Sampler`, `score` (one game), `updated` (a rating after some games), `chances` (whom to meet). All pure; the
population itself is in `league.py`.

A rating is the share of games that a learner wins of an opponent, a draw counting half, as a running mean. `rating`
meets opponent i with a probability that grows as (1 − rating_i)^sharpness, the prioritised fictitious self-play of
AlphaStar (Vinyals et al. 2019), mixed with a uniform floor so that nobody is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

EVEN = 0.5
"""The rating of an opponent that was not met yet."""


class Sampler(StrEnum):
    """How a learner's opponents are drawn."""

    UNIFORM = "uniform"
    """All equally often: fictitious play."""
    RATING = "rating"
    """Those more often that the learner does not beat."""


def score(own: float, other: float) -> float:
    """One game's result: 1 for the higher return, 0 for the lower, 0.5 for equal ones.

    Args:
        own: mean return of the learner's side.
        other: mean return of the opponent's side.
    """
    return 0.5 + 0.5 * float(np.sign(own - other))


def updated(rating: float, scores: Sequence[float], decay: float) -> float:
    """A running mean after a batch of games, whose order does not matter: r ← dⁿ r + (1 − dⁿ) mean(scores).

    Args:
        rating: before.
        scores: of the batch.
        decay: weight that a rating keeps over one game.
    """
    if not scores:
        return rating
    kept = decay ** len(scores)
    return kept * rating + (1.0 - kept) * float(np.mean(np.sort(scores)))


def chances(ratings: Sequence[float], sampler: Sampler, sharpness: float, floor: float) -> NDArray[np.float64]:
    """The probability of meeting each opponent.

    Args:
        ratings: the learner's, one per opponent.
        sampler: `uniform` or `rating`.
        sharpness: exponent; 0 makes `rating` uniform.
        floor: share of the games that is spread evenly, whatever the ratings.
    """
    count = len(ratings)
    even = np.full(count, 1.0 / max(1, count))
    if sampler is Sampler.UNIFORM:
        return even
    weights = (1.0 - np.asarray(ratings, dtype=np.float64)) ** sharpness
    total = float(weights.sum())
    if total <= 0.0:
        return even
    return floor * even + (1.0 - floor) * weights / total
