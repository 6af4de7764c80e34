"""A tiny task whose best plan is known, and its exact world model: three turns left or right, paid by a table.

`left` pays 0.1 at once and spoils the rest; `right left right` pays 1 at the end. A mine can be laid on any way: there
the world model writes nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preconcert.core import (
    ImaginedStep,
    Judgement,
    Move,
    Observation,
    Outcome,
    StepResult,
    TaskLanguage,
    Turn,
    TurnRequest,
    View,
    ViewField,
)

ACTIONS = ("left", "right")
LENGTH = 3
BEST = ("right", "left", "right")
MARKS = ("none", *ACTIONS)
VIEW = View(tuple(ViewField(f"turn_{n}", MARKS, label=f"t{n}", determined=True) for n in range(LENGTH)))
LANGUAGE = TaskLanguage(actions=ACTIONS, rewards=("0", "0.1", "1"), view=VIEW)
Way = tuple[str, ...]


def seen(way: Way) -> Observation:
    """The view after these actions."""
    return Observation("solo", VIEW.render([*way, *["none"] * (LENGTH - len(way))]), ACTIONS, len(way))


def pays(way: Way) -> float:
    """The reward of the last action of a way."""
    if len(way) == 1:
        return 0.1 if way == ("left",) else 0.0
    return float(way == BEST)


class Corridor:
    """The real thing, a `core.Env`."""

    agents = ("solo",)
    horizon = LENGTH
    language = LANGUAGE

    def __init__(self) -> None:
        self.way: Way = ()

    def reset(self) -> Mapping[str, Observation]:
        return {"solo": seen(self.way)}

    def step(self, actions: Mapping[str, str]) -> StepResult:
        self.way = (*self.way, actions["solo"])
        done = len(self.way) == LENGTH
        return StepResult(
            {"solo": seen(self.way)}, {"solo": pays(self.way)}, done, self.way == BEST if done else None
        )

    def state(self) -> str:
        return " ".join(self.way) or "start"

    def snapshot(self) -> Any:
        return self.way

    def restore(self, snapshot: Any) -> None:
        self.way = snapshot

    def legal_actions(self, agent: str) -> tuple[str, ...]:
        return ACTIONS


@dataclass
class ExactModel:
    """A `WorldModel` that knows the corridor, and counts how it is asked."""

    values: bool = False
    """Say what the uniform policy still earns."""
    mine: Way | None = None
    """The way on which it writes nonsense."""
    right_for: int = LENGTH
    """Steps ahead that it imagines truly; beyond, it takes left for right."""
    gamble: float = 0.0
    """What `left` pays or costs by chance, at even odds, on top of what it pays."""
    doubtful: bool = False
    """After `left`, show by chance, at even odds, what is seen after `right`."""
    calls: list[int] = field(default_factory=list)
    """The size of each batch."""
    finished: list[str] = field(default_factory=list)

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        """A belief is the way so far and the number of imagined steps."""
        ways = [tuple(turn.action for turn in past) for past in pasts]
        assert [seen(way).text for way in ways] == [request.observation.text for request in requests]
        return [(way, 0) for way in ways]

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        self.calls.append(len(beliefs))
        return [self._advance(*each) for each in zip(beliefs, moves, seeds, strict=True)]

    def judge(
        self, beliefs: Sequence[Any], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        return [None for _ in beliefs]

    def finish(self, episode: str) -> None:
        self.finished.append(episode)

    def _advance(self, belief: tuple[Way, int], move: Move, seed: int) -> ImaginedStep:
        way, ahead = belief
        action = move.action
        if ahead >= self.right_for:
            action = ACTIONS[1 - ACTIONS.index(action)]
        way = (*way, action)
        if way == self.mine:
            return ImaginedStep(None, (), {}, 0.0, False, None, None, malformed=True)
        done = len(way) == LENGTH
        luck = self.gamble * (1 if np.random.default_rng(seed).random() < 0.5 else -1) if way == ("left",) else 0.0
        value = (0.0 if done else worth(way)) if self.values else None
        mistaken = self.doubtful and way == ("left",) and np.random.default_rng(seed).random() < 0.5
        shown = seen(("right",) if mistaken else way)
        return ImaginedStep(shown, (), {}, pays(way) + luck, done, value, (way, ahead + 1))


def worth(way: Way) -> float:
    """What the uniform policy earns from here on."""
    if len(way) == LENGTH:
        return 0.0
    return sum(0.5 * (pays((*way, action)) + worth((*way, action))) for action in ACTIONS)


def request_at(way: Way = (), seed: int = 0, episode: str = "e") -> TurnRequest:
    """A decision in the corridor."""
    env = Corridor()
    env.way = way
    return TurnRequest(episode, "solo", seen(way), (), (), LANGUAGE, seed, env)
