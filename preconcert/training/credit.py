"""Credit: from finished episodes to one advantage per turn. Pure functions; no model, no tensor.

An estimator is a callable `(episodes) -> {TurnKey: advantage}`. Group-relative estimators differ only in their
`group_key`: which returns are compared with one another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from preconcert.core import Episode


@dataclass(frozen=True, slots=True)
class TurnKey:
    """Names one turn among the episodes of a rollout."""

    episode: int
    """Position in the sequence of episodes."""
    agent: str
    index: int
    """Which of the agent's turns, from 0."""


GroupKey = Callable[[Episode, str], tuple[str, ...]]
"""The group in which an agent's return in an episode is compared."""


class Grouping(StrEnum):
    """Which returns are normalised together."""

    AGENT = "agent"
    """Per task instance and agent (Dr. MAS): no agent's scale leaks into another's gradient."""
    GLOBAL = "global"
    """Per task instance, all agents pooled (plain GRPO)."""


def agent_group(episode: Episode, agent: str) -> tuple[str, ...]:
    """Group of agent-wise normalisation."""
    return (episode.group, agent)


def global_group(episode: Episode, agent: str) -> tuple[str, ...]:
    """Group of pooled normalisation."""
    return (episode.group,)


GROUP_KEYS: Mapping[Grouping, GroupKey] = {Grouping.AGENT: agent_group, Grouping.GLOBAL: global_group}


def group_relative(
    episodes: Sequence[Episode], group_key: GroupKey, scale: bool = True, epsilon: float = 1e-4
) -> dict[TurnKey, float]:
    """Group-relative advantages of whole trajectories (GRPO, arXiv 2402.03300; agent-wise: Dr. MAS).

    A = (R − mean) / (std + epsilon) over the group, the same for every turn of the trajectory; std has the n − 1
    denominator, as in TRL. A group of one, or without variance, gives exactly 0.

    Args:
        episodes: the rollout.
        group_key: what is compared with what.
        scale: divide by the standard deviation; False only centres (Dr. GRPO).
        epsilon: added to the standard deviation; the default is TRL's.
    """
    groups: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for position, episode in enumerate(episodes):
        for agent in episode.trajectories:
            groups[group_key(episode, agent)].append((position, agent))
    advantages: dict[TurnKey, float] = {}
    for members in groups.values():
        returns = np.array([episodes[p].trajectories[a].total_reward for p, a in members], dtype=np.float64)
        centred = returns - returns.mean() if np.ptp(returns) > 0 else np.zeros_like(returns)
        if scale and centred.any():
            centred = centred / (returns.std(ddof=1) + epsilon)
        for (position, agent), advantage in zip(members, centred, strict=True):
            for index in range(len(episodes[position].trajectories[agent].turns)):
                advantages[TurnKey(position, agent, index)] = float(advantage)
    return advantages


ESTIMATORS: Mapping[str, Callable[[Sequence[Episode]], dict[TurnKey, float]]] = {
    "agent": lambda episodes: group_relative(episodes, agent_group),
    "global": lambda episodes: group_relative(episodes, global_group),
    "agent-centred": lambda episodes: group_relative(episodes, agent_group, scale=False),
    "global-centred": lambda episodes: group_relative(episodes, global_group, scale=False),
}
"""Every estimator by name; the property tests run over this table."""
