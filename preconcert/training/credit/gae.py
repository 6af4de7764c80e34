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
from preconcert.training.credit.ledger import Game, Ledger, Number, Strand, TurnKey, discounted


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
    raw: dict[TurnKey, NDArray[np.float64]] = {}
    returns: dict[TurnKey, Number] = {}
    for chain in chains:
        pieces = [_values(link, tokens) for link in chain]
        values = np.concatenate(pieces) if pieces else np.zeros(0)
        ends = np.cumsum([len(piece) for piece in pieces])
        rewards = np.zeros(len(values))
        for link, end in zip(chain, ends, strict=True):
            rewards[end - 1] = link.reward
        following = np.append(values[1:], 0.0)
        found = discounted(rewards + settings.gamma * following - values, settings.gamma * settings.lam)
        for link, end, piece in zip(chain, ends, pieces, strict=True):
            mine = slice(end - len(piece), end)
            raw[link.key] = found[mine]
            target = found[mine] + values[mine]
            returns[link.key] = target if tokens else float(target[0])
    normal = _normalised(ledger, raw, settings.normalise, tokens)
    advantages: dict[TurnKey, Number] = {}
    for key in turns_of(ledger):
        if key not in normal:
            advantages[key] = 0.0
        else:
            advantages[key] = normal[key] if tokens else float(normal[key][0])
    return Credit(advantages, returns)


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
    ledger: Ledger, raw: Mapping[TurnKey, NDArray[np.float64]], normalise: Normalise, tokens: bool
) -> Mapping[TurnKey, NDArray[np.float64]]:
    """Statistics run over what was chosen: forced tokens have values but carry no loss."""
    if normalise is Normalise.NONE:
        return raw
    chosen: dict[Hashable, list[NDArray[np.float64]]] = {}
    for key, found in raw.items():
        if tokens:
            found = found[np.array(ledger[key.episode].strands[key.agent].sampled[key.index], dtype=bool)]
        chosen.setdefault(_rollout_group(normalise, key.agent), []).append(found)
    statistics = {group: _mean_and_spread(np.concatenate(pieces)) for group, pieces in chosen.items()}
    normal: dict[TurnKey, NDArray[np.float64]] = {}
    for key, found in raw.items():
        mean, spread = statistics[_rollout_group(normalise, key.agent)]
        normal[key] = (found - mean) / (spread + EPSILON) if spread else np.zeros_like(found)
    return normal


def _mean_and_spread(found: NDArray[np.float64]) -> tuple[float, float]:
    """Spread 0 for a single number or equal ones."""
    if len(found) < 2 or np.ptp(found) == 0:
        return 0.0, 0.0
    return float(found.mean()), float(found.std(ddof=1))
