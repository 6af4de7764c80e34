"""Box-push: two agents at once move a heavy box in a direction that only one agent knows, under partial views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from preconcert.core import Observation, Player, Slot, TaskLanguage, Truth, View, ViewField
from preconcert.envs.box_push_players import BoxPushExpert, BoxPushScript
from preconcert.envs.grid import (
    ACTIONS,
    OPPOSITE,
    SIDES,
    Cell,
    cells,
    chebyshev,
    distances,
    draw_board,
    inside,
    offset,
    shift,
    walk,
)
from preconcert.envs.grid_view import cell_fields, number_field, offset_fields, wall_fields
from preconcert.envs.registry import register
from preconcert.envs.task import Outcome, Task, TaskParams


class BoxPushParams(TaskParams):
    """Parameters of `box-push`."""

    agents: int = Field(2, ge=2, le=8)
    """Team size; two at once can push."""
    size: int = Field(6, ge=3, le=12)
    """Rows and columns of the grid; at least 2 * push + 1."""
    horizon: int = Field(16, ge=6, le=64)
    """Steps until the episode is cut off."""
    view: int = Field(2, ge=1, le=4)
    """How far an agent sees the box and the others, in rows and columns."""
    walls: int = Field(3, ge=0, le=32)
    """Cells that nothing can enter."""
    push: int = Field(2, ge=1, le=5)
    """Cells from the box to the goal."""


@dataclass(frozen=True, slots=True)
class _Layout:
    walls: frozenset[Cell]
    box: Cell
    starts: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class _State:
    agents: tuple[Cell, ...]
    box: Cell
    did: tuple[str, ...]
    """What each agent tried in the step before."""


@register
class BoxPush(Task[BoxPushParams, _State]):
    """Bring the box to the goal, a few cells away in a straight line.

    The box moves one cell when at least two agents stand on the cell behind it and move towards it in the same step,
    and the cell ahead is free of walls and agents; those agents move along. Whoever else walks into the box, a wall or
    the edge stays in place. `goal` in the informed agent's view is the direction from the box's first cell; a push
    along another line cannot always be undone.

    Every layout leaves all four directions open and in reach, so it tells nothing about the direction. Others can
    be seen at work, so there is no exact ceiling without messages.
    """

    name = "box-push"
    Params = BoxPushParams

    def _setup(self, rng: np.random.Generator) -> _State:
        params = self.params
        self.agents = tuple(f"agent_{index}" for index in range(params.agents))
        self.horizon = params.horizon
        rows = tuple(str(row) for row in range(params.size))
        maybe = (*rows, "none")
        self.language = TaskLanguage(
            actions=ACTIONS,
            message=(
                Slot("goal", (*SIDES, "unknown"), null="unknown"),
                Slot("boxrow", maybe, null="none"),
                Slot("boxcol", maybe, null="none"),
                Slot("next", ACTIONS, Truth.OWN_NEXT_ACTION),
            ),
            forecast=(Slot("row", rows), Slot("col", rows)),
            rewards=("0", "1"),
            default_action="stay",
            view=_view(params),
        )
        offsets = (f"{side}{far}" for side in "nsew" for far in range(1, params.view + 1))
        fixed = (
            "left", "did", "row", "col", "goal", "unknown", "box", "mate", "walls", "free", "wall", "far", "v0", "h0",
            "informed",
        )  # fmt: skip
        lefts = (str(left) for left in range(self.horizon + 1))
        self.words = tuple(sorted({*self.agents, *rows, *ACTIONS, *offsets, *lefts, *fixed}))
        self.layout = self._search(lambda: self._draw(rng), _key)
        self.walls = self.layout.walls
        self.direction = str(rng.choice(SIDES))
        self.informed = str(rng.choice(self.agents))
        self.goal = shift(self.layout.box, self.direction, params.push)
        return _State(self.layout.starts, self.layout.box, ("stay",) * params.agents)

    def _draw(self, rng: np.random.Generator) -> _Layout | None:
        """A box that can go all four ways, walls off its lines, and starts from which there is time for each way."""
        params, grid = self.params, cells(self.params.size)
        boxes = [cell for cell in grid if all(inside(shift(cell, side, params.push), params.size) for side in SIDES)]
        if not boxes:
            return None
        box = boxes[rng.integers(len(boxes))]
        lines = {shift(box, side, times) for side in SIDES for times in range(params.push + 1)}
        rest = [cell for cell in grid if cell not in lines]
        if len(rest) < params.walls:
            return None
        walls = frozenset(rest[index] for index in rng.choice(len(rest), size=params.walls, replace=False))
        away = [distances(shift(box, side), params.size, walls | {box}) for side in SIDES]
        limit = params.horizon - params.push - 2  # one step for the first message, one to spare
        starts = [cell for cell in grid if all(cell in reach and reach[cell] <= limit for reach in away)]
        if not starts:
            return None
        chosen = tuple(starts[index] for index in rng.integers(len(starts), size=params.agents))
        close = min(chebyshev(cell, box) for cell in chosen) <= params.view + 1
        return _Layout(walls, box, chosen) if close else None

    def _observe(self, agent: str) -> Observation:
        here = self.cell_of(agent)
        mates = [
            (chebyshev(here, cell), other, cell)
            for other, cell in zip(self.agents, self._state.agents, strict=True)
            if other != agent and chebyshev(here, cell) <= self.params.view
        ]
        box = offset(here, self._state.box, self.params.view)
        mate = offset(here, min(mates)[2], self.params.view) if mates else "far far"
        sides = (walk(here, side, self.params.size, self.walls) == here for side in SIDES)
        walls = " ".join("wall" if shut else "free" for shut in sides)
        known = self.direction if agent == self.informed else "unknown"
        did = self._state.did[self.agents.index(agent)]
        text = (
            f"left {self.horizon - self._step} did {did} row {here[0]} col {here[1]} goal {known} "
            f"box {box} mate {mate} walls {walls}"
        )
        fields = {"row": str(here[0]), "col": str(here[1])}
        return Observation(agent, text, ACTIONS, self._step, fields, tuple(other for _, other, _ in mates))

    def _legal(self, agent: str) -> tuple[str, ...]:
        return ACTIONS

    def _advance(self, actions: Mapping[str, str]) -> Outcome[_State]:
        box, cells_now = self._state.box, self._state.agents
        side = self._pushed(actions)
        after = shift(box, side) if side else box
        behind = shift(box, OPPOSITE[side]) if side else None
        blocked = self.walls | {box, after}
        moved = tuple(
            box if cell == behind and actions[agent] == side else walk(cell, actions[agent], self.params.size, blocked)
            for agent, cell in zip(self.agents, cells_now, strict=True)
        )
        success = after == self.goal
        done = success or self._step + 1 == self.horizon
        rewards = dict.fromkeys(self.agents, float(success))
        state = _State(moved, after, tuple(actions[agent] for agent in self.agents))
        return Outcome(state, rewards, done, success if done else None, done and not success)

    def _pushed(self, actions: Mapping[str, str]) -> str | None:
        """The way the box goes in this step; None where it stays, also when it is pushed two ways at once."""
        box, ways = self._state.box, []
        for side in SIDES:
            behind, ahead = shift(box, OPPOSITE[side]), shift(box, side)
            pushing = sum(
                cell == behind and actions[agent] == side
                for agent, cell in zip(self.agents, self._state.agents, strict=True)
            )
            if pushing >= 2:
                ways.append((side, ahead))
        if len(ways) != 1:
            return None
        side, ahead = ways[0]
        free = inside(ahead, self.params.size) and ahead not in self.walls and ahead not in self._state.agents
        return side if free else None

    @property
    def box(self) -> Cell:
        """Where the box is."""
        return self._state.box

    def cell_of(self, agent: str) -> Cell:
        """Where an agent is."""
        return self._state.agents[self.agents.index(agent)]

    def positions(self) -> Mapping[str, Cell]:
        """Every agent's cell."""
        return dict(zip(self.agents, self._state.agents, strict=True))

    def state(self) -> str:
        """Time left, the direction, who knows it, and the cells of box, goal, walls and agents."""
        walls = " ".join(f"wall {row} {column}" for row, column in sorted(self.walls))
        where = " ".join(
            f"{agent} {row} {column}" for agent, (row, column) in zip(self.agents, self._state.agents, strict=True)
        )
        parts = (
            f"left {self.horizon - self._step} goal {self.direction} {self.goal[0]} {self.goal[1]}",
            f"informed {self.informed} box {self.box[0]} {self.box[1]}", walls, where,
        )
        return " ".join(part for part in parts if part)

    def board(self) -> list[str]:
        """Walls as #, the box as B, the goal as G, agents as numbers."""
        marks = [(cell, "#") for cell in self.walls] + [(self.goal, "G"), (self.box, "B")]
        agents = [(cell, str(index)) for index, cell in enumerate(self._state.agents)]
        return draw_board(self.params.size, marks + agents)

    def layout_key(self) -> str:
        """The cells of the box and of the walls."""
        return _key(self.layout)

    @classmethod
    def no_message_ceiling(cls, params: BoxPushParams) -> None:
        """Not known: others can be seen, so actions can tell."""

    @classmethod
    def _player(cls, kind: str) -> Player:
        return BoxPushExpert() if kind == "expert" else BoxPushScript()


def _view(params: BoxPushParams) -> View:
    """The parts of what an agent reads.

    The next cell follows from the view for two agents without walls only: whether the box gives way may depend on a
    wall beyond it, and in larger teams on agents out of view.
    """
    return View(
        (
            number_field("left", params.horizon, determined=True),
            ViewField("did", ACTIONS, "did", determined=True),
            *cell_fields(params.size, determined=params.agents == 2 and params.walls == 0),
            ViewField("goal", (*SIDES, "unknown"), "goal", determined=True),
            *offset_fields("box", params.view),
            *offset_fields("mate", params.view),
            *wall_fields(SIDES),
        )
    )


def _key(layout: _Layout) -> str:
    walls = " ".join(f"wall {row} {column}" for row, column in sorted(layout.walls))
    return f"box {layout.box[0]} {layout.box[1]} {walls}".rstrip()
