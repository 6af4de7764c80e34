"""Prediction rewards in a rollout: what was foretold, how true it was, and which tokens are paid for it.

Parts: `foretold` reads guesses and outlooks off finished episodes, `payments` says which of their tokens are paid what,
`pay` brings that onto training rows, and `prediction_metrics` says how true predictions were and how predictable the
agents are. The numbers themselves are worked out in `credit/prediction.py`.

Advantages of predictions go to the words of `intend` and `foresee` and to announced actions, the task's to its policy
spans; a recipe in which a span would get both is refused. Each part of the loss has a denominator of its own: that of
the task is the number of its own tokens, so that paying for predictions changes nothing about it, and predictions are
weighed as a mean over theirs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from preconcert.core import Episode, Span, SpanKind, TaskLanguage, TrainingError, Turn
from preconcert.prompts import END_OF_PLAY
from preconcert.training.credit import Guess, Kind, Outlook, TurnKey, guess_advantages, outlook_advantages
from preconcert.training.credit.estimator import EPSILON
from preconcert.training.hindsight import next_own_action, true_slots
from preconcert.training.rows import Row


@dataclass(frozen=True, slots=True)
class Foretold:
    """Everything that was foretold in a rollout and can be checked."""

    guesses: tuple[Guess, ...]
    """Actions of others who had a choice, and announced actions."""
    outlooks: tuple[Outlook, ...]
    """Observations, where the task has fields to foretell."""


@dataclass(frozen=True, slots=True)
class Payment:
    """The tokens of one turn that are paid for predictions. Both arrays have one entry per completion token."""

    kinds: NDArray[np.int64]
    """A `Kind`; -1 for tokens that are not paid."""
    advantages: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Payments:
    """Everything that is paid for predictions in a rollout."""

    turns: Mapping[TurnKey, Payment]
    totals: NDArray[np.float64]
    """By `Kind`: how many tokens are paid, and the sum of their squared advantages. Shape (kinds, 2); processes add
    theirs up before they pay."""


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
                guesses += _announcements(episode, key, turn, language)
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
            found.append(_guess(episode, key, turn, span, Kind.ACTION, ahead, word, real, given))
    return found


def _announcements(episode: Episode, key: TurnKey, turn: Turn, language: TaskLanguage) -> list[Guess]:
    """Announced actions of one's own; what is announced in the last turn cannot be checked."""
    mine = episode.trajectories[key.agent].turns
    real = next_own_action(mine, key.index)
    if real is None or turn.message is None:
        return []
    announced = true_slots(language)
    written = [span for span in turn.spans if span.kind is SpanKind.SAY]
    # The word that ends a message has a span, too, and is no word of it.
    return [
        _guess(episode, key, turn, span, Kind.ANNOUNCEMENT, 1, word, real, None)
        for span, word in zip(written, turn.message.written.split(), strict=False)
        if (span.kind, span.slot) in announced
    ]


def _guess(
    episode: Episode,
    key: TurnKey,
    turn: Turn,
    span: Span,
    kind: Kind,
    ahead: int,
    word: str,
    real: str,
    given: Mapping[str, float] | None,
) -> Guess:
    return Guess(
        key=key,
        group=episode.group,
        kind=kind,
        about=span.slot,
        ahead=ahead,
        start=span.start,
        end=span.end,
        probability=_probability(turn, span),
        right=word == real,
        true_probability=None if given is None else given.get(real, 0.0),
        square=None if given is None else sum(p * p for p in given.values()),
        likeliest=None if given is None else max(given, key=lambda each: given[each]) == real,
    )


def _probability(turn: Turn, span: Span) -> float:
    """Of the word that was written, under the distribution sampled from."""
    return float(np.exp(sum(turn.logprobs[span.start : span.end])))


def payments(
    episodes: Sequence[Episode], found: Foretold, weights: Sequence[float], trainable: Collection[str]
) -> Payments:
    """Which tokens are paid what.

    Args:
        episodes: the rollout.
        found: from `foretold`.
        weights: by `Kind`; 0 leaves the kind alone.
        trainable: adapters that learn; others are paid nothing.
    """
    turns: dict[TurnKey, Payment] = {}
    totals = np.zeros((len(Kind), 2), dtype=np.float64)

    def give(key: TurnKey, kind: Kind, start: int, end: int, advantage: float) -> None:
        turn = episodes[key.episode].trajectories[key.agent].turns[key.index]
        if turn.adapter not in trainable or not weights[kind]:
            return
        if key not in turns:
            n = len(turn.completion_ids)
            turns[key] = Payment(np.full(n, -1, dtype=np.int64), np.zeros(n, dtype=np.float64))
        for place in range(start, end):
            if turn.sampled[place]:
                turns[key].kinds[place], turns[key].advantages[place] = kind, advantage
                totals[kind] += 1.0, advantage**2

    for guess, number in zip(found.guesses, guess_advantages(found.guesses).tolist(), strict=True):
        give(guess.key, guess.kind, guess.start, guess.end, number)
    for outlook, number in zip(found.outlooks, outlook_advantages(found.outlooks).tolist(), strict=True):
        for start, end in outlook.places:
            give(outlook.key, Kind.OBSERVATION, start, end, number)
    return Payments(turns, totals)


