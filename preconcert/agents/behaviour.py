"""A policy asked instead of watched: with what probability does a team take each action at a given view?

Parts: `Behaviour`, `behaviour`. Where a turn is nothing but its action, the model is asked and the answer is exact;
where other spans come first, or decoding is free, the action depends on what is written before it, and turns are
sampled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from preconcert.agents.team import GenerativeTeam
from preconcert.core import ConfigError, TurnRequest, derive_seed
from preconcert.models import ScoreRequest
from preconcert.prompts import TurnContent


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Action probabilities at some views."""

    actions: tuple[dict[str, float], ...]
    """Per view: the probability of each legal action."""
    samples: int | None
    """Turns sampled at each view; None where the probabilities are the model's own."""


def behaviour(team: GenerativeTeam, requests: Sequence[TurnRequest], samples: int = 1000) -> Behaviour:
    """How likely each legal action is.

    Args:
        team: as it would play, at its temperature.
        requests: the views; their names of episodes do not matter.
        samples: turns per view where the model cannot be asked.

    Raises:
        ConfigError: the team remembers, so that its actions follow from more than what it sees.
    """
    settings = team.settings
    if settings.remembers:
        raise ConfigError("a team that remembers earlier turns has no probabilities of its actions at a single view")
    spans = settings.spans
    first = (
        (spans.intend and any(request.others for request in requests))
        or (spans.foresee and bool(team.language.forecast or team.language.rewards))
        or bool(spans.say and team.format.speech.slots)
    )
    if team.temperature == 0.0:
        return Behaviour(_sampled(team, requests, 1), None)
    if first or not settings.constrained or team.temperature != 1.0:  # temperatures act on tokens, not on actions
        return Behaviour(_sampled(team, requests, samples), samples)
    return Behaviour(_asked(team, requests), None)


def _asked(team: GenerativeTeam, requests: Sequence[TurnRequest]) -> tuple[dict[str, float], ...]:
    scores: list[ScoreRequest] = []
    for request in requests:
        legal = request.observation.legal_actions
        prompt = team.format.prompt_ids(request.agent, request.observation, request.inbox, request.others)
        for action in legal:
            written = team.format.write(TurnContent(action), request.others, legal)
            automaton = team.format.automaton(request.others, legal)
            scores.append(ScoreRequest(prompt, written.ids, team.adapter_of(request), automaton))
    logprobs = iter([sum(found) for found in team.model.score(scores)])
    actions: list[dict[str, float]] = []
    for request in requests:
        actions.append({action: math.exp(next(logprobs)) for action in request.observation.legal_actions})
    return tuple(actions)


def _sampled(team: GenerativeTeam, requests: Sequence[TurnRequest], samples: int) -> tuple[dict[str, float], ...]:
    actions: list[dict[str, float]] = []
    for number, request in enumerate(requests):
        asked = [
            replace(request, episode=f"{number}/{sample}", seed=derive_seed(request.seed, "behaviour", number, sample))
            for sample in range(samples)
        ]
        taken = Counter(turn.action for turn in team.decide(asked))
        for each in asked:
            team.finish(each.episode)
        actions.append({action: taken[action] / samples for action in request.observation.legal_actions})
    return tuple(actions)
