"""Do plans that succeed in a world model succeed in the world?

After "From Word to World" (arXiv 2512.18832): success inside the model, success of the same actions replayed in the
world, and the ratio of the two; 1 means that the model promises what the world keeps, less that it promises more.

Two kinds of plans. *Played*: the joint actions of real episodes, which the model is given from the first step on.
*Imagined*: a policy plays one agent inside the model from the first view to the end, and the model plays the others.
That agent's own actions and words are then carried out in the world, step by step as planned, while its real teammates
see and hear and do what they do. What the plan took for granted and could not know, such as a word that was imagined to
be heard, need not come true: even a perfect model of one agent's view promises no more than a share of that. So the
success of the same policy on the same instances, acting on what it really sees, stands beside it.

Parts: `Consistency` and `consistency_of` (from verdicts), `claims` (the model's verdicts on played plans),
`play_inside` (imagined ones), `Recital` (carries them out), `success_threshold` (what return counts as success; a model
foretells rewards alone).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from preconcert.core import ImaginedStep, Message, Move, Policy, Turn, TurnRequest, WorldModel, derive_seed
from preconcert.world_models.fidelity import Case
from preconcert.world_models.imagination import imagine


@dataclass(frozen=True, slots=True)
class Consistency:
    """Verdicts of a model and of the world on the same plans."""

    plans: int
    claimed: float
    """Share that succeeds in the model. A malformed imagination succeeds in nothing."""
    kept: float
    """Share that succeeds in the world."""
    agreement: float
    """Share on which both say the same; a malformed imagination agrees with nothing."""
    trusted: float | None
    """Among the plans that succeed in the model, the share that succeeds in the world; None where none does."""

    @property
    def ratio(self) -> float | None:
        """Success in the world ÷ success in the model; None where nothing succeeds in the model."""
        return self.kept / self.claimed if self.claimed else None


def consistency_of(claimed: Sequence[bool | None], kept: Sequence[bool]) -> Consistency:
    """From the verdicts on each plan.

    Args:
        claimed: the model's; None where its imagination was malformed.
        kept: the world's.
    """
    if not claimed or len(claimed) != len(kept):
        raise ValueError(f"{len(claimed)} verdicts of a model and {len(kept)} of the world")
    trusted = [real for said, real in zip(claimed, kept, strict=True) if said]
    return Consistency(
        len(claimed),
        len(trusted) / len(claimed),
        sum(kept) / len(kept),
        sum(said == real for said, real in zip(claimed, kept, strict=True)) / len(claimed),
        sum(trusted) / len(trusted) if trusted else None,
    )


def success_threshold(returns: Sequence[float], successes: Sequence[bool]) -> float:
    """The return above which an episode counts as a success: what tells real ones apart with the fewest mistakes.

    Args:
        returns: of real episodes.
        successes: were they solved?
    """
    levels = sorted(set(returns))
    middles = [(one + two) / 2 for one, two in zip(levels, levels[1:], strict=False)]
    between = [levels[0] - 1.0, *middles, levels[-1] + 1.0]
    values, truth = np.asarray(returns), np.asarray(successes, dtype=bool)
    # With equally many mistakes the middle one of the thresholds leaves most room.
    mistakes = [int(((values > place) != truth).sum()) for place in between]
    best = [place for place, count in zip(between, mistakes, strict=True) if count == min(mistakes)]
    return float(best[len(best) // 2])


def claims(model: WorldModel, cases: Sequence[Case], threshold: float, seed: int = 0) -> list[bool | None]:
    """What a model says of played plans, the others' actions given.

    Args:
        model: is asked.
        cases: from the first step of their episodes.
        threshold: the return above which an episode is a success.
        seed: everything random follows from it.

    Returns:
        Per case: does it succeed? None where the imagination is malformed.
    """
    found = imagine(
        model, [case.request for case in cases], [case.past for case in cases], [case.moves for case in cases], 1, seed
    )
    return [_verdict(each.samples[0], threshold) for each in found]


@dataclass(frozen=True, slots=True)
class PlayedInside:
    """An episode that a policy played in a model."""

    moves: tuple[Move, ...]
    """What the agent itself did and said, step by step."""
    path: tuple[ImaginedStep, ...]
    claimed: bool | None
    """Did it succeed there? None where the imagination is malformed."""


def play_inside(
    model: WorldModel, policy: Policy, requests: Sequence[TurnRequest], horizon: int, threshold: float, seed: int = 0
) -> list[PlayedInside]:
    """Let a policy play one agent each inside a model, which plays the others.

    Args:
        model: takes the world's place.
        policy: decides for the agents of the requests.
        requests: first moments of episodes.
        horizon: steps at the most.
        threshold: the return above which an episode is a success.
        seed: everything random follows from it.
    """
    renamed = [replace(each, episode=f"{each.episode}/inside/{each.agent}") for each in requests]
    beliefs = model.begin(renamed, [()] * len(renamed))
    live = list(range(len(renamed)))
    paths: list[list[ImaginedStep]] = [[] for _ in renamed]
    own: list[list[Move]] = [[] for _ in renamed]
    for step in range(horizon):
        if not live:
            break
        asked = [
            replace(renamed[place], seed=derive_seed(seed, "turn", renamed[place].episode, step)) for place in live
        ]
        turns = policy.decide(asked)
        moves = [Move(turn.action, None if turn.message is None else turn.message.payload) for turn in turns]
        seeds = [derive_seed(seed, "world", each.episode, step) for each in asked]
        answers = model.advance([beliefs[place] for place in live], moves, seeds)
        following = []
        for place, move, answer in zip(live, moves, answers, strict=True):
            paths[place].append(answer)
            own[place].append(move)
            if answer.malformed or answer.observation is None:
                continue
            if not answer.done:
                beliefs[place] = answer.belief
                renamed[place] = replace(renamed[place], observation=answer.observation, inbox=answer.inbox)
                following.append(place)
        live = following
    for request in renamed:
        policy.finish(request.episode)
        model.finish(request.episode)
    return [
        PlayedInside(tuple(done), tuple(path), _verdict(path, threshold))
        for done, path in zip(own, paths, strict=True)
    ]


class Recital:
    """A `Policy` that carries out plans whatever it sees; all other agents are another policy's.

    After a plan's end, and where its action is not legal, it takes the task's default action and says nothing.

    Args:
        policy: decides for the others.
        plans: by episode the agent and its moves.
    """

    def __init__(self, policy: Policy, plans: Mapping[str, tuple[str, Sequence[Move]]]) -> None:
        self.policy = policy
        self.plans = dict(plans)
        self.version = policy.version

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn per request, in order."""
        free = [request for request in requests if not self._planned(request)]
        others = iter(self.policy.decide(free)) if free else iter(())
        return [self._recite(request) if self._planned(request) else next(others) for request in requests]

    def finish(self, episode: str) -> None:
        """The episode is over."""
        self.policy.finish(episode)

    def _planned(self, request: TurnRequest) -> bool:
        return request.episode in self.plans and self.plans[request.episode][0] == request.agent

    def _recite(self, request: TurnRequest) -> Turn:
        step, legal = request.observation.step, request.observation.legal_actions
        moves = self.plans[request.episode][1]
        default = request.language.default_action
        move = moves[step] if step < len(moves) else Move(default)
        known = move.action in legal
        action = move.action if known else default if default in legal else legal[0]
        message = None
        if known and move.message is not None and request.others:
            words = len(move.message.split())
            message = Message(request.agent, request.others, move.message, 0.0, words, step)
        return Turn(
            request.agent, step, request.observation, request.inbox, (), (), (), (), (), (), None, message, action,
            False, 0.0,
        )  # fmt: skip


def _verdict(path: Sequence[ImaginedStep], threshold: float) -> bool | None:
    if any(step.malformed for step in path):
        return None
    return sum(step.reward for step in path) > threshold
