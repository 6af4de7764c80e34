"""Repeated rock-paper-scissors: nothing to win against a player without habits, everything against one with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from preconcert.core import Observation, Player, Slot, TaskLanguage
from preconcert.envs.registry import register
from preconcert.envs.repeated import NONE, RepeatedGame, Rounds
from preconcert.envs.rps_players import MOVES, OPPONENTS, RpsExpert, RpsScript, beats
from preconcert.envs.task import TaskParams

RESULTS = ("won", "lost", "draw")


class RepeatedRpsParams(TaskParams):
    """Parameters of `repeated-rps`."""

    rounds: int = Field(12, ge=1, le=64)
    """Rounds per episode."""
    history: int = Field(4, ge=1, le=8)
    """How many of the last rounds an agent sees."""


@register
class RepeatedRps(RepeatedGame[RepeatedRpsParams]):
    """Two agents play rock-paper-scissors round after round; a round pays its winner 1 and its loser -1.

    Uniform play is the equilibrium and wins nothing from anyone. Whoever plays a pattern can be read from the rounds
    that are shown: `opponents` is a population of such players.

    Chance draws nothing, so seeds and splits are all the same game, and an episode has no success.
    """

    name = "repeated-rps"
    Params = RepeatedRpsParams
    opponents = OPPONENTS

    def _setup(self, rng: np.random.Generator) -> Rounds:
        self.agents = ("agent_0", "agent_1")
        self.horizon = self.params.rounds
        self.language = TaskLanguage(
            actions=MOVES,
            forecast=(Slot("theirs", (NONE, *MOVES)), Slot("result", (NONE, *RESULTS))),
            rewards=("-1", "0", "1"),
            default_action=MOVES[0],
        )
        numbers = (str(number) for number in range(self.horizon + 1))
        fixed = ("round", "result", "mine", "theirs", NONE)
        self.words = tuple(sorted({*self.agents, *MOVES, *RESULTS, *numbers, *fixed}))
        return ()

    def _observe(self, agent: str) -> Observation:
        (other,) = self.others(agent)
        mine, theirs = self.recent(agent, self.params.history), self.recent(other, self.params.history)
        result = NONE if mine[-1] == NONE else RESULTS[_result(mine[-1], theirs[-1])]
        text = f"round {self._step} result {result} mine {' '.join(mine)} theirs {' '.join(theirs)}"
        return Observation(agent, text, MOVES, self._step, {"theirs": theirs[-1], "result": result}, (other,))

    def _legal(self, agent: str) -> tuple[str, ...]:
        return MOVES

    def _pay(self, actions: tuple[str, ...]) -> Sequence[float]:
        won = (1.0, -1.0, 0.0)[_result(*actions)]
        return (won, 0.0 - won)

    @classmethod
    def no_message_ceiling(cls, params: RepeatedRpsParams) -> None:
        """There are no messages, and no success."""

    @classmethod
    def _player(cls, kind: str) -> Player:
        return RpsExpert() if kind == "expert" else RpsScript()


def _result(mine: str, theirs: str) -> int:
    """Index into `RESULTS`."""
    return 2 if mine == theirs else 0 if mine == beats(theirs) else 1
