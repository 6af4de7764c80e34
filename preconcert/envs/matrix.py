"""Matrix games: everyone chooses at once and is paid from a table, once or round after round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from preconcert.core import Decision, Env, Message, Observation, Player, Slot, TaskLanguage, UnknownNameError
from preconcert.envs.normal_form import GAMES, MAX_ACTIONS, NormalForm
from preconcert.envs.random_player import RandomPlayer
from preconcert.envs.registry import register
from preconcert.envs.repeated import NONE, RepeatedGame, Rounds, reward_words
from preconcert.envs.task import TaskParams

NAMES: tuple[str, ...] = tuple("abcdefghij"[:MAX_ACTIONS])
CUSTOM = "custom"


class MatrixParams(TaskParams):
    """Parameters of `matrix`."""

    game: str = Field("climbing")
    """A game with a name: `climbing`, `coordination`, `cycle-trap`, `fxp-counterexample`, `penalty` or `xor`; `custom`
    where `payoffs` are given."""
    payoffs: list[Any] | None = Field(None)
    """Any other game: lists nested once per agent, agent_0 outermost, then one number per agent: `payoffs[i][j]` is
    what agent_0 and agent_1 get where they do i and j."""
    rounds: int = Field(1, ge=1, le=64)
    """Rounds per episode; each shows what everyone did in the one before."""

    @model_validator(mode="before")
    @classmethod
    def _payoffs_are_custom(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("payoffs") is not None and "game" not in values:
            return {**values, "game": CUSTOM}
        return values

    @field_validator("payoffs")
    @classmethod
    def _is_a_tensor(cls, payoffs: list[Any] | None) -> list[Any] | None:
        if payoffs is not None:
            NormalForm.of(payoffs)
        return payoffs

    @model_validator(mode="after")
    def _is_one_game(self) -> MatrixParams:
        if self.game != CUSTOM and self.game not in GAMES:
            raise UnknownNameError("game", self.game, [*GAMES, CUSTOM])
        if (self.game == CUSTOM) != (self.payoffs is not None):
            given = "no payoffs" if self.payoffs is None else "payoffs of its own"
            raise ValueError(f"game = {self.game!r} with {given}; payoffs belong to game = {CUSTOM!r}")
        return self


@register
class Matrix(RepeatedGame[MatrixParams]):
    """Any game in normal form: agents act at once, and the joint action pays each of them.

    The actions of every agent are `a`, `b`, ... as many as it has. The table is not shown; it is learned from what
    comes. Chance draws nothing, so seeds and splits are all the same game.

    Where everyone is always paid the same, an episode succeeds if every round paid the highest payoff of the table;
    elsewhere it has no success.
    """

    name = "matrix"
    Params = MatrixParams

    def _setup(self, rng: np.random.Generator) -> Rounds:
        params = self.params
        self.game = NormalForm.of(params.payoffs) if params.payoffs is not None else GAMES[params.game]
        self.agents = tuple(f"agent_{index}" for index in range(self.game.agents))
        self.horizon = params.rounds
        actions = NAMES[: max(self.game.actions)]
        self.language = TaskLanguage(
            actions=actions,
            forecast=tuple(Slot(agent, (NONE, *NAMES[:count]))
                           for agent, count in zip(self.agents, self.game.actions, strict=True)),
            rewards=reward_words(self.name, self.game.payoffs.flat),
        )
        numbers = (str(number) for number in range(self.horizon + 1))
        self.words = tuple(sorted({*self.agents, *actions, *numbers, "round", NONE}))
        return ()

    def _observe(self, agent: str) -> Observation:
        last = {each: self.recent(each, 1)[0] for each in self.agents}
        text = " ".join((f"round {self._step}", *(f"{each} {action}" for each, action in last.items())))
        return Observation(agent, text, self._legal(agent), self._step, last, self.others(agent))

    def _legal(self, agent: str) -> tuple[str, ...]:
        return NAMES[: self.game.actions[self.agents.index(agent)]]

    def _pay(self, actions: tuple[str, ...]) -> Sequence[float]:
        return self.game.pay(tuple(NAMES.index(action) for action in actions))

    def _success(self, rounds: Rounds) -> bool | None:
        if not self.game.common:
            return None
        best = self.game.payoffs.max()
        return all(self._pay(actions)[0] == best for actions in rounds)

    @classmethod
    def no_message_ceiling(cls, params: MatrixParams) -> None:
        """There are no messages."""

    @classmethod
    def _player(cls, kind: str) -> Player:
        return MatrixPlayer() if kind == "expert" else MatrixPlayer(SLIP)


SLIP = 0.55
"""How often the imperfect teacher acts at random."""


class MatrixPlayer:
    """Plays its part of `NormalForm.recommended`: the best joint action where all are paid the same.

    It acts at random where the game has no pure equilibrium.
    """

    def __init__(self, slip: float = 0.0) -> None:
        """
        Args:
            slip: probability of a random action instead.
        """
        self.slip = slip

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Takes the table from the environment."""
        assert isinstance(env, Matrix)
        joint = env.game.recommended()
        if joint is None or rng.random() < self.slip:
            return RandomPlayer().decide(env, observation, inbox, rng)
        return Decision(NAMES[joint[env.agents.index(observation.agent)]])
