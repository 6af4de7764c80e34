"""The floor under every learned world model: nothing changes, and counting.

`CopyLast` says that the next view is the present one; it is fitted only to know the commonest reward, how often each
field changes and what the others are wont to do. `CountTable` counts what followed each (view, own action, others'
actions) and falls back step by step on coarser contexts and at last on `CopyLast`'s field probabilities; the weight of
a context is that of Witten & Bell (1991): n / (n + number of different outcomes seen there).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from preconcert.core import (
    Episode,
    ImaginedStep,
    Judgement,
    Move,
    Outcome,
    TaskLanguage,
    Turn,
    TurnRequest,
)
from preconcert.world_models.experience import Lived, Moment, Setting, Values, lived_by


@dataclass(frozen=True, slots=True)
class _Belief:
    moment: Moment
    did: tuple[str | None, ...]
    """What each other agent did last, where it is known."""


class CopyLast:
    """The next view is the present one, the others do what they did last, the commonest reward is paid, nothing ends.

    What it says is always the same; its probabilities are those of how often that was true in the episodes.

    Args:
        episodes: what it is fitted to.
        language: of the task.

    Raises:
        ConfigError: no episodes, or a task without a view.
    """

    def __init__(self, episodes: Sequence[Episode], language: TaskLanguage) -> None:
        self.setting = Setting.of(episodes, language)
        lives = lived_by(episodes, self.setting.view)
        self._stays = _stays(lives, len(self.setting.view.fields))
        self._rewards = _shares([reward for life in lives for reward in life.rewards], self.setting.rewards)
        self._reward = max(self._rewards, key=lambda reward: self._rewards[reward])
        steps = sum(life.steps for life in lives)
        self._ends = (sum(life.ended for life in lives) + 1) / (steps + 2)
        self._habits, self._repeats = _habits(lives, self.setting)

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        """The present views."""
        return [_Belief(Moment.of(each, self.setting.view), (None,) * len(each.others)) for each in requests]

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        """The same again."""
        return [self._advance(belief, move) for belief, move in zip(beliefs, moves, strict=True)]

    def judge(
        self, beliefs: Sequence[Any], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        """By how often each field stayed as it was, and how often each reward and each action occurred."""
        return [self._judge(belief, outcome) for belief, outcome in zip(beliefs, outcomes, strict=True)]

    def finish(self, episode: str) -> None:
        """Nothing is held."""

    def copied(self, before: Values, after: Values) -> float:
        """The probability of a view after another one."""
        return math.prod(self.field_copied(f, before[f], after[f]) for f in range(len(before)))

    def field_copied(self, field: int, before: str, after: str) -> float:
        """The probability of one field's value after another one."""
        count = len(self.setting.view.fields[field].choices)
        if count == 1:
            return 1.0
        return self._stays[field] if before == after else (1 - self._stays[field]) / (count - 1)

    def habit(self, other: str, last: str | None) -> dict[str, float]:
        """The probability of each action of an agent."""
        habits, repeats = self._habits[other], self._repeats[other]
        if last is None:
            return dict(habits)
        return {action: repeats * (action == last) + (1 - repeats) * share for action, share in habits.items()}

    def _advance(self, belief: _Belief, move: Move) -> ImaginedStep:
        now, setting = belief.moment, self.setting
        others = dict(move.others) if move.others is not None else {}
        for other, last in zip(now.others, belief.did, strict=True):
            if other not in others:
                habit = self._habits[other]
                others[other] = last if last is not None else max(habit, key=lambda action: habit[action])
        after = replace(now, step=now.step + 1)
        return ImaginedStep(
            setting.observation(now.agent, after.values, after.step),
            setting.inbox(now.agent, after.heard, after.others, after.step),
            others,
            self._reward,
            False,
            None,
            _Belief(after, tuple(others[other] for other in now.others)),
        )

    def _judge(self, belief: _Belief, outcome: Outcome) -> Judgement:
        now = belief.moment
        after = self.setting.view.parse(outcome.observation.text)
        return Judgement(
            -math.log(self.copied(now.values, after)),
            self._rewards[self.setting.rewards[self.setting.reward_index(outcome.reward)]],
            self._ends,
            {other: self.habit(other, last) for other, last in zip(now.others, belief.did, strict=True)},
        )