def pay(
    rows: Sequence[Row],
    episodes: Sequence[Episode],
    paid: Payments,
    weights: Sequence[float],
    task_tokens: int,
    scale: bool = False,
) -> list[Row]:
    """Rows whose prediction words carry the policy loss with advantages of their own, weighed as a mean over them.

    The loss divides everything by the number of the task's tokens; what is paid for n tokens of a kind is therefore
    multiplied by task tokens / n.

    Args:
        rows: of the episodes, in their order; no token that is paid here carries the task's loss in them.
        episodes: the rollout.
        paid: from `payments`, the totals being those of all processes.
        weights: by `Kind`.
        task_tokens: tokens that carry the task's loss, of all processes.
        scale: divide by the root mean square of the kind's advantages.
    """
    factors = np.zeros(len(Kind), dtype=np.float64)
    for kind, (count, squares) in zip(Kind, paid.totals.tolist(), strict=True):
        if count:
            factors[kind] = weights[kind] * task_tokens / count
            factors[kind] /= (np.sqrt(squares / count) + EPSILON) if scale else 1.0
    starts = np.cumsum([0, *(episode.steps for episode in episodes)])
    result: list[Row] = []
    for row in rows:
        policy, advantages, logprobs = row.policy.copy(), row.advantages.copy(), row.logprobs.copy()
        for joint in np.unique(row.joint[row.joint >= 0]).tolist():
            position = int(np.searchsorted(starts, joint, side="right")) - 1
            key = TurnKey(position, row.agent, joint - int(starts[position]))
            mine = paid.turns.get(key)
            if mine is None:
                continue
            turn = episodes[position].trajectories[row.agent].turns[key.index]
            tokens = mine.kinds >= 0
            places = np.flatnonzero(row.joint == joint)[tokens]
            if policy[places].any():
                raise TrainingError(f"turn {key.index} of {key.agent!r}: tokens of predictions carry the task's loss")
            policy[places] = True
            advantages[places] = mine.advantages[tokens] * factors[mine.kinds[tokens]]
            logprobs[places] = np.array(turn.logprobs, dtype=np.float32)[tokens]
        result.append(replace(row, policy=policy, advantages=advantages, logprobs=logprobs))
    return result


def prediction_metrics(episodes: Sequence[Episode], found: Foretold) -> dict[str, float]:
    """How true predictions were, and how predictable the agents are. Figures without a case are left out.

    `prediction/brier` is the mean Brier score of foretold actions (1 is perfect), `prediction/accuracy` the share of
    the words that were right, `prediction/top` that of the actions held likeliest (where every turn holds its
    distributions), `prediction/kept_word` that of announced actions that were then taken, `prediction/field_f1` that of
    foreseen fields. `predictability/...` is in `predictability`.

    A word is sampled, so an agent that knows exactly how unsure it must be writes the likeliest action no more often
    than that: its words are right less often than its likeliest actions.
    """
    metrics: dict[str, float] = {}
    told = [guess for guess in found.guesses if guess.kind is Kind.ACTION]
    announced = [guess for guess in found.guesses if guess.kind is Kind.ANNOUNCEMENT]
    if told:
        metrics["prediction/brier"] = float(np.mean([guess.brier for guess in told]))
        metrics["prediction/accuracy"] = float(np.mean([guess.right for guess in told]))
        likeliest = [guess.likeliest for guess in told if guess.likeliest is not None]
        if len(likeliest) == len(told):
            metrics["prediction/top"] = float(np.mean(likeliest))
    if announced:
        metrics["prediction/kept_word"] = float(np.mean([guess.right for guess in announced]))
    if found.outlooks:
        metrics["prediction/field_f1"] = float(np.mean([outlook.share for outlook in found.outlooks]))
    return metrics | {f"predictability/{name}": value for name, value in predictability(episodes).items()}


def predictability(episodes: Sequence[Episode]) -> dict[str, float]:
    """How well others' actions could be foretold by simple means; nobody's own predictions go in.

    Should agents become predictable only because predicting is paid, the accuracies rise and the entropy
    falls while returns do not.

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
