"""Beam search over turns: the best partial plans are kept after every imagined step and branch again.

A plan is a row of the agent's own moves; the world model imagines it `samples` times, each time with others and chance
drawn anew, and it is judged by all of them. Keeping single imagined ways instead would keep the lucky ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from preconcert.agents.planners.paths import (
    Critic,
    Moment,
    Path,
    Plan,
    Proposal,
    advance,
    candidate,
    distinct,
    ends,
    propose,
    rounded,
    shares,
    start,
    weigh,
)
from preconcert.agents.planners.settings import Beam
from preconcert.core import Move, Rehearsing, WorldModel, derive_seed


@dataclass(slots=True)
class _Partial:
    """A plan so far."""

    moment: int
    root: int
    """Number of the proposal that it begins with."""
    count: int
    """How often the policy sampled the last turn."""
    share: float
    """Of the policy's samples that proposed its first move."""
    order: int
    """In which it was made, among those of its moment."""
    paths: list[Path]
    moves: list[Move]
    """The next move on each way that is not over."""
    weighed: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @property
    def live(self) -> list[Path]:
        return [path for path in self.paths if not path.over]

    @property
    def rank(self) -> tuple[float, int, int]:
        return -rounded(self.weighed[0]), -self.count, self.order


def beam(
    policy: Rehearsing, world: WorldModel, moments: Sequence[Moment], settings: Beam, critic: Critic | None = None
) -> list[Plan]:
    """Plan all moments together: per imagined step one call of the world model and one of the policy.

    Args:
        policy: proposes at every branching.
        world: imagines.
        moments: the decisions.
        settings: how many of everything.
        critic: values of the last views, where the world model has none.
    """
    requests = [moment.request for moment in moments]
    proposals = propose(policy, requests, [moment.memory for moment in moments], settings.candidates)
    grown = [
        _first(number, root, share, moment, proposal, settings.samples)
        for number, (moment, proposed) in enumerate(zip(moments, proposals, strict=True))
        for root, (proposal, share) in enumerate(zip(proposed, shares(proposed), strict=True))
    ]
    spent: dict[tuple[int, int], int] = {}
    best: dict[tuple[int, int], _Partial] = {}
    """By moment and first move, the deepest plan that was weighed, and of those the best."""
    kept: list[list[_Partial]] = [[] for _ in moments]
    depth = 0
    while grown:
        depth += 1
        _imagine(world, grown, spent)
        _weigh(grown, moments, settings, critic)
        pools: list[list[_Partial]] = [
            [each for each in held if depth > moment.horizon or not each.live]
            for held, moment in zip(kept, moments, strict=True)
        ]
        for each in grown:
            pools[each.moment].append(each)
        kept = [sorted(pool, key=lambda each: each.rank)[: settings.width] for pool in pools]
        for each in grown:
            key = each.moment, each.root
            held = best.get(key)
            survives = any(each is survivor for survivor in kept[each.moment])
            if held is None or (survives and _supersedes(each, held)):
                best[key] = each
        onward = [
            each for held, moment in zip(kept, moments, strict=True) if depth < moment.horizon for each in held
        ]
        grown = _branched(policy, [each for each in onward if each.live], settings)
    return [
        _settled(proposed, held, {root: best[number, root] for root in range(len(proposed))}, spent, number)
        for number, (proposed, held) in enumerate(zip(proposals, kept, strict=True))
    ]


def _first(number: int, root: int, share: float, moment: Moment, proposal: Proposal, samples: int) -> _Partial:
    paths = [start(moment, proposal, sample) for sample in range(samples)]
    return _Partial(number, root, proposal.count, share, root, paths, [proposal.move] * samples)


def _supersedes(new: _Partial, held: _Partial) -> bool:
    depths = max(len(path.steps) for path in new.paths), max(len(path.steps) for path in held.paths)
    return depths[0] > depths[1] or (depths[0] == depths[1] and new.rank < held.rank)


def _imagine(world: WorldModel, grown: Sequence[_Partial], spent: dict[tuple[int, int], int]) -> None:
    paths = [path for each in grown for path in each.live]
    moves = [move for each in grown for move in each.moves]
    for each in grown:
        spent[each.moment, each.root] = spent.get((each.moment, each.root), 0) + len(each.live)
    advance(world, paths, moves)


def _weigh(grown: Sequence[_Partial], moments: Sequence[Moment], settings: Beam, critic: Critic | None) -> None:
    last = iter(ends([path for each in grown for path in each.paths], critic))
    for each in grown:
        values = [next(last) for _ in each.paths]
        each.weighed = weigh(each.paths, values, moments[each.moment], settings.score, each.share)


def _branched(policy: Rehearsing, parents: Sequence[_Partial], settings: Beam) -> list[_Partial]:
    """Every plan continued by the turns that the policy would take on its ways, asked of each of them in turn."""
    if not parents:
        return []
    asked: list[tuple[Path, int]] = []
    for parent in parents:
        live = parent.live
        for draw in range(settings.branch):
            path = live[draw % len(live)]
            asked.append((path, derive_seed(path.seed, "branch", len(path.steps), draw)))
    answers = policy.rehearse([path.asked(seed) for path, seed in asked], [path.memory for path, _ in asked])
    grown: list[_Partial] = []
    made: dict[int, int] = {}
    for number, parent in enumerate(parents):
        for proposal in distinct(answers[number * settings.branch : (number + 1) * settings.branch]):
            order = made[parent.moment] = made.get(parent.moment, -1) + 1
            paths = [path.copy() for path in parent.paths]
            # A way on which the policy was not asked this time remembers the turn as it was taken on another.
            for path in paths:
                if not path.over:
                    path.memory = proposal.memory
            moves = [_allowed(proposal.move, path) for path in paths if not path.over]
            grown.append(replace(parent, count=proposal.count, order=order, paths=paths, moves=moves))
    return grown


def _allowed(move: Move, path: Path) -> Move:
    """The move, or the task's default where the view on this way does not allow it."""
    legal = path.observation.legal_actions
    if move.action in legal:
        return move
    default = path.request.language.default_action
    return replace(move, action=default if default in legal else legal[0])


def _settled(
    proposed: Sequence[Proposal],
    held: Sequence[_Partial],
    best: dict[int, _Partial],
    spent: dict[tuple[int, int], int],
    number: int,
) -> Plan:
    """The best plan that is left; then what else is left, then what was given up, deepest first."""
    chosen = held[0]
    places = {id(each): place for place, each in enumerate(held)}
    best = {**best, chosen.root: chosen}
    order = sorted(
        best.values(), key=lambda e: (places.get(id(e), len(held)), -max(len(p.steps) for p in e.paths), e.rank)
    )
    return Plan(
        proposed[chosen.root],
        tuple(
            candidate(
                proposed[each.root].move, each.weighed, each.paths[0], spent[number, each.root], each is chosen
            )
            for each in order
        ),
        tuple(chosen.paths),
    )
