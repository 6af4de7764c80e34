"""Pursuit: catch an evader that follows a hidden rule, under partial views; whoever runs to where it is comes late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from pydantic import Field, model_validator

from preconcert.core import Observation, Player, Slot, TaskLanguage, Truth, View, ViewField
from preconcert.envs.evaders import RULES, Evader, Surroundings, begin, evade, path
from preconcert.envs.grid import ACTIONS, SIDES, Cell, cells, chebyshev, draw_board, manhattan, offset, walk
from preconcert.envs.grid_view import cell_fields, number_field, numbers, offset_fields, wall_fields
from preconcert.envs.pursuit_players import PursuitExpert, PursuitScript, joint_plan
from preconcert.envs.registry import register
from preconcert.envs.task import Outcome, Task, TaskParams, split_of

PREY = ("prey", "prey2")
"""The labels of the evaders."""


class PursuitParams(TaskParams):
    """Parameters of `pursuit`."""

    agents: int = Field(2, ge=2, le=8)
    """Team size."""
    size: int = Field(8, ge=5, le=12)
    """Rows and columns of the grid."""
    horizon: int = Field(14, ge=6, le=64)
    """Steps until the episode is cut off."""
    view: int = Field(2, ge=1, le=4)
    """How far an agent sees evaders and the others, in rows and columns."""
    evaders: int = Field(1, ge=1, le=len(PREY))
    """How many have to be caught."""
    hands: int = Field(2, ge=1, le=8)
    """Agents that catch an evader together, at once; at most `agents`."""
    reach: int = Field(1, ge=0, le=1)
    """From how many moves away a hand takes hold."""
    walls: int = Field(0, ge=0, le=16)
    """Cells that nothing can enter."""
    families: tuple[str, ...] = ("patrol", "clockwise", "counter", "stairs")
    """Rules that evaders follow, one drawn for each."""
    heldout_families: tuple[str, ...] = ("square", "pause", "flee")
    """Rules of the held-out split, if `novel`."""
    novel: bool = False
    """Does the held-out split use `heldout_families`? Otherwise it has new layouts with the families of training."""

    @model_validator(mode="after")
    def _fits(self) -> PursuitParams:
        if self.hands > self.agents:
            raise ValueError(f"hands = {self.hands} is more than agents = {self.agents}")
        for name in ("families", "heldout_families"):
            families = getattr(self, name)
            unknown = [family for family in families if family not in RULES]
            if unknown or not families:
                raise ValueError(f"{name} = {list(families)!r} must be some of {', '.join(RULES)}")
            reacting = [family for family in families if RULES[family].reacts]
            if reacting and not self.reach and (self.novel or name == "families"):
                raise ValueError(f"reach = 0 catches nothing that reacts: leave {', '.join(reacting)} out of {name}")
        return self


@dataclass(frozen=True, slots=True)
class _State:
    agents: tuple[Cell, ...]
    evaders: tuple[Evader, ...]
    did: tuple[str, ...]
    """What each agent tried in the step before."""


@dataclass(frozen=True, slots=True)
class _Layout:
    walls: frozenset[Cell]
    state: _State


@register
class Pursuit(Task[PursuitParams, _State]):
    """Catch every evader: `hands` agents at once on its cell or, by `reach`, beside it.

    One step: agents and evaders all decide from the same moment and move at once; edges and walls stop them, they do
    not stop each other, and two that swap cells pass. Then an evader with `hands` agents in reach is caught and takes
    no further part. All agents are paid 1 when the last one is; that ends the episode.

    Each evader follows a rule of `evaders.RULES`, drawn from `families` and never told. An agent sees what is within
    `view`: an evader with its last two moves, the nearest other agent with its last action. At first a single agent
    sees the first evader, and what is said is read one step later, so whoever is told must think ahead to be in time.

    Every layout can be won by those who know the rules, with at least a step to spare. Evaders come by and others can
    be seen, so there is no exact ceiling without messages.
    """

    name = "pursuit"
    Params = PursuitParams
    opponents = MappingProxyType({"interceptor": lambda: PursuitScript(foresight=True)})

    def _setup(self, rng: np.random.Generator) -> _State:
        params = self.params
        self.agents = tuple(f"agent_{index}" for index in range(params.agents))
        self.horizon = params.horizon
        families = params.heldout_families if params.novel and self.split == "heldout" else params.families
        self.preys = PREY[: params.evaders]
        rows = numbers(params.size - 1)
        maybe = (*rows, "none")
        view = _view(params)
        foretold = ("row", "col", *(f"{prey}_{part}" for prey in self.preys for part in ("down", "right")))
        self.language = TaskLanguage(
            actions=ACTIONS,
            message=(
                Slot("preyrow", maybe, null="none"),
                Slot("preycol", maybe, null="none"),
                Slot("preywent", (*ACTIONS, "none"), null="none"),
                Slot("next", ACTIONS, Truth.OWN_NEXT_ACTION),
            ),
            forecast=tuple(Slot(name, view.fields[view.index(name)].choices) for name in foretold),
            rewards=("0", "1"),
            default_action="stay",
            view=view,
        )
        shown = {word for field in view.fields for word in (*field.choices, *field.label.split())}
        self.words = tuple(sorted({*shown, *self.agents, *maybe, *RULES, *PREY, "caught", "wall"}))
        rules = [str(rng.choice(families)) for _ in self.preys]  # before the search, so that all are met equally often
        self.layout = self._search(lambda: self._draw(rng, rules), _key)
        self.walls = self.layout.walls
        return self.layout.state

    def _draw(self, rng: np.random.Generator, rules: Sequence[str]) -> _Layout | None:
        """Walls, evaders on their way, an agent that sees the first one, and others out of sight of all its way; None
        where that does not work out or they could not be caught in time."""
        params, grid = self.params, cells(self.params.size)
        walls = frozenset(grid[index] for index in rng.choice(len(grid), size=params.walls, replace=False))
        free = [cell for cell in grid if cell not in walls]
        evaders = tuple(begin(rule, free[rng.integers(len(free))], params.size, walls, rng) for rule in rules)
        if any(evader.went == ("stay", "stay") and not RULES[evader.rule].reacts for evader in evaders):
            return None  # in the middle of its orbit, or walled in
        way = {evaders[0].cell}
        if not RULES[rules[0]].reacts:
            way |= set(path(evaders[0], Surroundings(params.size, walls, (), ()), params.horizon))
        near = [cell for cell in free if chebyshev(cell, evaders[0].cell) <= params.view]
        away = [cell for cell in free if min(chebyshev(cell, passed) for passed in way) > params.view]
        if not away:
            return None
        starts = [near[rng.integers(len(near))], *(away[at] for at in rng.integers(len(away), size=params.agents - 1))]
        agents = tuple(starts[index] for index in rng.permutation(params.agents))
        layout = _Layout(walls, _State(agents, evaders, ("stay",) * params.agents))
        return layout if split_of(_key(layout)) == self.split and self._can_be_won(layout) else None

    def _can_be_won(self, layout: _Layout) -> bool:
        """Does a team that knows everything succeed with a step to spare, and not at once?"""
        walls, state = layout.walls, layout.state
        if any(self._in_reach(evader, state.agents) >= self.params.hands for evader in state.evaders):
            return False
        for step in range(self.horizon - 1):
            around = self._around(walls, state)
            moves = joint_plan(around, state.evaders, self.params.hands, self.params.reach, self.horizon - step)
            state = self._after(walls, state, moves)
            if all(evader.caught for evader in state.evaders):
                return step > 0
        return False

    def _around(self, walls: frozenset[Cell], state: _State) -> Surroundings:
        return Surroundings(self.params.size, walls, state.agents, state.did)

    def _in_reach(self, evader: Evader, agents: tuple[Cell, ...]) -> int:
        return sum(manhattan(cell, evader.cell) <= self.params.reach for cell in agents)

    def _after(self, walls: frozenset[Cell], state: _State, moves: tuple[str, ...]) -> _State:
        """The state one step later."""
        around = self._around(walls, state)
        agents = tuple(
            walk(cell, move, self.params.size, walls) for cell, move in zip(state.agents, moves, strict=True)
        )
        evaders = tuple(evade(evader, around) for evader in state.evaders)
        caught = tuple(
            replace(evader, caught=evader.caught or self._in_reach(evader, agents) >= self.params.hands)
            for evader in evaders
        )
        return _State(agents, caught, moves)

    def _observe(self, agent: str) -> Observation:
        state, sight = self._state, self.params.view
        here = self.cell_of(agent)
        fields = {"row": str(here[0]), "col": str(here[1])}
        seen = []
        for prey, evader in zip(self.preys, state.evaders, strict=True):
            visible = not evader.caught and chebyshev(here, evader.cell) <= sight
            where = offset(here, evader.cell, sight) if visible else "far far"
            fields[f"{prey}_down"], fields[f"{prey}_right"] = where.split()
            seen.append(f"{prey} {where} went {' '.join(evader.went) if visible else 'none none'}")
        mates = [
            (chebyshev(here, cell), other, cell, did)
            for other, cell, did in zip(self.agents, state.agents, state.did, strict=True)
            if other != agent and chebyshev(here, cell) <= sight
        ]
        nearest = min(mates, default=None)
        mate = f"{offset(here, nearest[2], sight)} did {nearest[3]}" if nearest else "far far did none"
        text = (
            f"left {self.horizon - self._step} did {state.did[self.agents.index(agent)]} row {here[0]} col {here[1]} "
            f"{' '.join(seen)} mate {mate}"
        )
        if self.params.walls:
            shut = (walk(here, side, self.params.size, self.walls) == here for side in SIDES)
            text += " walls " + " ".join("wall" if closed else "free" for closed in shut)
        return Observation(agent, text, ACTIONS, self._step, fields, tuple(other for _, other, _, _ in mates))

    def _legal(self, agent: str) -> tuple[str, ...]:
        return ACTIONS

    def _advance(self, actions: Mapping[str, str]) -> Outcome[_State]:
        state = self._after(self.walls, self._state, tuple(actions[agent] for agent in self.agents))
        success = all(evader.caught for evader in state.evaders)
        done = success or self._step + 1 == self.horizon
        rewards = dict.fromkeys(self.agents, float(success))
        return Outcome(state, rewards, done, success if done else None, done and not success)

    @property
    def around(self) -> Surroundings:
        """What evaders can look at now."""
        return self._around(self.walls, self._state)

    @property
    def evaders(self) -> tuple[Evader, ...]:
        """The evaders as they are now."""
        return self._state.evaders

    def after(self, moves: tuple[str, ...]) -> tuple[Surroundings, tuple[Evader, ...]]:
        """What evaders could look at, and the evaders, if the agents now moved so."""
        state = self._after(self.walls, self._state, moves)
        return self._around(self.walls, state), state.evaders

    def cell_of(self, agent: str) -> Cell:
        """Where an agent is."""
        return self._state.agents[self.agents.index(agent)]

    def path_of(self, evader: Evader, steps: int) -> list[Cell]:
        """Where an evader is now and will be, if the agents stood still."""
        return path(evader, self.around, steps)

    def positions(self) -> Mapping[str, Cell]:
        """Every agent's cell."""
        return dict(zip(self.agents, self._state.agents, strict=True))

    def state(self) -> str:
        """Time left, each evader's cell, rule, memory and last moves, the walls and the agents' cells."""
        parts = [f"left {self.horizon - self._step}"]
        for prey, evader in zip(self.preys, self.evaders, strict=True):
            where = "caught" if evader.caught else f"{evader.cell[0]} {evader.cell[1]}"
            parts.append(f"{prey} {where} {evader.rule} {' '.join((*evader.memory, 'went', *evader.went))}")
        parts += [f"wall {row} {column}" for row, column in sorted(self.walls)]
        parts += [
            f"{agent} {row} {column} did {did}"
            for agent, (row, column), did in zip(self.agents, self._state.agents, self._state.did, strict=True)
        ]
        return " ".join(parts)

    def board(self) -> list[str]:
        """Walls as #, evaders as E until they are caught, agents as numbers."""
        marks = [(cell, "#") for cell in self.walls]
        marks += [(evader.cell, "E") for evader in self.evaders if not evader.caught]
        return draw_board(self.params.size, marks + [(cell, str(at)) for at, cell in enumerate(self._state.agents)])

    def layout_key(self) -> str:
        """The walls, where and by which rules the evaders begin, and where the agents do."""
        return _key(self.layout)

    @classmethod
    def no_message_ceiling(cls, params: PursuitParams) -> None:
        """Not known: evaders come by, and others can be seen at work."""

    @classmethod
    def _player(cls, kind: str) -> Player:
        return PursuitExpert() if kind == "expert" else PursuitScript()


def _view(params: PursuitParams) -> View:
    """The parts of what an agent reads. Its own next cell follows from them: walls beside it are shown where there
    are any, and nothing else is in its way."""
    fields = [
        number_field("left", params.horizon, determined=True),
        ViewField("did", ACTIONS, "did", determined=True),
        *cell_fields(params.size, determined=True),
    ]
    maybe = (*ACTIONS, "none")
    for prey in PREY[: params.evaders]:
        fields += offset_fields(prey, params.view)
        fields += [ViewField(f"{prey}_went", maybe, "went"), ViewField(f"{prey}_before", maybe)]
    fields += [*offset_fields("mate", params.view), ViewField("mate_did", maybe, "did")]
    return View((*fields, *(wall_fields(SIDES) if params.walls else ())))


def _key(layout: _Layout) -> str:
    """Walls, evaders and agents as they begin."""
    parts = [f"wall {row} {column}" for row, column in sorted(layout.walls)]
    parts += [" ".join((evader.rule, *map(str, evader.cell), *evader.memory)) for evader in layout.state.evaders]
    return " ".join((*parts, *(f"agent {row} {column}" for row, column in layout.state.agents)))
