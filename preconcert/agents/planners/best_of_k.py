"""Best of K: every candidate is followed by the policy's own turns, and the best on average is taken."""

from __future__ import annotations

from collections.abc import Sequence

from preconcert.agents.planners.paths import (
    Critic,
    Moment,
    Plan,
    advance,
    candidate,
    ends,
    move_of,
    propose,
    respond,
    rounded,
    shares,
    start,
    weigh,
)
from preconcert.agents.planners.settings import BestOfK
from preconcert.core import Rehearsing, WorldModel


def best_of_k(
    policy: Rehearsing, world: WorldModel, moments: Sequence[Moment], settings: BestOfK, critic: Critic | None = None
) -> list[Plan]:
    """Plan all moments together: per imagined step one call of the world model and one of the policy.

    Args:
        policy: proposes, and goes on with each candidate.
        world: imagines.
        moments: the decisions.
        settings: how many of everything.
        critic: values of the last views, where the world model has none.
    """
    requests = [moment.request for moment in moments]
    proposals = propose(policy, requests, [moment.memory for moment in moments], settings.candidates)
    ways = [
        [[start(moment, proposal, sample) for sample in range(settings.samples)] for proposal in proposed]
        for moment, proposed in zip(moments, proposals, strict=True)
    ]
    live = [
        (path, moment.horizon, proposal.move)
        for moment, proposed, own in zip(moments, proposals, ways, strict=True)
        for proposal, paths in zip(proposed, own, strict=True)
        for path in paths
    ]
    advance(world, [path for path, _, _ in live], [move for _, _, move in live])
    going = [(path, horizon) for path, horizon, _ in live]
    while True:
        going = [(path, horizon) for path, horizon in going if not path.over and len(path.steps) < horizon]
        if not going:
            break
        paths = [path for path, _ in going]
        advance(world, paths, [move_of(turn) for turn in respond(policy, paths)])
    every = [path for path, _, _ in live]
    last = dict(zip(map(id, every), ends(every, critic), strict=True))
    plans: list[Plan] = []
    for moment, proposed, own in zip(moments, proposals, ways, strict=True):
        weighed = [
            weigh(paths, [last[id(path)] for path in paths], moment, settings.score, share)
            for paths, share in zip(own, shares(proposed), strict=True)
        ]
        order = sorted(range(len(proposed)), key=lambda k: (-rounded(weighed[k][0]), -proposed[k].count, k))
        plans.append(
            Plan(
                proposed[order[0]],
                tuple(
                    candidate(
                        proposed[k].move, weighed[k], own[k][0], sum(len(path.steps) for path in own[k]), k == order[0]
                    )
                    for k in order
                ),
                tuple(own[order[0]]),
            )
        )
    return plans

