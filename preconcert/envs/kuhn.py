"""Kuhn poker: three cards, an ante, one bet; the smallest game in which one must bluff.

Parts: the task, its players, and `decision_points`, which puts every information set as the observation that an agent
reads, so that a policy can be asked for its whole strategy. What a strategy is worth is in `kuhn_exploitability`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from preconcert.core import Decision, Env, Message, Observation, Player, Slot, TaskLanguage, UnknownNameError
from preconcert.envs.kuhn_exploitability import (
    ANTES,
    CARDS,
    INFORMATION_SETS,
    SEATS,
    InformationSet,
    Strategy,
    equilibrium,
    winnings,
)
from preconcert.envs.random_player import RandomPlayer
from preconcert.envs.registry import register
from preconcert.envs.task import Outcome, Task, TaskParams, Variety

AGENTS = ("agent_0", "agent_1")
MOVES = ("pass", "bet")
_LONGEST = 3
"""Moves of the longest hand."""


class KuhnParams(TaskParams):
    """Parameters of `kuhn`."""

    first: Literal["drawn", "agent_0", "agent_1"] = Field("drawn")
    """Who acts first: drawn by the seed, so that each agent learns both seats, or always the same agent."""


@dataclass(frozen=True, slots=True)
class _Deal:
    order: tuple[str, str]
    """The agents by seat."""
    cards: tuple[str, str]
    """The cards by seat."""


def information_set_of(observation: Observation) -> InformationSet:
    """What an agent that is to act knows, read from what it sees."""
    words = observation.text.split()
    at = words.index("moves") + 1
    return InformationSet(words[words.index("card") + 1], tuple(word for word in words[at : at + 3] if word in MOVES))


class KuhnPlayer:
    """Plays a strategy table from what it sees."""

    def __init__(self, strategy: Strategy) -> None:
        """
        Args:
            strategy: probability of `bet` at all twelve information sets.
        """
        self.strategy = strategy

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Reads the observation only."""
        if observation.legal_actions == ("wait",):
            return Decision("wait")
        bets = rng.random() < self.strategy[information_set_of(observation)]
        return Decision("bet" if bets else "pass")


def _by_card(**bets: Sequence[float]) -> Strategy:
    """A table from rows of jack, queen, king."""
    moves = {"open": (), "checked": ("pass",), "raised": ("bet",), "back": ("pass", "bet")}
    return MappingProxyType({
        InformationSet(card, moves[name]): bet
        for name, row in bets.items()
        for card, bet in zip(CARDS, row, strict=True)
    })


SCRIPT = _by_card(open=(0.4, 0.4, 0.6), checked=(0.5, 0.3, 0.8), raised=(0.25, 0.5, 0.8), back=(0.3, 0.5, 0.8))
"""The imperfect teacher: does everything at times, bluffs too often, bets queens and folds kings."""
HONEST = _by_card(open=(0, 0, 1), checked=(0, 0, 1), raised=(0, 0, 1), back=(0, 0, 1))
"""Bets and calls with the king alone."""


