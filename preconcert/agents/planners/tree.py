"""Monte-Carlo tree search over turns (PUCT, Rosin 2011, as in AlphaZero), all trees of a call in lockstep.

A node is an imagined moment, an edge one of the turns that the policy would take there, with its share of the samples
as prior. What a turn leads to is chance: an edge holds several outcomes drawn from the world model, their number
growing with the square root of the visits (progressive widening, Couetoux et al. 2011), and otherwise goes through one
of those again. Each round takes several leaves from every tree, kept apart by virtual losses, in one call of the world
model; one call of the policy then makes the edges of the new nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from preconcert.agents.planners.paths import (
    Critic,
    Moment,
    Path,
    Plan,
    Proposal,
    candidate,
    ends,
    propose,
    rounded,
)
from preconcert.agents.planners.scoring import differing, worst_return
from preconcert.agents.planners.settings import Tree
from preconcert.core import ImaginedStep, Move, Rehearsing, WorldModel, derive_seed

_ROBUST = 0.5
"""A turn is only taken if it has this share of the most visited turn's visits."""

_TRIES = 4
"""Descents per leaf: those that end at a known end cost no imagined step, so others may follow."""


@dataclass(slots=True)
class _Node:
    path: Path
    """The way that led here."""
    value: float
    """Expected return from here, as far as it is known."""
    final: bool
    """Nothing is imagined beyond."""
    edges: list[_Edge] = field(default_factory=list)
    """None before the round is over in which the node was made."""
    visits: int = 0


@dataclass(slots=True)
class _Edge:
    proposal: Proposal
    prior: float
    visits: int = 0
    total: float = 0.0
    squares: float = 0.0
    pending: int = 0
    """Leaves of this round that went through here."""
    drawn: int = 0
    """Outcomes asked for so far, those of this round included."""
    outcomes: list[_Node] = field(default_factory=list)


@dataclass(slots=True)
class _Leaf:
    tree: _Tree
    trail: list[_Edge]
    nodes: list[_Node]
    """Where each edge of the trail begins."""
    path: Path
    move: Move


class _Tree:
    """One decision's tree."""

    def __init__(self, moment: Moment, settings: Tree) -> None:
        self.moment = moment
        self.settings = settings
        self.root = _Node(Path(moment.request, moment.request.seed, moment.belief, moment.memory), 0.0, False)
        self.low, self.high = math.inf, -math.inf
        rewards = [float(word) for word in moment.request.language.rewards]
        self.span = max(rewards) - min(rewards) if rewards else 0.0
        """What one reward can make of a difference. Differences smaller than that are not blown up: where only small
        rewards have been met so far, larger ones are still looked for."""

    def leaves(self) -> Iterator[_Leaf]:
        """What this round asks of the world model; ends that are known already are counted on the way."""
        found = 0
        for _ in range(_TRIES * self.settings.leaves):
            leaf = self._descend()
            if leaf is not None:
                yield leaf
                found += 1
            if found == self.settings.leaves:
                break

    def grow(self, leaf: _Leaf, step: ImaginedStep, end: float | None) -> _Node:
        """Add the outcome of a leaf's last move, and count it."""
        path = leaf.path
        left = self.moment.request.env.horizon - self.moment.request.observation.step - len(path.steps)
        value: float | None
        if step.malformed:
            gamma = self.settings.score.gamma
            worst = worst_return(self.moment.request.language, left + 1, gamma)
            value = (worst - step.reward) / gamma  # so that this step and what follows are worth the least possible
        else:
            value = end if step.value is None else step.value
        final = path.over or len(path.steps) >= self.moment.horizon
        node = _Node(path, 0.0 if value is None else value, final)
        leaf.trail[-1].outcomes.append(node)
        for edge in leaf.trail:
            edge.pending -= 1
        self._count(leaf.trail, [*leaf.nodes, node])
        return node

    def _descend(self) -> _Leaf | None:
        node, trail, nodes = self.root, list[_Edge](), list[_Node]()
        while True:
            if node.final:
                self._count(trail, [*nodes, node])
                return None
            if not node.edges:  # made in this round: its edges come with the round's end
                return None
            edge = self._pick(node)
            trail.append(edge)
            nodes.append(node)
            room = math.ceil(self.settings.widening * math.sqrt(edge.visits + edge.pending + 1))
            if edge.drawn < min(room, self.settings.outcomes):
                for each in trail:
                    each.pending += 1
                edge.drawn += 1
                # The luck of an outcome follows from its number on its edge: turns are compared on the same luck.
                seed = derive_seed(node.path.seed, "outcome", edge.drawn)
                path = node.path.copy()
                path.seed, path.memory = seed, edge.proposal.memory
                return _Leaf(self, trail, nodes, path, edge.proposal.move)
            if not edge.outcomes:  # all it may have are on their way
                return None
            node = min(edge.outcomes, key=lambda each: each.visits)

    def _pick(self, node: _Node) -> _Edge:
        """PUCT; what was not tried is expected to be worth as much as its moment so far."""
        busy = sum(edge.visits + edge.pending for edge in node.edges)
        tried = [edge for edge in node.edges if edge.visits]
        mean = sum(edge.total for edge in tried) / sum(edge.visits for edge in tried) if tried else node.value
        width = max(self.high - self.low, self.span)

        def scaled(value: float) -> float:
            return (value - self.low) / width if width > 0 else 0.5

        def puct(edge: _Edge) -> float:
            count = edge.visits + edge.pending
            quality = edge.visits * scaled(edge.total / edge.visits) / count if edge.visits else None
            if quality is None:
                quality = 0.0 if edge.pending else min(1.0, max(0.0, scaled(mean)))
            bonus = self.settings.exploration * edge.prior * math.sqrt(max(1, busy)) / (1 + count)
            return quality + bonus

        return max(node.edges, key=puct)

    def _count(self, trail: Sequence[_Edge], nodes: Sequence[_Node]) -> None:
        """Pass the value of the last node back along the trail."""
        value = nodes[-1].value
        nodes[-1].visits += 1
        for place in range(len(trail) - 1, -1, -1):
            value = nodes[place + 1].path.steps[-1].reward + self.settings.score.gamma * value
            edge = trail[place]
            edge.visits += 1
            edge.total += value
            edge.squares += value * value
            if place:
                nodes[place].visits += 1
            self.low, self.high = min(self.low, value), max(self.high, value)

    def settle(self) -> Plan:
        """The best turn among those that were visited often enough."""
        edges = [edge for edge in self.root.edges if edge.visits]
        weighed = {id(edge): self._weigh(edge) for edge in edges}
        most = max(edge.visits for edge in edges)
        numbers = {id(edge): number for number, edge in enumerate(edges)}
        order = sorted(
            edges,
            key=lambda e: (
                e.visits < _ROBUST * most, -rounded(weighed[id(e)][0]), -e.proposal.count, numbers[id(e)]
            ),
        )  # fmt: skip
        shown = {id(edge): _likeliest(edge) for edge in edges}
        return Plan(
            order[0].proposal,
            tuple(
                candidate(e.proposal.move, weighed[id(e)], shown[id(e)], e.visits, e is order[0]) for e in order
            ),
            tuple(_followed(node) for node in order[0].outcomes),
        )

    def _weigh(self, edge: _Edge) -> tuple[float, float, float, float]:
        mean = edge.total / edge.visits
        spread = math.sqrt(max(0.0, edge.squares / edge.visits - mean * mean))
        seen = [node.path.steps[0] for node in edge.outcomes]
        views = [step.observation for step in seen if step.observation is not None and not step.malformed]
        differ = 1.0 if len(views) < len(seen) else differing(views, self.moment.request.language.view)
        differ = differ if len(seen) > 1 else 0.0
        score = self.settings.score
        worth = mean - score.spread_weight * spread - score.disagreement_weight * differ
        return worth + score.prior_weight * math.log(edge.prior), mean, spread, differ