class BackOff:
    """Counts of outcomes in contexts from fine to coarse, mixed by Witten & Bell's weights."""

    def __init__(self) -> None:
        self._counts: list[dict[Hashable, Counter[Any]]] = []

    def add(self, contexts: Sequence[Hashable], outcome: Any) -> None:
        """One occurrence, in all of its contexts, the finest first."""
        while len(self._counts) < len(contexts):
            self._counts.append(defaultdict(Counter))
        for level, context in zip(self._counts, contexts, strict=True):
            level[context][outcome] += 1

    def probability(self, contexts: Sequence[Hashable], outcome: Any, base: float) -> float:
        """Of an outcome that has probability `base` where no context is known."""
        found = base
        for level, context in reversed(list(zip(self._counts, contexts, strict=False))):
            counts = level.get(context)
            if counts is not None:
                total, kinds = counts.total(), len(counts)
                found = (counts[outcome] + kinds * found) / (total + kinds)
        return found

    def draw(self, contexts: Sequence[Hashable], rng: np.random.Generator) -> Any:
        """An outcome by these probabilities; None where the draw falls on the base."""
        for level, context in zip(self._counts, contexts, strict=False):
            counts = level.get(context)
            if counts is None:
                continue
            total, kinds = counts.total(), len(counts)
            place = rng.random() * (total + kinds)
            for outcome, count in counts.items():
                place -= count
                if place < 0:
                    return outcome
        return None

    def best(self, contexts: Sequence[Hashable]) -> Any:
        """The commonest outcome in the finest context that is known; None where none is."""
        for level, context in zip(self._counts, contexts, strict=False):
            counts = level.get(context)
            if counts is not None:
                return counts.most_common(1)[0][0]
        return None

    def pick(self, contexts: Sequence[Hashable], rng: np.random.Generator | None) -> Any:
        """`draw` with a generator, `best` without."""
        return self.best(contexts) if rng is None else self.draw(contexts, rng)


