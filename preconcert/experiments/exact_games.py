"""What strategies are worth where a game is small enough to say it exactly: Kuhn poker and games in normal form.

Parts: `GameValue` (what is found), `ExactGame` (asks a policy for its strategy, averages, compares), `exact_game` (the
one that a recipe plays, if there is one). The mathematics of Kuhn poker is in `preconcert.envs.kuhn_exploitability`,
the asking in `preconcert.agents.behaviour`.

A strategy here is a strategy of every agent: a member of a population may be asked to play any of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from preconcert.agents import Context, GenerativeTeam, behaviour
from preconcert.core import Observation, Player, TurnRequest, derive_seed
from preconcert.envs import Kuhn, Matrix, make_env
from preconcert.envs.kuhn import KuhnPlayer, decision_points
from preconcert.envs.kuhn_exploitability import ANTES, INFORMATION_SETS, SEATS, InformationSet, exploitability
from preconcert.envs.matrix import NAMES
from preconcert.envs.random_player import RandomPlayer
from preconcert.training.recipe import Recipe

SAMPLES = 1000
"""Turns per view where a policy's probabilities can only be counted."""


@dataclass(frozen=True, slots=True)
class GameValue:
    """Strategies against each other, and against best responses."""

    exploitability: float
    """What a best response gains, averaged over the sides, in `unit`. 0 in an equilibrium."""
    unit: str
    """`pots` (of Kuhn poker, before anyone acts) or `payoff`."""
    nash_conv: float
    """Sum of all sides' gains, in the payoffs of the game."""
    values: Mapping[str, float]
    """What each side wins on average, by seat or by the names of its agents."""
    gains: Mapping[str, float]
    """What a best response of that side would win beyond it."""
    samples: int | None
    """Turns counted per view; None where the policy's probabilities are exact."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How somebody would play every agent."""

    tables: Mapping[str, Any]
    """As the game has them."""
    samples: int | None = None
    """As in `GameValue`."""


class ExactGame(Protocol):
    """A task whose strategies can be written down."""

    @property
    def sides(self) -> Sequence[Sequence[str]]:
        """Agents that play together."""
        ...

    def ask(self, team: GenerativeTeam, player: str | None = None) -> Strategy:
        """A team's strategy, or that of one of its adapters."""
        ...

    def script(self, name: str) -> Strategy | None:
        """The strategy of one of the task's players; None where it follows no table."""
        ...

    def average(self, strategies: Sequence[Strategy]) -> Strategy:
        """Drawing one of them for each side before each game."""
        ...

    def returns(self, cast: Sequence[Strategy]) -> list[float]:
        """What each side wins on average, given one strategy per side."""
        ...

    def worth(self, strategy: Strategy) -> GameValue:
        """A strategy against itself and against best responses."""
        ...


def exact_game(recipe: Recipe, sides: Sequence[Sequence[str]]) -> ExactGame | None:
    """The recipe's task, if it is such a game and its team acts on what it sees alone."""
    if recipe.agent.memory or recipe.agent.context is not Context.TURN:
        return None
    env = make_env(recipe.task, recipe.params, 0)
    if isinstance(env, Kuhn):
        return KuhnGame(recipe.params)
    if isinstance(env, Matrix) and env.horizon == 1:
        return MatrixGame(env, sides)
    return None


