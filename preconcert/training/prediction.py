"""Prediction rewards in a rollout: what was foretold, how true it was, and which tokens are paid for it.

Parts: `foretold` reads guesses and outlooks off finished episodes, `pay` brings their advantages onto training rows,
and `prediction_metrics` says how true they were and how predictable the agents are. The numbers themselves are worked
out in `credit/prediction.py`.

Advantages of predictions go to the words of `intend` and `foresee`, the task's to its policy spans; a recipe in which a
span would get both is refused. Each part of the loss has a denominator of its own: the task's is the number of its own
tokens, so that paying for predictions changes nothing about it, and predictions are weighed as a mean over theirs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from preconcert.core import Episode, Span, SpanKind, TaskLanguage, Turn
from preconcert.prompts import END_OF_PLAY
from preconcert.training.credit import Guess, Outlook, TurnKey, guess_advantages, outlook_advantages
from preconcert.training.credit.estimator import EPSILON
from preconcert.training.rows import KINDS, Row

_PAID_KINDS = (KINDS.index(SpanKind.INTEND), KINDS.index(SpanKind.FORESEE))


@dataclass(frozen=True, slots=True)
class Foretold:
    """Everything that was foretold in a rollout and can be checked."""

    guesses: tuple[Guess, ...]
    """Actions of others who had a choice."""
    outlooks: tuple[Outlook, ...]
    """Observations, where the task has fields to foretell."""


@dataclass(frozen=True, slots=True)
class _Paid:
    """The tokens of one turn that are paid for predictions. Both arrays have one entry per completion token."""

    tokens: NDArray[np.bool_]
    advantages: NDArray[np.float64]


def foretold(episodes: Sequence[Episode], language: TaskLanguage) -> Foretold:
    """What was foretold, held against what happened.

    Every turn that a model wrote counts, and every other agent that had a choice then: nobody chooses what is asked. A
    malformed turn foretells nothing. Of several steps each is a guess of its own, given the words before it; steps
    after the end are foretold rightly by the word for it.

    Args:
        episodes: finished ones.
        language: the task's vocabularies.
    """
    guesses: list[Guess] = []
    outlooks: list[Outlook] = []
    names = [slot.name for slot in language.forecast]
    for position, episode in enumerate(episodes):
        for agent, mine in episode.trajectories.items():
            for index, turn in enumerate(mine.turns):
                if not turn.completion_ids or turn.malformed:
                    continue
                key = TurnKey(position, agent, index)
                guesses += _guesses(episode, key, turn)
                after = mine.final_observation if index + 1 == len(mine.turns) else mine.turns[index + 1].observation
                fields = [s for s in turn.spans if s.kind is SpanKind.FORESEE and s.slot in names]
                if turn.forecast is not None and fields:
                    right = [turn.forecast.fields[span.slot] == after.fields[span.slot] for span in fields]
                    places = tuple((span.start, span.end) for span in fields)
                    outlooks.append(Outlook(key, episode.group, places, sum(right) / len(right)))
    return Foretold(tuple(guesses), tuple(outlooks))


def _guesses(episode: Episode, key: TurnKey, turn: Turn) -> list[Guess]:
    found: list[Guess] = []
    for intention in turn.intentions:
        theirs = episode.trajectories[intention.about].turns
        spans = [s for s in turn.spans if s.kind is SpanKind.INTEND and s.slot == intention.about]
        for ahead, (word, span) in enumerate(zip(intention.actions, spans, strict=True)):
            then = key.index + ahead
            if then < len(theirs) and len(theirs[then].observation.legal_actions) < 2:
                continue
            real = theirs[then].action if then < len(theirs) else END_OF_PLAY
            given = None if intention.distributions is None else intention.distributions[ahead]
            found.append(
                Guess(
                    key=key,
                    group=episode.group,
                    about=intention.about,
                    ahead=ahead,
                    start=span.start,
                    end=span.end,
                    probability=_probability(turn, span),
                    right=word == real,
                    true_probability=None if given is None else given.get(real, 0.0),
                    square=None if given is None else sum(p * p for p in given.values()),
                )
            )
    return found


def _probability(turn: Turn, span: Span) -> float:
    """Of the word that was written, under the distribution sampled from."""
    return float(np.exp(sum(turn.logprobs[span.start : span.end])))


def pay(
    rows: Sequence[Row], episodes: Sequence[Episode], found: Foretold, weights: tuple[float, float]
) -> tuple[list[Row], NDArray[np.float64]]:
    """Rows whose prediction words carry the policy loss with advantages of their own.

    Args:
        rows: of the episodes, built in their order; no span that is paid here carries the task's loss in them.
        episodes: the rollout.
        found: from `foretold`.
        weights: of actions and of observations; 0 leaves the kind alone.

    Returns:
        The rows, and how many of their tokens are paid and the sum of their squared advantages, for actions and for
        observations, shape (2, 2). `weigh` makes use of these once all processes' are known.
    """
    paid = _paid(episodes, found, weights)
    starts = np.cumsum([0, *(episode.steps for episode in episodes)])
    totals = np.zeros((2, 2), dtype=np.float64)
    result: list[Row] = []
    for row in rows:
        policy, advantages, logprobs = row.policy.copy(), row.advantages.copy(), row.logprobs.copy()
        for joint in np.unique(row.joint[row.joint >= 0]).tolist():
            position = int(np.searchsorted(starts, joint, side="right")) - 1
            key = TurnKey(position, row.agent, joint - int(starts[position]))
            mine = paid.get(key)
            if mine is None:
                continue
            turn = episodes[position].trajectories[row.agent].turns[key.index]
            places = np.flatnonzero(row.joint == joint)[mine.tokens]
            policy[places] = True
            advantages[places] = mine.advantages[mine.tokens]
            logprobs[places] = np.array(turn.logprobs, dtype=np.float32)[mine.tokens]
        result.append(replace(row, policy=policy, advantages=advantages, logprobs=logprobs))
        totals += _totals(result[-1], weights)
    return result, totals


def weigh(
    rows: Sequence[Row], weights: tuple[float, float], totals: NDArray[np.float64], task_tokens: int, scale: bool
) -> list[Row]:
    """Advantages of predictions as shares of a mean over their own tokens.

    The loss divides everything by the number of the task's tokens; what is paid for n tokens of predictions is
    therefore multiplied by task tokens / n.

    Args:
        rows: from `pay`.
        weights: of actions and of observations.
        totals: from `pay`, of all processes.
        task_tokens: tokens that carry the task's loss, of all processes.
        scale: divide by the root mean square of the advantages, leaving the weights.
    """
    factors = np.ones(len(KINDS) + 1, dtype=np.float64)  # kind -1 takes the last one
    for kind, weight, (count, squares) in zip(_PAID_KINDS, weights, totals.tolist(), strict=True):
        if weight and count:
            factors[kind] = task_tokens / count
            factors[kind] /= (np.sqrt(squares / count) / weight + EPSILON) if scale else 1.0
    return [replace(row, advantages=(row.advantages * factors[row.kinds]).astype(np.float32)) for row in rows]


def _totals(row: Row, weights: tuple[float, float]) -> NDArray[np.float64]:
    """Of one row, as `pay` returns them."""
    found = np.zeros((2, 2), dtype=np.float64)
    for number, (kind, weight) in enumerate(zip(_PAID_KINDS, weights, strict=True)):
        if weight:
            mine = row.advantages[row.policy & (row.kinds == kind)].astype(np.float64)
            found[number] = len(mine), (mine**2).sum()
    return found


def _paid(episodes: Sequence[Episode], found: Foretold, weights: tuple[float, float]) -> dict[TurnKey, _Paid]:
    """By turn, which of its tokens are paid and what."""
    paid: dict[TurnKey, _Paid] = {}

    def give(key: TurnKey, start: int, end: int, advantage: float) -> None:
        turn = episodes[key.episode].trajectories[key.agent].turns[key.index]
        if key not in paid:
            n = len(turn.completion_ids)
            paid[key] = _Paid(np.zeros(n, dtype=bool), np.zeros(n, dtype=np.float64))
        chosen = np.array(turn.sampled[start:end], dtype=bool)
        paid[key].tokens[start:end] = chosen
        paid[key].advantages[start:end] = np.where(chosen, advantage, 0.0)

    action, observation = weights
    if action:
        numbers = action * guess_advantages(found.guesses)
        for guess, number in zip(found.guesses, numbers.tolist(), strict=True):
            give(guess.key, guess.start, guess.end, number)
    if observation:
        numbers = observation * outlook_advantages(found.outlooks)
        for outlook, number in zip(found.outlooks, numbers.tolist(), strict=True):
            for start, end in outlook.places:
                give(outlook.key, start, end, number)
    return paid


def prediction_metrics(episodes: Sequence[Episode], found: Foretold) -> dict[str, float]:
    """How true predictions were, and how predictable the agents are. Figures without a case are left out.

    `prediction/brier` is the mean Brier score of foretold actions (1 is perfect), `prediction/accuracy` the share of
    the words that were right, `prediction/field_f1` the share of foreseen fields. `predictability/...` is in
    `predictability`.
    """
    metrics: dict[str, float] = {}
    if found.guesses:
        metrics["prediction/brier"] = float(np.mean([guess.brier for guess in found.guesses]))
        metrics["prediction/accuracy"] = float(np.mean([guess.right for guess in found.guesses]))
    if found.outlooks:
        metrics["prediction/field_f1"] = float(np.mean([outlook.share for outlook in found.outlooks]))
    return metrics | {f"predictability/{name}": value for name, value in predictability(episodes).items()}


def predictability(episodes: Sequence[Episode]) -> dict[str, float]:
    """How well others' actions could be foretold by simple means; nobody's own predictions go in.

    Should agents become predictable only because predicting is paid, these rise while returns do not.

    Returns:
        `entropy_bits`: entropy of the frequencies of an agent's actions, mean over agents;
        `copy_last`: accuracy of repeating the other's previous action (of the first step, none is right);
        `by_view`: accuracy of the other's most frequent action in all other games at the same view and inbox of the
        observer (ties to the first in the alphabet; its most frequent action altogether where no other game has that
        view);
        `by_own_view`: the same for who knows the other's own view and inbox: how much choice is left in what it does.
        Steps in which the other has no choice do not count. Empty where nobody has another.
    """
    actions: dict[str, Counter[str]] = defaultdict(Counter)
    copied: list[bool] = []
    by_view: list[tuple[Hashable, str, int, str]] = []
    by_own: list[tuple[Hashable, str, int, str]] = []
    for position, episode in enumerate(episodes):
        for other, theirs in episode.trajectories.items():
            for index, turn in enumerate(theirs.turns):
                if len(turn.observation.legal_actions) < 2:
                    continue
                actions[other][turn.action] += 1
                copied.append(index > 0 and theirs.turns[index - 1].action == turn.action)
                by_own.append((_seen(turn), other, position, turn.action))
                by_view += [
                    ((agent, _seen(mine.turns[index])), other, position, turn.action)
                    for agent, mine in episode.trajectories.items()
                    if agent != other and index < len(mine.turns)
                ]
    if not by_view:
        return {}
    return {
        "entropy_bits": float(np.mean([_entropy_bits(counts) for counts in actions.values()])),
        "copy_last": float(np.mean(copied)),
        "by_view": _frequency_accuracy(by_view, actions),
        "by_own_view": _frequency_accuracy(by_own, actions),
    }


def _seen(turn: Turn) -> Hashable:
    return (turn.observation.text, tuple((message.sender, message.payload) for message in turn.inbox))


def _entropy_bits(counts: Mapping[str, int]) -> float:
    shares = np.array(list(counts.values()), dtype=np.float64)
    shares /= shares.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def _frequency_accuracy(
    cases: Sequence[tuple[Hashable, str, int, str]], overall: Mapping[str, Counter[str]]
) -> float:
    """Cases are (what is known, about whom, in which game, what it did); each is guessed from all other games."""
    counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
    own: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for known, other, game, action in cases:
        counts[(known, other)][action] += 1
        own[(known, other, game)][action] += 1
    right = 0
    for known, other, game, action in cases:
        left = counts[(known, other)] - own[(known, other, game)]
        guess = _most_frequent(left or overall[other])
        right += guess == action
    return right / len(cases)


def _most_frequent(counts: Mapping[str, int]) -> str:
    return min(counts, key=lambda action: (-counts[action], action))
