"""Rendezvous: meet on the one open landmark, which a single agent knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import numpy as np
from pydantic import Field

from preconcert.core import Decision, Env, Message, Observation, Player, Slot, TaskLanguage, Truth, View, ViewField
from preconcert.envs.grid import (
    ACTIONS,
    SIGNS,
    Cell,
    after_next,
    cells,
    draw_board,
    manhattan,
    sign,
    toward,
    walk,
)
from preconcert.envs.grid_view import cell_fields, number_field
from preconcert.envs.registry import register
from preconcert.envs.task import Outcome, Task, TaskParams

NAMES = ("a", "b", "c", "d", "e", "f")


class RendezvousParams(TaskParams):
    """Parameters of `rendezvous`."""

    agents: int = Field(2, ge=2, le=8)
    """Team size."""
    size: int = Field(5, ge=2, le=12)
    """Rows and columns of the grid."""
    landmarks: int = Field(3, ge=2, le=len(NAMES))
    """Landmarks, one of them open."""
    horizon: int = Field(8, ge=3, le=64)
    """Steps; every agent can reach every landmark in two fewer."""


@register
class Rendezvous(Task[RendezvousParams, tuple[Cell, ...]]):
    """Every agent must stand on the open landmark when the time is up.

    The agents cannot see each other and nothing but the last step tells whether a landmark was the open one. The open
    landmark is uniform and independent of everything an uninformed agent sees, so without messages the cell where such
    an agent ends is independent of it too: it is the right one with probability 1/landmarks at most. Heading for `a`
    while the informed agent goes to the open one reaches that, so the ceiling is exact.
    """

    name = "rendezvous"
    Params = RendezvousParams

    def _setup(self, rng: np.random.Generator) -> tuple[Cell, ...]:
        params = self.params
        self.agents = tuple(f"agent_{index}" for index in range(params.agents))
        self.horizon = params.horizon
        self.names = NAMES[: params.landmarks]
        rows = tuple(str(row) for row in range(params.size))
        self.language = TaskLanguage(
            actions=ACTIONS,
            message=(
                Slot("target", (*self.names, "unknown"), null="unknown"),
                Slot("next", ACTIONS, Truth.OWN_NEXT_ACTION),
            ),
            forecast=(Slot("row", rows), Slot("col", rows)),
            rewards=("0", "1"),
            default_action="stay",
            view=_view(params),
        )
        lefts = (str(left) for left in range(self.horizon + 1))
        fixed = ("left", "row", "col", "open", "unknown", "informed")
        self.words = tuple(sorted({*self.agents, *self.names, *rows, *lefts, *SIGNS, *fixed}))
        drawn = self._search(lambda: self._draw(rng), lambda layout: _key(layout[0]))
        self.landmarks: tuple[Cell, ...] = drawn[0]
        self.open = str(rng.choice(self.names))
        self.informed = str(rng.choice(self.agents))
        return drawn[1]

    def _draw(self, rng: np.random.Generator) -> tuple[tuple[Cell, ...], tuple[Cell, ...]] | None:
        """Landmarks and starting cells; None where some landmark would be out of reach from everywhere."""
        grid = cells(self.params.size)
        if len(grid) < self.params.landmarks:
            return None
        chosen = rng.choice(len(grid), size=self.params.landmarks, replace=False)
        landmarks = tuple(grid[index] for index in chosen)
        near = [cell for cell in grid if max(manhattan(cell, mark) for mark in landmarks) <= self.horizon - 2]
        if not near:
            return None
        return landmarks, tuple(near[index] for index in rng.integers(len(near), size=self.params.agents))

    def _observe(self, agent: str) -> Observation:
        row, column = here = self._state[self.agents.index(agent)]
        known = self.open if agent == self.informed else "unknown"
        signs = " ".join(f"{name} {sign(here, cell)}" for name, cell in zip(self.names, self.landmarks, strict=True))
        text = f"left {self.horizon - self._step} row {row} col {column} open {known} {signs}"
        return Observation(agent, text, ACTIONS, self._step, {"row": str(row), "col": str(column)})

    def _advance(self, actions: Mapping[str, str]) -> Outcome[tuple[Cell, ...]]:
        state = tuple(
            walk(cell, actions[agent], self.params.size)
            for agent, cell in zip(self.agents, self._state, strict=True)
        )
        if self._step + 1 < self.horizon:
            return Outcome(state, dict.fromkeys(self.agents, 0.0))
        success = all(cell == self.open_cell for cell in state)
        return Outcome(state, dict.fromkeys(self.agents, float(success)), done=True, success=success)

    def _legal(self, agent: str) -> tuple[str, ...]:
        return ACTIONS

    @property
    def open_cell(self) -> Cell:
        """Where the open landmark is."""
        return self.landmarks[self.names.index(self.open)]

    def cell_of(self, agent: str) -> Cell:
        """Where an agent is."""
        return self._state[self.agents.index(agent)]

    def positions(self) -> Mapping[str, Cell]:
        """Every agent's cell."""
        return dict(zip(self.agents, self._state, strict=True))

    def state(self) -> str:
        """Time left, the open landmark, who knows it, and every cell."""
        where = " ".join(
            f"{agent} {row} {column}" for agent, (row, column) in zip(self.agents, self._state, strict=True)
        )
        known = f"open {self.open} informed {self.informed}"
        return f"left {self.horizon - self._step} {known} {_key(self.landmarks)} {where}"

    def board(self) -> list[str]:
        """Landmarks as letters, the open one a capital, agents as numbers."""
        marks = [
            (cell, name.upper() if name == self.open else name)
            for name, cell in zip(self.names, self.landmarks, strict=True)
        ]
        return draw_board(self.params.size, marks + [(cell, str(index)) for index, cell in enumerate(self._state)])

    def layout_key(self) -> str:
        """The landmarks' cells, in the order of their names."""
        return _key(self.landmarks)

    @classmethod
    def no_message_ceiling(cls, params: RendezvousParams) -> float:
        """One in `landmarks`; see the class."""
        return 1.0 / params.landmarks

    @classmethod
    def _player(cls, kind: str) -> Player:
        return RendezvousExpert() if kind == "expert" else RendezvousScript()


