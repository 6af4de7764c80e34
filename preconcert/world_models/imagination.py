"""Open-loop imagination: a batch of plans rolled in a world model, several samples each, one call per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from preconcert.core import (
    GrammarError,
    ImaginedStep,
    Move,
    Observation,
    Turn,
    TurnRequest,
    View,
    WorldModel,
    derive_seed,
)


@dataclass(frozen=True, slots=True)
class Imagination:
    """What a model says one plan leads to."""

    plan: tuple[Move, ...]
    samples: tuple[tuple[ImaginedStep, ...], ...]
    """One path per sample. A path is shorter than the plan where the model says that the episode is over, or where it
    wrote something that is no step."""
    disagreement: tuple[float, ...]
    """Per step of the plan the share of the view's fields on which two samples differ, mean over pairs; 0 for a single
    sample. A path that is over keeps its last view; a malformed one differs from every other everywhere."""

    @property
    def returns(self) -> tuple[float, ...]:
        """The sum of the imagined rewards of each sample."""
        return tuple(sum(step.reward for step in path) for path in self.samples)

    @property
    def malformed(self) -> float:
        """The share of samples that end malformed."""
        return sum(bool(path) and path[-1].malformed for path in self.samples) / len(self.samples)


def imagine(
    model: WorldModel,
    requests: Sequence[TurnRequest],
    pasts: Sequence[Sequence[Turn]],
    plans: Sequence[Sequence[Move]],
    samples: int = 1,
    seed: int = 0,
) -> list[Imagination]:
    """Roll plans from present moments.

    Args:
        model: the world model.
        requests: the moments.
        pasts: the agents' earlier turns.
        plans: one sequence of moves per moment; with `Move.others` they are given, without the model imagines them.
        samples: paths per plan.
        seed: everything random follows from it, the episode's name, the agent, the sample and the step.

    Returns:
        One per request, in order.
    """
    beliefs = model.begin(requests, pasts)
    paths: list[list[list[ImaginedStep]]] = [[[] for _ in range(samples)] for _ in requests]
    live = [
        (number, sample, belief) for number, belief in enumerate(beliefs) for sample in range(samples) if plans[number]
    ]
    step = 0
    while live:
        seeds = [
            derive_seed(seed, requests[number].episode, requests[number].agent, sample, step)
            for number, sample, _ in live
        ]
        answers = model.advance([belief for *_, belief in live], [plans[number][step] for number, *_ in live], seeds)
        following = []
        step += 1
        for (number, sample, _), answer in zip(live, answers, strict=True):
            paths[number][sample].append(answer)
            if not (answer.done or answer.malformed) and step < len(plans[number]):
                following.append((number, sample, answer.belief))
        live = following
    return [
        Imagination(
            tuple(plan),
            tuple(tuple(path) for path in mine),
            tuple(disagreement([_shown(path, at) for path in mine], request.language.view) for at in range(len(plan))),
        )
        for request, plan, mine in zip(requests, plans, paths, strict=True)
    ]


def disagreement(steps: Sequence[ImaginedStep], view: View | None) -> float:
    """The share of fields on which two of these steps differ, mean over pairs.

    Args:
        steps: what different samples say of the same moment.
        view: of the task. Without one, words at the same place are compared.
    """
    if len(steps) < 2:
        return 0.0
    values = [view_values(step, view) for step in steps]
    pairs = list(combinations(values, 2))
    return sum(_differ(one, other) for one, other in pairs) / len(pairs)


def view_values(step: ImaginedStep, view: View | None) -> tuple[str, ...] | None:
    """The values of an imagined view, its words where the task has no fields; None where it is malformed."""
    if step.malformed or step.observation is None:
        return None
    return parse_view(step.observation, view)


def parse_view(observation: Observation, view: View | None) -> tuple[str, ...] | None:
    """The values of a view's text, its words where the task has no fields; None where they do not fit."""
    if view is None:
        return tuple(observation.text.split())
    try:
        return view.parse(observation.text)
    except GrammarError:
        return None


def _differ(one: tuple[str, ...] | None, other: tuple[str, ...] | None) -> float:
    if one is None or other is None:
        return 1.0
    longer = max(len(one), len(other), 1)
    return 1 - sum(a == b for a, b in zip(one, other, strict=False)) / longer


def _shown(path: Sequence[ImaginedStep], at: int) -> ImaginedStep:
    return path[min(at, len(path) - 1)]