class KuhnGame:
    """Kuhn poker; a strategy has a table from information sets to the probability of `bet` for each agent."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        env = Kuhn(params, 0)
        self.sides = tuple((agent,) for agent in env.agents)
        one, two = env.agents
        fixed = env.params.first
        self._seatings = [pair for pair in ((one, two), (two, one)) if fixed in ("drawn", pair[0])]

    def ask(self, team: GenerativeTeam, player: str | None = None) -> Strategy:
        """From the policy's probabilities at every information set."""
        points = [point for (agent,) in self.sides for point in decision_points(agent, self.params)]
        found = behaviour(team, [_request(point.observation, point.env, player) for point in points], SAMPLES)
        tables: dict[str, dict[InformationSet, float]] = {agent: {} for (agent,) in self.sides}
        for point, actions in zip(points, found.actions, strict=True):
            tables[point.agent][point.information_set] = min(1.0, actions["bet"])
        return Strategy(tables, found.samples)

    def script(self, name: str) -> Strategy | None:
        """Of players with a table, and of the random one."""
        player: Player = Kuhn.player(name)
        if isinstance(player, KuhnPlayer):
            return Strategy({agent: player.strategy for (agent,) in self.sides})
        if isinstance(player, RandomPlayer):
            return Strategy({agent: dict.fromkeys(INFORMATION_SETS, 0.5) for (agent,) in self.sides})
        return None

    def average(self, strategies: Sequence[Strategy]) -> Strategy:
        """The behaviour that plays like drawing one before each hand: each counts as often as it gets there itself."""
        tables: dict[str, dict[InformationSet, float]] = {}
        for (agent,) in self.sides:
            mine = [strategy.tables[agent] for strategy in strategies]
            tables[agent] = {
                each: float(np.average([table[each] for table in mine], weights=_reach(each, mine)))
                for each in mine[0]
            }
        return Strategy(tables, _samples(strategies))

    def returns(self, cast: Sequence[Strategy]) -> list[float]:
        """Over the seatings."""
        tables = self._tables(cast)
        found = dict.fromkeys(tables, 0.0)
        for first, second in self._seatings:
            value = exploitability(tables[first], tables[second]).value / len(self._seatings)
            found[first] += value
            found[second] -= value
        return [found[agent] for (agent,) in self.sides]

    def worth(self, strategy: Strategy) -> GameValue:
        """Over the seatings; the values are by seat."""
        found = [
            exploitability(strategy.tables[first], strategy.tables[second]) for first, second in self._seatings
        ]
        value = float(np.mean([each.value for each in found]))
        gains = np.mean([(each.first_gain, each.second_gain) for each in found], axis=0).tolist()
        return GameValue(
            exploitability=sum(gains) / 2 / ANTES,
            unit="pots",
            nash_conv=sum(gains),
            values=dict(zip(SEATS, (value, -value), strict=True)),
            gains=dict(zip(SEATS, gains, strict=True)),
            samples=strategy.samples,
        )

    def _tables(self, cast: Sequence[Strategy]) -> dict[str, Mapping[InformationSet, float]]:
        return {agent: strategy.tables[agent] for (agent,), strategy in zip(self.sides, cast, strict=True)}