class CountTable:
    """What followed before follows again.

    Next views: by (view, own action, others' actions), by (view, own action), then each field by itself by (value, own
    action) and by value, then as `CopyLast`. Others' actions: by (view, words heard), by words heard, overall. Reward
    and end: by the next view, then by naive Bayes over its fields. Values: mean sums of later rewards by next view,
    shrunk towards the average of its fields' means. Words heard next: by (action of the speaker, its last words), by
    action.

    Args:
        episodes: what is counted.
        language: of the task.
        greedy: say the commonest instead of drawing; its probabilities stay the same.

    Raises:
        ConfigError: no episodes, or a task without a view.
    """

    def __init__(self, episodes: Sequence[Episode], language: TaskLanguage, greedy: bool = False) -> None:
        self.greedy = greedy
        self._floor = CopyLast(episodes, language)
        self.setting = self._floor.setting
        self._views, self._fields = BackOff(), BackOff()
        self._acts, self._words, self._ends = BackOff(), BackOff(), BackOff()
        lives = lived_by(episodes, self.setting.view)
        for life in lives:
            self._count(life)
        self._bayes = _NaiveBayes(lives, self.setting)
        self._values = _FieldMeans(lives)

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        """The present views and inboxes."""
        return [Moment.of(each, self.setting.view) for each in requests]

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        """Drawn from the counts."""
        return [
            self._advance(belief, move, None if self.greedy else np.random.default_rng(seed))
            for belief, move, seed in zip(beliefs, moves, seeds, strict=True)
        ]

    def judge(
        self, beliefs: Sequence[Any], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        """The probabilities that `advance` draws by."""
        return [
            self._judge(belief, move, outcome) for belief, move, outcome in zip(beliefs, moves, outcomes, strict=True)
        ]

    def finish(self, episode: str) -> None:
        """Nothing is held."""

    def _count(self, life: Lived) -> None:
        for t in range(life.steps):
            before, after, action, theirs = life.views[t], life.views[t + 1], life.actions[t], life.theirs[t]
            self._views.add(((before, action, theirs), (before, action)), after)
            for f, (old, new) in enumerate(zip(before, after, strict=True)):
                self._fields.add(_field_contexts(f, old, action), new)
            for number, other in enumerate(life.others):
                self._acts.add(_act_contexts(other, before, life.heard[t][number]), theirs[number])
                if t + 1 < life.steps:
                    contexts = _word_contexts(other, theirs[number], life.heard[t][number])
                    self._words.add(contexts, life.heard[t + 1][number])
            end = (self.setting.reward_index(life.rewards[t]), life.ended and t + 1 == life.steps)
            self._ends.add((after,), end)

    def _advance(self, now: Moment, move: Move, rng: np.random.Generator | None) -> ImaginedStep:
        setting, others = self.setting, dict(move.others or {})
        for other, words in zip(now.others, now.heard, strict=True):
            if other not in others:
                drawn = self._acts.pick(_act_contexts(other, now.values, words), rng)
                others[other] = drawn if drawn is not None else _uniform(setting.language.actions, rng)
        theirs = tuple(others[other] for other in now.others)
        after = self._views.pick(_view_contexts(now.values, move.action, theirs), rng)
        if after is None:
            after = tuple(self._next_value(f, old, move.action, rng) for f, old in enumerate(now.values))
        end = self._ends.pick((after,), rng)
        if end is None:
            end = self._bayes.pick(after, rng)
        reward, done = setting.rewards[end[0]], bool(end[1])
        heard = []
        for other, words, did in zip(now.others, now.heard, theirs, strict=True):
            said = self._words.pick(_word_contexts(other, did, words), rng)
            heard.append(words if said is None else said)
        then = Moment(now.agent, now.others, now.step + 1, after, tuple(heard))
        return ImaginedStep(
            setting.observation(now.agent, after, then.step),
            setting.inbox(now.agent, heard, now.others, then.step),
            others,
            reward,
            done,
            0.0 if done else self._values.mean(after),
            then,
        )

    def _next_value(self, field: int, old: str, action: str, rng: np.random.Generator | None) -> str:
        drawn = self._fields.pick(_field_contexts(field, old, action), rng)
        if drawn is not None:
            return drawn
        if rng is None:
            return old
        choices = self.setting.view.fields[field].choices
        shares = [self._floor.field_copied(field, old, choice) for choice in choices]
        return choices[int(rng.choice(len(choices), p=np.array(shares) / sum(shares)))]

    def _judge(self, now: Moment, move: Move, outcome: Outcome) -> Judgement:
        after = self.setting.view.parse(outcome.observation.text)
        theirs = tuple(outcome.others[other] for other in now.others)
        loose = math.prod(
            self._fields.probability(
                _field_contexts(f, old, move.action), new, self._floor.field_copied(f, old, new)
            )
            for f, (old, new) in enumerate(zip(now.values, after, strict=True))
        )
        seen = self._views.probability(_view_contexts(now.values, move.action, theirs), after, loose)
        ends = self._bayes.probabilities(after)
        exact = {end: self._ends.probability((after,), end, base) for end, base in ends.items()}
        paid = self.setting.reward_index(outcome.reward)
        actions = self.setting.language.actions
        return Judgement(
            -math.log(seen),
            sum(share for (reward, _), share in exact.items() if reward == paid),
            sum(share for (_, done), share in exact.items() if done),
            {
                other: {
                    action: self._acts.probability(_act_contexts(other, now.values, words), action, 1 / len(actions))
                    for action in actions
                }
                for other, words in zip(now.others, now.heard, strict=True)
            },
        )


class _NaiveBayes:
    """P(reward, end | next view), fields taken as independent given the class, counts smoothed by one half."""

    def __init__(self, lives: Sequence[Lived], setting: Setting) -> None:
        self._sizes = [len(field.choices) for field in setting.view.fields]
        self._classes: Counter[tuple[int, bool]] = Counter()
        self._held: dict[tuple[int, bool], list[Counter[str]]] = {}
        for life in lives:
            for t in range(life.steps):
                end = (setting.reward_index(life.rewards[t]), life.ended and t + 1 == life.steps)
                self._classes[end] += 1
                held = self._held.setdefault(end, [Counter() for _ in self._sizes])
                for counts, value in zip(held, life.views[t + 1], strict=True):
                    counts[value] += 1

    def probabilities(self, values: Values) -> dict[tuple[int, bool], float]:
        """By class."""
        scores = {
            end: math.log(count)
            + sum(
                math.log((counts[value] + 0.5) / (count + 0.5 * size))
                for counts, value, size in zip(self._held[end], values, self._sizes, strict=True)
            )
            for end, count in self._classes.items()
        }
        top = max(scores.values())
        weights = {end: math.exp(score - top) for end, score in scores.items()}
        total = sum(weights.values())
        return {end: weight / total for end, weight in weights.items()}

    def pick(self, values: Values, rng: np.random.Generator | None) -> tuple[int, bool]:
        """One class, the likeliest without a generator."""
        shares = self.probabilities(values)
        if rng is None:
            return max(shares, key=lambda end: shares[end])
        ends = list(shares)
        return ends[int(rng.choice(len(ends), p=np.array(list(shares.values()))))]


class _FieldMeans:
    """Mean sums of later rewards by view, shrunk by one pseudo-count towards the average over fields."""

    def __init__(self, lives: Sequence[Lived]) -> None:
        self._exact: dict[Hashable, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._all = [0.0, 0.0]
        for life in lives:
            for values, to_go in zip(life.views[1:], life.to_go, strict=True):
                for key in (values, *enumerate(values)):
                    self._exact[key][0] += to_go
                    self._exact[key][1] += 1
                self._all[0] += to_go
                self._all[1] += 1

    def mean(self, values: Values) -> float:
        """Expected sum of the rewards from this view on."""
        overall = self._all[0] / max(1.0, self._all[1])
        fields = [self._shrunk((f, value), overall) for f, value in enumerate(values)]
        return self._shrunk(values, sum(fields) / len(fields))

    def _shrunk(self, key: Hashable, towards: float) -> float:
        total, count = self._exact.get(key, (0.0, 0.0))
        return (total + towards) / (count + 1)


def _view_contexts(values: Values, action: str, theirs: tuple[str, ...]) -> tuple[Hashable, ...]:
    return (values, action, theirs), (values, action)


def _field_contexts(field: int, value: str, action: str) -> tuple[Hashable, ...]:
    return (field, value, action), (field, value)


def _act_contexts(other: str, values: Values, words: str) -> tuple[Hashable, ...]:
    return (other, values, words), (other, words), other


def _word_contexts(other: str, action: str, words: str) -> tuple[Hashable, ...]:
    return (other, action, words), (other, action)


def _uniform(choices: Sequence[str], rng: np.random.Generator | None) -> str:
    return choices[0 if rng is None else int(rng.integers(len(choices)))]


def _stays(lives: Sequence[Lived], fields: int) -> list[float]:
    """How often each field is as it was before, with one pseudo-count either way."""
    same, steps = [1.0] * fields, 2.0
    for life in lives:
        steps += life.steps
        for before, after in zip(life.views, life.views[1:], strict=False):
            for f in range(fields):
                same[f] += before[f] == after[f]
    return [count / steps for count in same]


def _shares(found: Sequence[Any], choices: Sequence[Any]) -> dict[Any, float]:
    """Frequencies with one pseudo-count each."""
    counts = Counter(found)
    return {choice: (counts[choice] + 1) / (len(found) + len(choices)) for choice in choices}


def _habits(lives: Sequence[Lived], setting: Setting) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """By agent, how often it takes each action and how often the same one twice running."""
    taken: dict[str, list[str]] = {agent: [] for agent in setting.agents}
    again: Mapping[str, list[float]] = {agent: [1.0, 2.0] for agent in setting.agents}
    for life in lives:
        taken[life.agent] += life.actions
        again[life.agent][0] += sum(one == two for one, two in zip(life.actions, life.actions[1:], strict=False))
        again[life.agent][1] += max(0, life.steps - 1)
    habits = {agent: _shares(actions, setting.language.actions) for agent, actions in taken.items()}
    return habits, {agent: same / steps for agent, (same, steps) in again.items()}
