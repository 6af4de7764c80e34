"""What a set of episodes says: success, tokens, bits, and how true the predictions were.

Every rate has its denominator beside it. A malformed turn counts as wrong in every prediction it should have made.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from preconcert.core import ConfigError, Episode, Fate, Observation, TaskLanguage, Turn
from preconcert.prompts import SpanSettings
from preconcert.training.hindsight import reward_word


@dataclass(frozen=True, slots=True)
class Measures:
    """Figures of one set of episodes. Rates are None where nothing counted towards them."""

    episodes: int
    success_rate: float | None
    success_ci95: tuple[float, float] | None
    """Wilson score interval."""
    return_mean: float
    """Mean over episodes and agents of the undiscounted return; 0 where what one wins another loses."""
    steps_mean: float
    malformed_rate: float
    """Malformed turns among all turns that a model wrote."""
    intention_accuracy: float | None
    """Foretold actions that came true, where the other agent had a choice and had been seen or heard."""
    intention_copy_last: float | None
    """The same cases guessed by repeating the other agent's previous action (which the agent may not even know)."""
    intention_chance: float | None
    """The same cases guessed uniformly among the other agent's legal actions."""
    intention_count: int
    forecast_exact_match: float | None
    """Turns whose foretold observation fields were all right."""
    forecast_copy_last: float | None
    """The same turns if nothing changed: the present fields as forecast."""
    forecast_reward_accuracy: float | None
    forecast_done_accuracy: float | None
    forecast_count: int
    message_bits_per_turn: float | None
    """Mean bits of the messages sent, under the senders' own model, per turn."""
    message_tokens_per_turn: float
    message_raw_bits_per_episode: float
    """Mean over episodes of what all agents together put into the channel, in bits without any model; a message to
    several recipients counts once."""
    message_fates: Mapping[str, float]
    """Of all messages and recipients: the share that arrived, was erased, capped or late. Empty without any."""
    generated_tokens: int
    """Completion tokens, forced ones included."""
    returns: Mapping[str, float]
    """Mean undiscounted return by role: the agent's name, or its seat where the task tells seats apart."""