class MatrixGame:
    """A game in normal form that is played once; a strategy has each side's distribution over its joint actions.

    A side's exploitability is what all of its agents could gain together.
    """

    def __init__(self, env: Matrix, sides: Sequence[Sequence[str]]) -> None:
        self.env = env
        self.sides = tuple(tuple(side) for side in sides)
        order = [env.agents.index(agent) for side in self.sides for agent in side]
        moved = np.transpose(env.game.payoffs, (*order, len(env.agents)))
        shape = [math.prod(env.game.actions[env.agents.index(agent)] for agent in side) for side in self.sides]
        members = [[env.agents.index(agent) for agent in side] for side in self.sides]
        shares = [moved[..., mine].mean(axis=-1).reshape(shape) for mine in members]
        self._payoffs: NDArray[np.float64] = np.stack(shares)
        """Shape (sides, joint actions of the first side, ...)."""

    def ask(self, team: GenerativeTeam, player: str | None = None) -> Strategy:
        """From the policy's probabilities at the only views that there are; agents of a side choose independently."""
        views = Matrix(self.env.params, 0).reset()
        agents = self.env.agents
        found = behaviour(team, [_request(views[agent], self.env, player) for agent in agents], SAMPLES)
        chances = {agent: np.array(list(each.values())) for agent, each in zip(agents, found.actions, strict=True)}
        return Strategy(self._joint(chances), found.samples)

    def script(self, name: str) -> Strategy | None:
        """Of the expert and the random player."""
        joint = self.env.game.recommended()
        if name == "random" or (name == "expert" and joint is None):
            pure: dict[str, NDArray[np.float64]] = {
                agent: np.full(count, 1 / count)
                for agent, count in zip(self.env.agents, self.env.game.actions, strict=True)
            }
        elif name == "expert" and joint is not None:
            pure = {
                agent: np.eye(count)[chosen]
                for agent, count, chosen in zip(self.env.agents, self.env.game.actions, joint, strict=True)
            }
        else:
            return None
        return Strategy(self._joint(pure))

    def average(self, strategies: Sequence[Strategy]) -> Strategy:
        """The mean of the joint distributions."""
        tables = {
            self._name(side): np.mean([strategy.tables[self._name(side)] for strategy in strategies], axis=0)
            for side in self.sides
        }
        return Strategy(tables, _samples(strategies))

    def returns(self, cast: Sequence[Strategy]) -> list[float]:
        """The mean over a side's agents."""
        chances = [strategy.tables[self._name(side)] for side, strategy in zip(self.sides, cast, strict=True)]
        return [float(_expected(self._payoffs[index], chances, None)) for index in range(len(self.sides))]

    def worth(self, strategy: Strategy) -> GameValue:
        """Best responses are a side's best joint action."""
        chances = [strategy.tables[self._name(side)] for side in self.sides]
        values = self.returns([strategy] * len(self.sides))
        gains = [
            max(0.0, float(np.max(_expected(self._payoffs[index], chances, index))) - values[index])
            for index in range(len(self.sides))
        ]
        names = [self._name(side) for side in self.sides]
        return GameValue(
            exploitability=sum(gains) / len(gains),
            unit="payoff",
            nash_conv=sum(gains),
            values=dict(zip(names, values, strict=True)),
            gains=dict(zip(names, gains, strict=True)),
            samples=strategy.samples,
        )

    def describe(self, strategy: Strategy) -> dict[str, dict[str, float]]:
        """Probabilities of each side's joint actions in words."""
        found: dict[str, dict[str, float]] = {}
        for side in self.sides:
            counts = [self.env.game.actions[self.env.agents.index(agent)] for agent in side]
            words = [" ".join(NAMES[i] for i in joint) for joint in itertools.product(*map(range, counts))]
            found[self._name(side)] = dict(zip(words, strategy.tables[self._name(side)].tolist(), strict=True))
        return found

    def _joint(self, chances: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """What independent agents do together, by side."""
        return {self._name(side): _product([chances[agent] for agent in side]) for side in self.sides}

    @staticmethod
    def _name(side: Sequence[str]) -> str:
        return "+".join(side)


def _request(observation: Observation, env: Kuhn | Matrix, player: str | None) -> TurnRequest:
    return TurnRequest(
        episode="",
        agent=observation.agent,
        observation=observation,
        inbox=(),
        others=tuple(agent for agent in env.agents if agent != observation.agent),
        language=env.language,
        seed=derive_seed(0, "strategy", observation.agent),
        env=env,
        player=player,
    )


def _reach(each: InformationSet, tables: Sequence[Mapping[InformationSet, float]]) -> NDArray[np.float64]:
    """How likely each table's own moves lead there; even where none of them gets there."""
    found = np.ones(len(tables))
    for at in range(len(each.moves) - 2, -1, -2):
        bets = np.array([table[InformationSet(each.card, each.moves[:at])] for table in tables])
        found *= bets if each.moves[at] == "bet" else 1 - bets
    return found if found.sum() > 0 else np.ones(len(tables))


def _product(chances: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The joint distribution of independent choices, flat."""
    found = np.ones(1)
    for each in chances:
        found = np.outer(found, each / each.sum()).reshape(-1)
    return found


def _expected(payoffs: NDArray[np.float64], chances: Sequence[NDArray[np.float64]], free: int | None) -> Any:
    """A side's expected payoff; for every joint action of one side where it is left free."""
    found: Any = payoffs
    for index in reversed(range(len(chances))):
        if index != free:
            found = np.tensordot(found, chances[index], axes=([index], [0]))
    return found


def _samples(strategies: Sequence[Strategy]) -> int | None:
    counts = [strategy.samples for strategy in strategies if strategy.samples is not None]
    return min(counts) if counts else None
