"""What every backend does alike when it chooses among options: refusing bad ones, and scoring long ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from preconcert.core import ModelError
from preconcert.models.language_model import ChoiceRequest, ScoreRequest

Score = Callable[[Sequence[ScoreRequest]], list[tuple[float, ...]]]


def check_options(request: ChoiceRequest) -> None:
    """Options are there, are different and are not empty.

    Raises:
        ModelError: they are not.
    """
    if not request.options or not all(request.options) or len(set(request.options)) < len(request.options):
        raise ModelError(f"options to choose from must be different and not empty: {request.options[:8]}")


def choose_by_score(requests: Sequence[ChoiceRequest], score: Score) -> list[tuple[float, ...]]:
    """Natural log-probabilities of each request's options among one another, every option scored by itself.

    Args:
        requests: prompts and options.
        score: of the backend; called once, for all of them.
    """
    texts = [ScoreRequest(each.prompt_ids, option, each.adapter) for each in requests for option in each.options]
    scores = iter(score(texts) if texts else ())
    answers: list[tuple[float, ...]] = []
    for each in requests:
        sums = np.array([sum(next(scores)) for _ in each.options])
        answers.append(tuple((sums - np.logaddexp.reduce(sums)).tolist()))
    return answers