@register
class Kuhn(Task[KuhnParams, tuple[str, ...]]):
    """Two agents hold one of three cards each and bet one chip on whose is higher; what one wins the other loses.

    Each pays an ante of one chip. The first seat passes or bets; the second answers; after pass and bet the first seat
    answers. A bet answered by `pass` is folded, answered by `bet` called; otherwise the higher card takes the pot.
    Whoever is not to act has `wait` as its only action. The chips won are paid at the end.

    There is nothing to hold out: a strategy has to know all six deals in both seats, so both splits deal all of them.
    An episode has no success. The first seat loses 1/18 of a chip per hand where both play an equilibrium.
    """

    name = "kuhn"
    Params = KuhnParams
    variety = Variety.CHANCE
    opponents: ClassVar[Mapping[str, Callable[[], Player]]] = MappingProxyType({
        "equilibrium": partial(KuhnPlayer, equilibrium(1 / 3)),
        "honest": partial(KuhnPlayer, HONEST),
        "always-bet": partial(KuhnPlayer, dict.fromkeys(INFORMATION_SETS, 1.0)),
        "always-pass": partial(KuhnPlayer, dict.fromkeys(INFORMATION_SETS, 0.0)),
        "random": RandomPlayer,
    })

    def _setup(self, rng: np.random.Generator) -> tuple[str, ...]:
        self.agents = AGENTS
        self.horizon = _LONGEST
        self.language = TaskLanguage(
            actions=(*MOVES, "wait"),
            forecast=(Slot("move", ("none", *MOVES)), Slot("shown", ("none", *CARDS))),
            rewards=("-2", "-1", "0", "1", "2"),
            default_action="pass",
        )
        fixed = ("seat", "card", "turn", "mine", "theirs", "over", "pot", "moves", "shown", "none")
        pots = (str(chips) for chips in range(ANTES, ANTES + 3))
        self.words = tuple(sorted({*AGENTS, *SEATS, *CARDS, *MOVES, *pots, *fixed}))
        first = str(rng.choice(AGENTS)) if self.params.first == "drawn" else self.params.first
        cards = rng.permutation(CARDS)
        order = AGENTS if first == AGENTS[0] else (AGENTS[1], AGENTS[0])
        self._deal = _Deal(order, (str(cards[0]), str(cards[1])))
        return ()

    def seat_of(self, agent: str) -> str:
        """`first` or `second`."""
        return SEATS[self._deal.order.index(agent)]

    def card_of(self, agent: str) -> str:
        """The card an agent holds."""
        return self._deal.cards[self._deal.order.index(agent)]

    @staticmethod
    def role(observation: Observation) -> str:
        """The seat: agents change it from hand to hand."""
        words = observation.text.split()
        return words[words.index("seat") + 1]

    @property
    def _over(self) -> bool:
        return winnings(*self._deal.cards, self._state) is not None

    @property
    def _to_act(self) -> str | None:
        return None if self._over else self._deal.order[len(self._state) % 2]

    def _observe(self, agent: str) -> Observation:
        (other,) = set(AGENTS) - {agent}
        turn = "over" if self._over else "mine" if agent == self._to_act else "theirs"
        folded = self._over and self._state[-1] == "pass" and "bet" in self._state
        shown = self.card_of(other) if self._over and not folded else "none"
        text = (
            f"seat {self.seat_of(agent)} card {self.card_of(agent)} turn {turn} pot {self._pot} "
            f"moves {self._moves} shown {shown}"
        )
        fields = {"move": self._state[-1] if self._state else "none", "shown": shown}
        return Observation(agent, text, self._legal(agent), self._step, fields, (other,))

    @property
    def _pot(self) -> int:
        return ANTES + self._state.count("bet")

    @property
    def _moves(self) -> str:
        """As many words at every step."""
        return " ".join(self._state + ("none",) * (_LONGEST - len(self._state)))

    def _legal(self, agent: str) -> tuple[str, ...]:
        return MOVES if agent == self._to_act else ("wait",)

    def _advance(self, actions: Mapping[str, str]) -> Outcome[tuple[str, ...]]:
        assert self._to_act is not None
        moves = (*self._state, actions[self._to_act])
        won = winnings(*self._deal.cards, moves)
        if won is None:
            return Outcome(moves, dict.fromkeys(AGENTS, 0.0))
        first, second = self._deal.order
        return Outcome(moves, {first: float(won), second: float(-won)}, done=True)

    def state(self) -> str:
        """Seats, cards, the pot and the moves."""
        held = " ".join(
            f"{seat} {agent} {card}"
            for seat, agent, card in zip(SEATS, self._deal.order, self._deal.cards, strict=True)
        )
        return f"{held} pot {self._pot} moves {self._moves}"

    def board(self) -> list[str]:
        """A row per seat, an arrow where it is to act, and the pot with what was done."""
        rows = [
            f"{'>' if agent == self._to_act else ' '} {agent}  {card}"
            for agent, card in zip(self._deal.order, self._deal.cards, strict=True)
        ]
        return [*rows, f"  pot {self._pot}  {' '.join(self._state)}".rstrip()]

    def layout_key(self) -> str:
        """Who holds what, the first seat first."""
        return " ".join(f"{agent} {card}" for agent, card in zip(self._deal.order, self._deal.cards, strict=True))

    @classmethod
    def no_message_ceiling(cls, params: KuhnParams) -> None:
        """There are no messages, and no success."""

    @classmethod
    def _player(cls, kind: str) -> Player:
        return KuhnPlayer(equilibrium(1 / 3) if kind == "expert" else SCRIPT)


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """One information set as an agent meets it."""

    agent: str
    information_set: InformationSet
    observation: Observation
    env: Kuhn
    """An instance that has come there; it can be played on."""


def decision_points(agent: str, params: Mapping[str, Any] = MappingProxyType({})) -> tuple[DecisionPoint, ...]:
    """Every information set that an agent can meet, reached by playing: twelve, or six where the seats are fixed.

    Ask a policy at each for its probability of `bet`, and the answers are its strategy.

    Args:
        agent: whose views.
        params: of the task.
    """
    if agent not in AGENTS:
        raise UnknownNameError("agent", agent, AGENTS)
    first = Kuhn(params, 0).params.first
    seats = SEATS if first == "drawn" else (SEATS[first != agent],)
    seeds: dict[tuple[str, str], int] = {}
    for seed in itertools.count():
        if len(seeds) == len(seats) * len(CARDS):
            break
        env = Kuhn(params, seed)
        seeds.setdefault((env.seat_of(agent), env.card_of(agent)), seed)
    return tuple(
        _reach(agent, each, Kuhn(params, seeds[each.seat, each.card]))
        for each in INFORMATION_SETS
        if each.seat in seats
    )


def _reach(agent: str, wanted: InformationSet, env: Kuhn) -> DecisionPoint:
    """Play the moves that lead to an information set."""
    views = env.reset()
    for move in wanted.moves:
        actions = {each: move if "bet" in env.legal_actions(each) else "wait" for each in AGENTS}
        views = env.step(actions).observations
    return DecisionPoint(agent, wanted, views[agent], env)
