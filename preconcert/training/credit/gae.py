"""Generalised advantage estimation (arXiv 1506.02438) along each agent's own turns.

δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1}, V after the last turn 0. The horizon is part of the task (agents
read how many steps are left), so an episode that it stopped ends like any other: nothing is bootstrapped there.

`level: token` runs the same recursion through the completion tokens of the turns, the reward on a turn's last token;
it needs a critic that values every token. Parts: `GAECredit`, and the recursion and normalisation that
`chained_gae.py` shares.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from enum import StrEnum
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from preconcert.core import TrainingError
from preconcert.training.credit.estimator import EPSILON, Credit, Estimator, Shift, turns_of
from preconcert.training.credit.ledger import Game, Ledger, Number, Strand, TurnKey


class Normalise(StrEnum):
    """Over what advantages get mean 0 and standard deviation 1."""

    AGENT = "agent"
    """Each agent's, over the rollout."""
    GLOBAL = "global"
    """All agents' together; an agent of larger scale then drowns the others (see Dr. MAS)."""
    NONE = "none"
    """Nothing."""


class Critic(Estimator):
    """What estimators with a critic share."""

    needs_values: ClassVar[bool] = True
    grouped: ClassVar[bool] = False

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per link of the chain; 1 fits a finite horizon."""
    lam: float = Field(0.95, ge=0, le=1)
    """λ: 1 is the Monte Carlo return less the value, 0 the one-step error."""
    normalise: Normalise = Normalise.AGENT
    """Over what advantages get mean 0 and standard deviation 1: `agent`, `global` or `none`."""

    @property
    def shift(self) -> Shift:
        """Values do not move along."""
        return Shift.NONE

    @property
    def local(self) -> bool:
        """Normalisation runs over the whole rollout."""
        return self.normalise is Normalise.NONE


class GAECredit(Critic):
    """GAE over an agent's own turns."""

    type: Literal["gae"] = "gae"
    level: Literal["turn", "token"] = "turn"
    """One link per `turn`, or one per completion `token`."""

    def group_of(self, game: Game, agent: str, index: int) -> Hashable | None:
        """The whole rollout; per token, the mean is over tokens and not over turns."""
        return _rollout_group(self.normalise, agent) if self.level == "turn" else None

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per turn or per token."""
        chains = [
            [Link(TurnKey(position, agent, index), strand, float(strand.rewards[index]))
             for index in range(strand.turns)]
            for position, game in enumerate(ledger)
            for agent, strand in game.strands.items()
            if strand.learns
        ]  # fmt: skip
        return along(ledger, chains, self, self.level == "token")


class Link:
    """One turn in a chain, with the reward that falls due after it."""

    __slots__ = ("key", "reward", "strand")

    def __init__(self, key: TurnKey, strand: Strand, reward: float) -> None:
        self.key = key
        self.strand = strand
        self.reward = reward


def along(ledger: Ledger, chains: Sequence[Sequence[Link]], settings: Critic, tokens: bool) -> Credit:
    """GAE along chains of turns, each chain ending where its game ends.

    Args:
        ledger: every turn of it gets an advantage; 0 where it is in no chain.
        chains: the turns in the order of the recursion.
        settings: γ, λ and the normalisation.
        tokens: go through every completion token instead of from turn to turn.

    Raises:
        TrainingError: a turn has no value, or no value per token.
    """
    links = [link for chain in chains for link in chain]
    if not links:
        return Credit(dict.fromkeys(turns_of(ledger), 0.0), {})
    pieces = [_values(link, tokens) for link in links]
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    ends = np.cumsum(sizes)
    values = np.concatenate(pieces)
    rewards = np.zeros(len(values))
    rewards[ends - 1] = [link.reward for link in links]
    # The number of values up to each chain's end; a chain may be empty.
    marks = np.concatenate([[0], ends])[np.cumsum([0, *(len(chain) for chain in chains)])]
    found = _recursion(values, rewards, np.diff(marks), settings.gamma, settings.lam)
    targets = found + values
    normal = _normalised(found, links, sizes, settings.normalise, tokens)
    advantages: dict[TurnKey, Number] = dict.fromkeys(turns_of(ledger), 0.0)
    returns: dict[TurnKey, Number] = {}
    if tokens:
        for link, end, size in zip(links, ends.tolist(), sizes.tolist(), strict=True):
            advantages[link.key], returns[link.key] = normal[end - size : end], targets[end - size : end]
    else:
        keys = [link.key for link in links]
        advantages.update(zip(keys, normal.tolist(), strict=True))
        returns.update(zip(keys, targets.tolist(), strict=True))
    return Credit(advantages, returns)


def _recursion(
    values: NDArray[np.float64], rewards: NDArray[np.float64], lengths: NDArray[np.int64], gamma: float, lam: float
) -> NDArray[np.float64]:
    """A_t = δ_t + γλ A_{t+1} within each chain, all chains side by side, aligned at their ends.

    Args:
        values: of all chains, one after the other.
        rewards: likewise.
        lengths: of the chains.
        gamma: γ.
        lam: λ.
    """
    longest = int(lengths.max())
    there = np.arange(longest) >= longest - lengths[:, None]
    before, after, paid = (np.zeros(there.shape) for _ in range(3))
    before[there], paid[there] = values, rewards
    after[:, :-1] = before[:, 1:]
    errors = paid + gamma * after - before
    found = np.zeros(there.shape)
    running = np.zeros(len(lengths))
    for column in range(longest - 1, -1, -1):
        running = errors[:, column] + gamma * lam * running
        found[:, column] = running
    chained: NDArray[np.float64] = found[there]
    return chained


def _values(link: Link, tokens: bool) -> NDArray[np.float64]:
    strand, index = link.strand, link.key.index
    if strand.values is None:
        raise TrainingError(f"no values for {strand.agent!r} in episode {link.key.episode}: a critic must give them")
    if not tokens:
        return strand.values[index : index + 1]
    if strand.token_values is None:
        raise TrainingError(
            f"no values per token for {strand.agent!r} in episode {link.key.episode}; the critic gives one per turn"
        )
    return strand.token_values[index]


def _rollout_group(normalise: Normalise, agent: str) -> Hashable | None:
    return {Normalise.AGENT: agent, Normalise.GLOBAL: "", Normalise.NONE: None}[normalise]


def _normalised(
    found: NDArray[np.float64],
    links: Sequence[Link],
    sizes: NDArray[np.int64],
    normalise: Normalise,
    tokens: bool,
) -> NDArray[np.float64]:
    """Statistics run over what was chosen: forced tokens have values but carry no loss."""
    if normalise is Normalise.NONE:
        return found
    groups = np.repeat(np.array([str(_rollout_group(normalise, link.key.agent)) for link in links]), sizes)
    chosen = np.ones(len(found), dtype=bool)
    if tokens:
        chosen = np.concatenate([np.array(link.strand.sampled[link.key.index], dtype=bool) for link in links])
    normal = np.zeros_like(found)
    for group in np.unique(groups):
        mine = groups == group
        counted = found[mine & chosen]
        if len(counted) and np.ptp(counted) > 0:  # a single number, or equal ones, are nothing to compare
            normal[mine] = (found[mine] - counted.mean()) / (counted.std(ddof=1) + EPSILON)
    return normal