def measure(
    episodes: Sequence[Episode],
    language: TaskLanguage,
    spans: SpanSettings,
    role: Callable[[Observation], str] | None = None,
    watched: Sequence[Collection[str]] | None = None,
) -> Measures:
    """All figures of a set of episodes.

    Args:
        episodes: finished ones.
        language: the task's vocabularies.
        spans: which predictions are asked for.
        role: of an agent by its first view; None takes its name.
        watched: per episode, the agents that count; None for all.

    Raises:
        ConfigError: there is no episode.
    """
    if not episodes:
        raise ConfigError("there are no episodes to measure")
    judged = [episode.success for episode in episodes if episode.success is not None]
    counted = [
        (episode, agent)
        for episode, agents in zip(episodes, watched or [e.trajectories.keys() for e in episodes], strict=True)
        for agent in episode.trajectories
        if agent in agents
    ]
    turns = [turn for episode, agent in counted for turn in episode.trajectories[agent].turns]
    written = [turn for turn in turns if turn.completion_ids]
    intentions = _Tally()
    forecasts = _Tally()
    rewards, ends = _Tally(), _Tally()
    paid: dict[str, list[float]] = defaultdict(list)
    for episode, agent in counted:
        _count_intentions(episode, agent, spans, intentions)
        _count_forecasts(episode, agent, language, spans, forecasts, rewards, ends)
        mine = episode.trajectories[agent]
        paid[agent if role is None else role(mine.turns[0].observation)].append(mine.total_reward)
    said = [turn.message for turn in turns if turn.message is not None]
    returns = [episode.trajectories[agent].total_reward for episode, agent in counted]
    return Measures(
        episodes=len(episodes),
        success_rate=sum(judged) / len(judged) if judged else None,
        success_ci95=wilson(sum(judged), len(judged)) if judged else None,
        return_mean=sum(returns) / len(returns),
        steps_mean=sum(e.steps for e in episodes) / len(episodes),
        malformed_rate=sum(turn.malformed for turn in written) / len(written) if written else 0.0,
        intention_accuracy=intentions.rate("right"),
        intention_copy_last=intentions.rate("copy"),
        intention_chance=intentions.rate("chance"),
        intention_count=intentions.count,
        forecast_exact_match=forecasts.rate("right"),
        forecast_copy_last=forecasts.rate("copy"),
        forecast_reward_accuracy=rewards.rate("right"),
        forecast_done_accuracy=ends.rate("right"),
        forecast_count=forecasts.count,
        message_bits_per_turn=sum(m.bits for m in said) / len(turns) if written and spans.say else None,
        message_tokens_per_turn=sum(m.tokens for m in said) / len(turns),
        message_raw_bits_per_episode=_bits_sent(counted) / len(episodes),
        message_fates=_fates(counted),
        generated_tokens=sum(len(turn.completion_ids) for turn in turns),
        returns={name: sum(found) / len(found) for name, found in sorted(paid.items())},
    )


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), 95% by default."""
    if trials == 0:
        return (0.0, 1.0)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def _bits_sent(counted: Sequence[tuple[Episode, str]]) -> float:
    """Each message once."""
    return sum(
        sum({each.sent_at: each.bits for each in episode.deliveries if each.sender == agent}.values())
        for episode, agent in counted
    )


def _fates(counted: Sequence[tuple[Episode, str]]) -> dict[str, float]:
    fates = Counter(each.fate for episode, agent in counted for each in episode.deliveries if each.sender == agent)
    return {fate.value: fates[fate] / fates.total() for fate in Fate} if fates else {}


class _Tally:
    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, float] = {}

    def add(self, **scores: float) -> None:
        self.count += 1
        for name, score in scores.items():
            self.sums[name] = self.sums.get(name, 0.0) + score

    def rate(self, name: str) -> float | None:
        return self.sums.get(name, 0.0) / self.count if self.count else None


def perceived(turn: Turn, other: str) -> bool:
    """Has the writer of this turn seen or heard the other agent?"""
    return other in turn.observation.sees or any(message.sender == other for message in turn.inbox)


def _count_intentions(episode: Episode, agent: str, spans: SpanSettings, tally: _Tally) -> None:
    if not spans.intend:
        return
    for index, turn in enumerate(episode.trajectories[agent].turns):
        if not turn.completion_ids:
            continue
        guesses = {intention.about: intention.actions for intention in turn.intentions}
        for other, theirs in episode.trajectories.items():
            if other == agent or not perceived(turn, other):
                continue
            choices = theirs.turns[index].observation.legal_actions
            if len(choices) < 2:
                continue
            real = theirs.turns[index].action
            guess = guesses.get(other, ("",))[0]
            before = theirs.turns[index - 1].action if index else ""
            tally.add(right=guess == real, copy=before == real, chance=1.0 / len(choices))


def _count_forecasts(
    episode: Episode,
    agent: str,
    language: TaskLanguage,
    spans: SpanSettings,
    fields: _Tally,
    rewards: _Tally,
    ends: _Tally,
) -> None:
    if not spans.foresee:
        return
    mine = episode.trajectories[agent]
    for index, turn in enumerate(mine.turns):
        if not turn.completion_ids:
            continue
        last = index + 1 == len(mine.turns)
        after = mine.final_observation if last else mine.turns[index + 1].observation
        guess = turn.forecast
        names = [slot.name for slot in language.forecast]
        if names:
            fields.add(
                right=guess is not None and all(guess.fields.get(n) == after.fields[n] for n in names),
                copy=all(turn.observation.fields.get(n) == after.fields[n] for n in names),
            )
        if language.rewards:
            rewards.add(right=guess is not None and guess.reward == reward_word(turn.reward, language))
            ends.add(right=guess is not None and guess.done == last)
