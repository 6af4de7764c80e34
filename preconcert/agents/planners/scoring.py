"""What imagined futures are worth: lambda-returns, their mean and spread, and how much samples disagree.

The lambda-return is that of Dreamer (Hafner et al. 2020, equations 5 and 6):
`G_t = r_t + gamma * ((1 - lam) * v_t + lam * G_{t+1})`, with `v_t` the value after step t and `G` of the last step
`r + gamma * v`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

from preconcert.agents.planners.settings import ScoreSettings
from preconcert.core import GrammarError, ImaginedStep, Observation, TaskLanguage, View


def lambda_return(
    rewards: Sequence[float], values: Sequence[float | None], gamma: float, lam: float, end: float | None = None
) -> float:
    """The return of one imagined future.

    Args:
        rewards: step by step.
        values: after each step; where the model has none, the return goes on undivided.
        gamma: discount per step.
        lam: 0 stops at the first value, 1 at the last one.
        end: a value after the last step, where the model has none.
    """
    last = values[-1] if values[-1] is not None else end
    total = 0.0 if last is None else last
    for step in range(len(rewards) - 1, -1, -1):
        value = values[step]
        if step < len(rewards) - 1 and value is not None:
            total = (1 - lam) * value + lam * total
        total = rewards[step] + gamma * total
    return total


def worst_return(language: TaskLanguage, steps: int, gamma: float) -> float:
    """The least that `steps` further steps can pay; the episode may also end before. 0 where rewards are not known."""
    if not language.rewards:
        return 0.0
    least = min(float(word) for word in language.rewards)
    discounted = sum(gamma**step for step in range(max(steps, 1)))
    return min(least, least * discounted)


def return_of(
    steps: Sequence[ImaginedStep], settings: ScoreSettings, worst: float, end: float | None = None
) -> float:
    """What a future is worth; a malformed one is worth the least that is possible, never more than what it pays."""
    if steps[-1].malformed:
        return worst
    return lambda_return(
        [step.reward for step in steps], [step.value for step in steps], settings.gamma, settings.lam, end
    )


def mean_and_spread(returns: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of these samples, not of what they were drawn from)."""
    mean = sum(returns) / len(returns)
    return mean, math.sqrt(sum((each - mean) ** 2 for each in returns) / len(returns))


def disagreement(futures: Sequence[Sequence[ImaginedStep]], view: View | None) -> float:
    """Share of the view's fields on which the samples of a candidate do not all agree, averaged over steps.

    A malformed step agrees with nothing. Steps that fewer than two samples reach tell nothing.
    """
    shares: list[float] = []
    for depth in range(max((len(steps) for steps in futures), default=0)):
        reached = [steps[depth] for steps in futures if len(steps) > depth]
        if len(reached) < 2:
            break
        views = [step.observation for step in reached if step.observation is not None and not step.malformed]
        shares.append(1.0 if len(views) < len(reached) else differing(views, view))
    return sum(shares) / len(shares) if shares else 0.0


def differing(views: Sequence[Observation], view: View | None) -> float:
    """Share of fields, or of words where a view has none, that are not the same in all of these views."""
    texts = {observation.text for observation in views}
    if len(texts) < 2:
        return 0.0
    columns = list(zip_longest(*(values_of(text, view) for text in texts)))
    return sum(len(set(column)) > 1 for column in columns) / len(columns)


def view_error(imagined: Observation | None, real: Observation, view: View | None) -> float:
    """Mean squared difference of the fields of two views; 1 for a malformed one. Words that differ count 1."""
    if imagined is None:
        return 1.0
    if imagined.text == real.text:
        return 0.0
    pairs = list(zip_longest(values_of(imagined.text, view), values_of(real.text, view)))
    if view is None:
        return sum(one != other for one, other in pairs) / len(pairs)
    if len(pairs) != len(view.fields) or any(None in pair for pair in pairs):
        return 1.0
    return sum(field.error(one, other) for field, (one, other) in zip(view.fields, pairs, strict=True)) / len(pairs)


def values_of(text: str, view: View | None) -> tuple[str, ...]:
    """A view's fields; its words where the task does not say what it consists of, or the text is none of its views."""
    if view is not None:
        try:
            return view.parse(text)
        except GrammarError:
            pass  # the last view of some tasks is no ordinary one
    return tuple(text.split())
