"""Games in normal form as payoff tensors, read from nested lists, and the ones with a name.

Parts: `NormalForm`, `GAMES`. The task that plays them is in `matrix`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preconcert.core import ConfigError

MAX_AGENTS = 8
MAX_ACTIONS = 10
"""Actions per agent."""
MAX_CELLS = 4096
"""Joint actions."""

Joint = tuple[int, ...]
"""One action number per agent."""


@dataclass(frozen=True, eq=False)
class NormalForm:
    """A game that is played by everyone choosing once, at the same time."""

    payoffs: NDArray[np.float64]
    """Shape (actions of agent_0, actions of agent_1, ..., agents): what each joint action pays each agent."""

    @classmethod
    def of(cls, payoffs: Any) -> NormalForm:
        """Read nested lists: `payoffs[i][j]` is the list of what agent_0 and agent_1 get for their actions i and j.

        Raises:
            ConfigError: the lists are not a payoff tensor; the message names the place and the value.
        """
        shape = _shape(payoffs)
        for place, value in _numbers(payoffs, shape, "payoffs"):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{place} = {value!r} is not a finite number")
        *actions, agents = shape
        if agents != len(actions):
            raise ConfigError(
                f"payoffs: {len(actions)} levels of actions and {agents} numbers per joint action; both must be the "
                "number of agents"
            )
        if not 2 <= agents <= MAX_AGENTS:
            raise ConfigError(f"payoffs: {agents} agents, not 2 to {MAX_AGENTS}")
        for agent, count in enumerate(actions):
            if not 2 <= count <= MAX_ACTIONS:
                raise ConfigError(f"payoffs: agent_{agent} has {count} actions, not 2 to {MAX_ACTIONS}")
        if math.prod(actions) > MAX_CELLS:
            raise ConfigError(f"payoffs: {math.prod(actions)} joint actions, more than {MAX_CELLS}")
        return cls(np.array(payoffs, dtype=np.float64))

    @property
    def agents(self) -> int:
        """How many play."""
        return int(self.payoffs.shape[-1])

    @property
    def actions(self) -> tuple[int, ...]:
        """How many actions each agent has."""
        return self.payoffs.shape[:-1]

    @property
    def common(self) -> bool:
        """Is everyone always paid the same?"""
        return bool((self.payoffs == self.payoffs[..., :1]).all())

    def joints(self) -> Iterator[Joint]:
        """Every joint action, in order."""
        return itertools.product(*map(range, self.actions))

    def pay(self, joint: Joint) -> tuple[float, ...]:
        """What a joint action pays each agent."""
        return tuple(float(payoff) for payoff in self.payoffs[joint])

    def is_equilibrium(self, joint: Joint) -> bool:
        """Can no agent alone do better? A team of agents might, together."""
        for agent, chosen in enumerate(joint):
            varied: tuple[Any, ...] = (*joint[:agent], slice(None), *joint[agent + 1 :], agent)
            alone = self.payoffs[varied]
            if alone[chosen] < alone.max():
                return False
        return True

    def recommended(self) -> Joint | None:
        """The pure equilibrium that pays most in sum, the first of several; None where there is none.

        In a game of common payoffs nothing pays more.
        """
        stable = [joint for joint in self.joints() if self.is_equilibrium(joint)]
        return max(stable, key=lambda joint: sum(self.pay(joint)), default=None)


def _shape(payoffs: Any) -> tuple[int, ...]:
    """Lengths along the first path down."""
    lengths: list[int] = []
    level = payoffs
    while isinstance(level, (list, tuple)):
        lengths.append(len(level))
        if not level:
            raise ConfigError(f"payoffs{'[0]' * (len(lengths) - 1)} is an empty list")
        level = level[0]
    if len(lengths) < 3:
        raise ConfigError(f"payoffs = {payoffs!r}: two agents take three levels of lists, this has {len(lengths)}")
    return tuple(lengths)


def _numbers(level: Any, shape: Sequence[int], place: str) -> Iterator[tuple[str, Any]]:
    """Every number with its place, once all lists have the shape."""
    if not shape:
        yield place, level
        return
    if not isinstance(level, (list, tuple)):
        raise ConfigError(f"{place} = {level!r} is not a list of {shape[0]}")
    if len(level) != shape[0]:
        raise ConfigError(f"{place} has {len(level)} entries, its neighbours have {shape[0]}")
    for index, entry in enumerate(level):
        yield from _numbers(entry, shape[1:], f"{place}[{index}]")


def _shared(rows: Sequence[Sequence[float]]) -> NormalForm:
    """Two agents, paid the same."""
    return NormalForm.of([[[payoff, payoff] for payoff in row] for row in rows])


def _zero_sum(rows: Sequence[Sequence[float]]) -> NormalForm:
    """Two agents, the second pays the first."""
    return NormalForm.of([[[payoff, 0 - payoff] for payoff in row] for row in rows])


def _team_counterexample() -> NormalForm:
    """Two teams of two; a team is `a` or `b` where its agents agree and `split` where they do not."""
    wins = {("b", "a"): 3, ("a", "split"): 5, ("b", "split"): 1}

    def of(one: int, two: int) -> str:
        return "split" if one != two else "ab"[one]

    payoffs = np.zeros((2, 2, 2, 2, 4))
    for joint in itertools.product(range(2), repeat=4):
        us, them = of(*joint[:2]), of(*joint[2:])
        won = wins.get((us, them), 0) - wins.get((them, us), 0)
        payoffs[joint] = (won, won, -won, -won)
    return NormalForm.of((payoffs + 0.0).tolist())


GAMES: Mapping[str, NormalForm] = MappingProxyType({
    "penalty": _shared([[10, 0, -10], [0, 2, 0], [-10, 0, 10]]),
    "climbing": _shared([[11, -30, 0], [-30, 7, 6], [0, 0, 5]]),
    "xor": _shared([[0, 1], [1, 0]]),
    "coordination": _shared([[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "cycle-trap": _zero_sum([[0, -3, 8, -1], [3, 0, -3, -1], [-8, 3, 0, -1], [1, 1, 1, 0]]),
    "fxp-counterexample": _team_counterexample(),
})
"""
`penalty` and `climbing` (Claus & Boutilier 1998) pay both agents the same and punish missing each other, most of all
around the best joint action. `xor` pays agents that differ, which no shared deterministic policy does. `coordination`
pays those that agree, on anything.

`cycle-trap`: two agents, one pays the other. `a`, `b`, `c` beat one another in a circle and `d` beats each by a little;
(d, d) is the only equilibrium. Best responses to the latest opponent, begun at the best response to uniform play, go
round in the circle for ever. Averages over past opponents do reach `d`, as they must where two play for one sum.

`fxp-counterexample`: a game of two teams, agent_0 and agent_1 against agent_2 and agent_3, after the idea of Xu et al.
2023 (their numbers are others). Agents that agree on `a` win 5 from a split team; agreeing on `b` wins 3 from `a` and 1
from a split team. So all on `b` is robust even to what a team does together. From uniform play each agent alone learns
`a`, where no single agent can leave: self-play, with the latest or with all past selves, stays for ever. A fresh team
against `a` learns `b`; trained also against such counters, the main team leaves.
"""