def tree_search(
    policy: Rehearsing, world: WorldModel, moments: Sequence[Moment], settings: Tree, critic: Critic | None = None
) -> list[Plan]:
    """Plan all moments together: per round one call of the world model and one of the policy.

    Args:
        policy: its sampled turns are the edges, their shares the priors.
        world: imagines.
        moments: the decisions.
        settings: how many of everything.
        critic: values of new nodes, where the world model has none.
    """
    trees = [_Tree(moment, settings) for moment in moments]
    _expand(policy, [tree.root for tree in trees], settings.candidates)
    for _ in range(settings.rounds):
        leaves = [leaf for tree in trees for leaf in tree.leaves()]
        if not leaves:
            continue
        paths = [leaf.path for leaf in leaves]
        steps = world.advance(
            [path.belief for path in paths], [leaf.move for leaf in leaves], [path.seed for path in paths]
        )
        for leaf, step in zip(leaves, steps, strict=True):
            leaf.path.moves.append(leaf.move)
            leaf.path.steps.append(step)
            leaf.path.belief = step.belief
        last = ends(paths, critic)
        made = [
            leaf.tree.grow(leaf, step, end) for leaf, step, end in zip(leaves, steps, last, strict=True)
        ]
        _expand(policy, [node for node in made if not node.final], settings.branch)
    return [tree.settle() for tree in trees]


def _expand(policy: Rehearsing, nodes: Sequence[_Node], number: int) -> None:
    asked = [
        node.path.asked(derive_seed(node.path.seed, "turn") if node.path.steps else node.path.request.seed)
        for node in nodes
    ]
    for node, proposed in zip(
        nodes, propose(policy, asked, [node.path.memory for node in nodes], number), strict=True
    ):
        total = sum(proposal.count for proposal in proposed)
        node.edges = [_Edge(proposal, proposal.count / total) for proposal in proposed]


def _likeliest(edge: _Edge) -> Path:
    """The way along the most visited outcomes and turns."""
    return _followed(max(edge.outcomes, key=lambda each: each.visits))


def _followed(node: _Node) -> Path:
    """The way on from a node along what was visited most."""
    while True:
        onward = [each for each in node.edges if each.outcomes]
        if not onward:
            return node.path
        following = max(onward, key=lambda each: each.visits)
        node = max(following.outcomes, key=lambda each: each.visits)