def _view(params: RendezvousParams) -> View:
    """The parts of what an agent reads.

    A landmark's sign does not follow from the view: a plain `north` turns into `near_north` after as many steps as the
    landmark is away, which only the earlier views tell.
    """
    names = NAMES[: params.landmarks]
    return View(
        (
            number_field("left", params.horizon, determined=True),
            *cell_fields(params.size, determined=True),
            ViewField("open", (*names, "unknown"), "open", determined=True),
            *(ViewField(name, SIGNS, name) for name in names),
        )
    )


def _key(landmarks: Sequence[Cell]) -> str:
    return " ".join(f"{name} {row} {column}" for name, (row, column) in zip(NAMES, landmarks, strict=False))


def _heard(inbox: Sequence[Message], names: Sequence[str]) -> str | None:
    """The landmark named last, if any."""
    named = [message.payload.split()[0] for message in inbox if message.payload.split()]
    return next((word for word in reversed(named) if word in names), None)


class RendezvousScript:
    """An imperfect teacher that knows what an agent knows: its observation and its inbox.

    It is shy: more often than not the informed agent keeps what it knows to itself, so whoever imitates it faithfully,
    its commonest choices above all, seldom meets. Its other mistakes are rare and drawn anew at every step.
    """

    SLIP: ClassVar[float] = 0.05
    """Probability of a random action."""
    SHY: ClassVar[float] = 0.52
    """Probability that the informed agent says `unknown`."""
    MISNAME: ClassVar[float] = 0.04
    """Probability that the informed agent names another landmark."""
    MISHEAR: ClassVar[float] = 0.03
    """Probability that a listener heads for a random landmark."""
    WANDER: ClassVar[float] = 0.1
    """Probability that an agent without a target moves at random."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Walk to the landmark that is known or named, and say which it is."""
        words = observation.text.split()
        view = dict(zip(words[::2], words[1::2], strict=True))
        names = list(view)[4:]
        informed = view["open"] != "unknown"
        target = view["open"] if informed else _heard(inbox, names)
        if not informed and target is not None and rng.random() < self.MISHEAR:
            target = str(rng.choice(names))
        planned = "stay" if target is None else toward(view[target])
        wander = target is None and rng.random() < self.WANDER
        action = str(rng.choice(ACTIONS)) if wander or rng.random() < self.SLIP else planned
        following = "stay" if target is None else after_next(view[target])
        said = view["open"]
        draw = rng.random()
        if informed and draw < self.SHY:
            said = "unknown"
        elif informed and draw < self.SHY + self.MISNAME:
            said = str(rng.choice([name for name in names if name != said]))
        return Decision(action, f"{said} {following}")


class RendezvousExpert:
    """Always succeeds: walks straight to the landmark that is known or was named, and announces exactly."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Looks into the environment for its own next cell only."""
        task = cast(Rendezvous, env)
        words = observation.text.split()
        known = words[words.index("open") + 1]
        target = known if known != "unknown" else _heard(inbox, task.names)
        if target is None:
            return Decision("stay", "unknown stay")
        goal = task.landmarks[task.names.index(target)]
        here = task.cell_of(observation.agent)
        action = toward(sign(here, goal))
        after = walk(here, action, task.params.size)
        return Decision(action, f"{known} {toward(sign(after, goal))}")
