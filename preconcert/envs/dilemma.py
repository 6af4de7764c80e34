"""The iterated prisoner's dilemma: each does better by defecting, both do better by cooperating, and both remember."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from preconcert.core import Decision, Env, Message, Observation, Player, Slot, TaskLanguage
from preconcert.envs.random_player import RandomPlayer
from preconcert.envs.registry import register
from preconcert.envs.repeated import NONE, RepeatedGame, Rounds, reward_words
from preconcert.envs.task import TaskParams

COOPERATE, DEFECT = "cooperate", "defect"
ACTIONS = (COOPERATE, DEFECT)


class DilemmaParams(TaskParams):
    """Parameters of `dilemma`."""

    rounds: int = Field(8, ge=1, le=64)
    """Rounds per episode."""
    history: int = Field(3, ge=1, le=8)
    """How many of the last rounds an agent sees."""
    temptation: float = Field(5.0, allow_inf_nan=False)
    """Pays who defects alone; the highest payoff."""
    reward: float = Field(3.0, allow_inf_nan=False)
    """Pays each of two who cooperate; more than half of temptation plus sucker."""
    punishment: float = Field(1.0, allow_inf_nan=False)
    """Pays each of two who defect."""
    sucker: float = Field(0.0, allow_inf_nan=False)
    """Pays who cooperates alone; the lowest payoff."""

    @model_validator(mode="after")
    def _is_a_dilemma(self) -> DilemmaParams:
        if not self.temptation > self.reward > self.punishment > self.sucker:
            raise ValueError(
                f"temptation = {self.temptation:g}, reward = {self.reward:g}, punishment = {self.punishment:g}, "
                f"sucker = {self.sucker:g} must fall in this order"
            )
        if not 2 * self.reward > self.temptation + self.sucker:
            raise ValueError(
                f"2 * reward = {2 * self.reward:g} must exceed temptation + sucker = "
                f"{self.temptation + self.sucker:g}, or taking turns beats cooperating"
            )
        return self


@dataclass(frozen=True, slots=True)
class Past:
    """What a strategy goes by: the rounds that it sees, oldest first, and who ever defected."""

    mine: tuple[str, ...]
    theirs: tuple[str, ...]
    my_defections: int
    their_defections: int

    @classmethod
    def of(cls, observation: Observation) -> Past:
        """Read from an observation."""
        words = observation.text.split()
        mine, theirs, count = (words.index(word) for word in ("mine", "theirs", "defections"))
        return cls(
            tuple(word for word in words[mine + 1 : theirs] if word in ACTIONS),
            tuple(word for word in words[theirs + 1 : count] if word in ACTIONS),
            int(words[count + 1]),
            int(words[count + 2]),
        )


def _tit_for_tat(past: Past) -> str:
    return past.theirs[-1] if past.theirs else COOPERATE


def _grim(past: Past) -> str:
    return DEFECT if past.their_defections else COOPERATE


def _win_stay_lose_shift(past: Past) -> str:
    if not past.mine:
        return COOPERATE
    # A round is won where the other cooperated; keeping then and changing otherwise comes to this.
    return COOPERATE if past.mine[-1] == past.theirs[-1] else DEFECT


STRATEGIES: Mapping[str, Callable[[Past], str]] = MappingProxyType({
    "tit-for-tat": _tit_for_tat,
    "always-defect": lambda past: DEFECT,
    "always-cooperate": lambda past: COOPERATE,
    "grim": _grim,
    "win-stay-lose-shift": _win_stay_lose_shift,
})
"""
`tit-for-tat` does what the other did last, `grim` defects for ever once the other has, `win-stay-lose-shift` repeats
its action while the other cooperates and changes it otherwise. All but `always-defect` begin by cooperating.
"""


class DilemmaPlayer:
    """Follows a strategy in what it sees."""

    def __init__(self, strategy: Callable[[Past], str], slip: float = 0.0) -> None:
        """
        Args:
            strategy: e.g. one of `STRATEGIES`.
            slip: probability of a random action instead.
        """
        self.strategy, self.slip = strategy, slip

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Reads the observation only."""
        if rng.random() < self.slip:
            return Decision(str(rng.choice(ACTIONS)))
        return Decision(self.strategy(Past.of(observation)))


SLIP = 0.3
"""How often the imperfect teacher acts at random; otherwise it plays tit-for-tat."""


@register
class Dilemma(RepeatedGame[DilemmaParams]):
    """Two agents cooperate or defect, round after round, and each is paid for itself.

    Defecting pays more in every round whatever the other does. The number of rounds is known, so two perfectly
    selfish agents defect from the first to the last; the strategies in `opponents` punish that to different degrees.

    Chance draws nothing, so seeds and splits are all the same game. An episode has no success: compare the returns with
    `reward` (both cooperate) and `punishment` (both defect) times `rounds`.
    """

    name = "dilemma"
    Params = DilemmaParams
    opponents: ClassVar[Mapping[str, Callable[[], Player]]] = MappingProxyType({
        **{name: partial(DilemmaPlayer, strategy) for name, strategy in STRATEGIES.items()},
        "random": RandomPlayer,
    })

    def _setup(self, rng: np.random.Generator) -> Rounds:
        params = self.params
        self.agents = ("agent_0", "agent_1")
        self.horizon = params.rounds
        self._table = {
            (COOPERATE, COOPERATE): (params.reward, params.reward),
            (COOPERATE, DEFECT): (params.sucker, params.temptation),
            (DEFECT, COOPERATE): (params.temptation, params.sucker),
            (DEFECT, DEFECT): (params.punishment, params.punishment),
        }
        self.language = TaskLanguage(
            actions=ACTIONS,
            forecast=(Slot("theirs", (NONE, *ACTIONS)),),
            rewards=reward_words(self.name, (params.temptation, params.reward, params.punishment, params.sucker)),
            default_action=DEFECT,
        )
        numbers = (str(number) for number in range(self.horizon + 1))
        fixed = ("round", "mine", "theirs", "defections", NONE)
        self.words = tuple(sorted({*self.agents, *ACTIONS, *numbers, *fixed}))
        return ()

    def _observe(self, agent: str) -> Observation:
        (other,) = self.others(agent)
        mine, theirs = self.recent(agent, self.params.history), self.recent(other, self.params.history)
        defections = (self.played(each).count(DEFECT) for each in (agent, other))
        text = (
            f"round {self._step} mine {' '.join(mine)} theirs {' '.join(theirs)} "
            f"defections {' '.join(map(str, defections))}"
        )
        return Observation(agent, text, ACTIONS, self._step, {"theirs": theirs[-1]}, (other,))

    def _legal(self, agent: str) -> tuple[str, ...]:
        return ACTIONS

    def _pay(self, actions: tuple[str, ...]) -> Sequence[float]:
        return self._table[actions[0], actions[1]]

    @classmethod
    def no_message_ceiling(cls, params: DilemmaParams) -> None:
        """There are no messages, and no success."""

    @classmethod
    def _player(cls, kind: str) -> Player:
        """The expert plays tit-for-tat, which cooperates with itself and loses to nobody by more than one round."""
        return DilemmaPlayer(_tit_for_tat, 0.0 if kind == "expert" else SLIP)
