"""The control for everything that a world model is good for: its own answers, given to the wrong questions."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from preconcert.core import (
    ImaginedStep,
    Judgement,
    ModelError,
    Move,
    Outcome,
    Turn,
    TurnRequest,
    WorldModel,
    derive_seed,
)

_REMEMBERED = 256
"""Answers kept for requests that are alone in their batch."""


@dataclass(frozen=True, slots=True)
class _Belief:
    own: Any
    """The inner model's belief about the moment that was really asked about."""
    episode: str
    agent: str


class _Asked(NamedTuple):
    belief: _Belief
    move: Move
    answer: Any
    """The inner model's; None where it was only to judge."""


class ShuffledWorldModel:
    """Exchanges the answers to a batch among its requests.

    Every answer has the right form and comes from the same play, but says nothing about the belief and the move that it
    is given for: no request gets the answer to its own episode, as long as no episode has more than half of the
    batch. Beyond that, requests of one episode exchange among each other, those with other moves first where there
    are some. Each belief goes on from its own hidden answer, so that later answers are no likelier to be right.

    Answers go from an agent to the same agent. This is the one world model whose answers depend on what else is in the
    batch. A request that has no other one of its agent beside it gets an earlier answer of that agent, or, if there has
    been none, the view and the rewards that another agent gets; a request all alone is then an error.

    Args:
        inner: whose answers are exchanged.
        seed: of the exchange.
    """

    def __init__(self, inner: WorldModel, seed: int) -> None:
        self.inner = inner
        self.seed = seed
        self._past: deque[_Asked] = deque(maxlen=_REMEMBERED)

    @property
    def tokens_generated(self) -> int:
        """By the inner model; 0 where it does not write."""
        return int(getattr(self.inner, "tokens_generated", 0))

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        """The inner model's beliefs, each with a note whose it is."""
        beliefs = self.inner.begin(requests, pasts)
        return [_Belief(own, request.episode, request.agent) for own, request in zip(beliefs, requests, strict=True)]

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        """The inner model's answers, exchanged."""
        answers = self.inner.advance([belief.own for belief in beliefs], moves, seeds)
        asked = [_Asked(*each) for each in zip(beliefs, moves, answers, strict=True)]
        given_for = self._exchange(asked, seeds)
        self._past.extend(asked)
        found: list[ImaginedStep] = []
        for (belief, _, own), given in zip(asked, (other.answer for other in given_for), strict=True):
            # An imagination that is over cannot be gone on with; the one that is shown instead may well go on.
            going_on = belief.own if own.done or own.malformed else own.belief
            found.append(replace(given, belief=replace(belief, own=going_on)))
        return found

    def judge(
        self, beliefs: Sequence[Any], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        """What the inner model would have thought of these outcomes at the moments that they are exchanged with."""
        asked = [_Asked(belief, move, None) for belief, move in zip(beliefs, moves, strict=True)]
        others = self._exchange(asked, (len(asked),))
        return self.inner.judge([each.belief.own for each in others], [each.move for each in others], outcomes)

    def finish(self, episode: str) -> None:
        """Handed on."""
        self.inner.finish(episode)

    def _exchange(self, asked: Sequence[_Asked], seeds: Sequence[int]) -> list[_Asked]:
        """What each is given instead."""
        seed = derive_seed(self.seed, "shuffle", *seeds)
        by_agent: dict[str, list[int]] = defaultdict(list)
        for place, each in enumerate(asked):
            by_agent[each.belief.agent].append(place)
        found = list(asked)
        for places in by_agent.values():
            if len(places) == 1:
                found[places[0]] = self._earlier(asked, places[0], seed)
                continue
            order = exchange([(asked[place].belief.episode, _key(asked[place].move)) for place in places], seed)
            for place, other in zip(places, order, strict=True):
                found[place] = asked[places[other]]
        return found

    def _earlier(self, asked: Sequence[_Asked], place: int, seed: int) -> _Asked:
        """For a request without another one of its agent."""
        mine = asked[place]
        past = [each for each in self._past if each.belief.agent == mine.belief.agent]
        past = [each for each in past if each.belief.episode != mine.belief.episode] or past
        others = past or [_as_seen_by(mine, each) for each in asked if each is not mine]
        if not others:
            raise ModelError("a request alone in the first batch of a shuffled world model has no answer to get")
        return others[int(np.random.default_rng(seed).integers(len(others)))]


def _as_seen_by(mine: _Asked, other: _Asked) -> _Asked:
    """Another agent's answer in the form of one's own: whose view it is and who the others are does not change."""
    own, given = mine.answer, other.answer
    if own is None or given is None:
        return mine  # to judge an outcome of one agent by a belief of another makes no sense
    seen = None if given.observation is None else replace(given.observation, agent=mine.belief.agent)
    return _Asked(other.belief, other.move, replace(given, observation=seen, others=own.others, inbox=own.inbox))


def exchange(groups: Sequence[tuple[str, str]], seed: int) -> list[int]:
    """For each place the other place whose answer it gets; a permutation without fixed points.

    Args:
        groups: (episode, move) of each of two or more places.
        seed: of the order within episodes and moves, and of the order of these.

    """
    if not groups:
        return []
    rng = np.random.default_rng(seed)
    by_group: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place in rng.permutation(len(groups)):
        episode, move = groups[place]
        by_group[episode][move].append(int(place))
    # Equal groups stand side by side; moving on by the size of the largest one leaves every group that is no more than
    # half of the whole, and going within one episode the same holds for its moves.
    episodes = [[place for places in moves.values() for place in places] for moves in by_group.values()]
    order = [place for places in episodes for place in places]
    largest = max(map(len, episodes))
    if 2 * largest > len(order):
        largest = max(len(places) for moves in by_group.values() for places in moves.values())
    shift = largest if largest < len(order) else 1
    return [other for _, other in sorted(zip(order, [*order[shift:], *order[:shift]], strict=True))]


def _key(move: Move) -> str:
    return f"{move.action}|{move.message}"
