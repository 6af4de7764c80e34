"""Evaders of `pursuit` and the rules by which they move; none of them draws anything at random.

Parts: `Evader`, one of them at one moment; `RULES`, the families of rules by name; `begin` and `evade`. A rule decides
from the moment before the step, as the agents do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preconcert.envs.grid import ACTIONS, OPPOSITE, SIDES, Cell, manhattan, shift, walk

ALARM = 3
"""From how many moves away an agent makes `flee` run."""
STRIDE = 2
"""After so many moves `pause` rests for a step, and `square` turns."""
_RIGHT = {"north": "east", "east": "south", "south": "west", "west": "north"}


@dataclass(frozen=True, slots=True)
class Evader:
    """One evader at one moment."""

    rule: str
    """A name in `RULES`."""
    cell: Cell
    memory: tuple[str, ...] = ()
    """What the rule has to remember, e.g. its heading."""
    went: tuple[str, str] = ("stay", "stay")
    """Its last move and the one before."""
    caught: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an evader can look at."""

    size: int
    walls: Collection[Cell]
    agents: Sequence[Cell]
    """In the order of the agents' names."""
    did: Sequence[str]
    """What each agent tried in the step before."""

    def free(self, cell: Cell, move: str) -> bool:
        """Does the move lead to another cell?"""
        return walk(cell, move, self.size, self.walls) != cell

    def nearest(self, cell: Cell) -> int:
        """Number of the agent that is fewest moves away, the first of equals."""
        return min(range(len(self.agents)), key=lambda index: manhattan(cell, self.agents[index]))


Step = tuple[str, tuple[str, ...]]
"""The move, and what is remembered from now on."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A family of hidden rules."""

    begin: Callable[[np.random.Generator], tuple[str, ...]]
    """Draws what is remembered at the start."""
    move: Callable[[Evader, Surroundings], Step]
    reacts: bool = False
    """Does it look at the agents? Otherwise its whole path is settled from the start."""


def _onward(cell: Cell, heading: str, around: Surroundings) -> tuple[str, str]:
    """The move straight on, back where the way is shut, and the heading from then on."""
    if not around.free(cell, heading):
        heading = OPPOSITE[heading]
    return (heading if around.free(cell, heading) else "stay"), heading


def _patrol(evader: Evader, around: Surroundings) -> Step:
    """On and on, and back where the way is shut."""
    move, heading = _onward(evader.cell, evader.memory[0], around)
    return move, (heading,)


def _pause(evader: Evader, around: Surroundings) -> Step:
    """Like `patrol`, with rests."""
    heading, count = evader.memory
    if int(count) == STRIDE:
        return "stay", (heading, "0")
    move, heading = _onward(evader.cell, heading, around)
    return move, (heading, str(int(count) + 1))


def _square(evader: Evader, around: Surroundings) -> Step:
    """A few moves straight on, then to the right; at once where the way is shut."""
    heading, count = evader.memory
    if int(count) == STRIDE:
        heading, count = _RIGHT[heading], "0"
    for _ in SIDES:
        if around.free(evader.cell, heading):
            return heading, (heading, str(int(count) + 1))
        heading, count = _RIGHT[heading], "0"
    return "stay", (heading, count)


def _orbit(evader: Evader, around: Surroundings) -> Step:
    """Round the middle of the grid, at the distance from the edge that it has; the other way where the way is shut."""
    for way in (evader.memory[0], "counter" if evader.memory[0] == "clockwise" else "clockwise"):
        move = _along_ring(evader.cell, around.size, way)
        if around.free(evader.cell, move):
            return move, (way,)
    return "stay", evader.memory


def _along_ring(cell: Cell, size: int, way: str) -> str:
    """The next move on the ring of cells that are as far from the edge; `stay` on a ring of one cell."""
    low = min(*cell, size - 1 - cell[0], size - 1 - cell[1])
    high = size - 1 - low
    if low == high:
        return "stay"
    row, column = cell if way == "clockwise" else (cell[1], cell[0])
    if row == low and column < high:
        move = "east"
    elif column == high and row < high:
        move = "south"
    elif row == high and column > low:
        move = "west"
    else:
        move = "north"
    return move if way == "clockwise" else {"east": "south", "south": "east", "west": "north", "north": "west"}[move]


def _stairs(evader: Evader, around: Surroundings) -> Step:
    """Rows and columns by turns, along a diagonal that is thrown back by edges and walls."""
    heading, following = evader.memory
    move, heading = _onward(evader.cell, heading, around)
    return move, (following, heading)


def _flee(evader: Evader, around: Surroundings) -> Step:
    """Away from the nearest agent once that is near; rests otherwise."""
    danger = around.agents[around.nearest(evader.cell)]
    if manhattan(evader.cell, danger) > ALARM:
        return "stay", ()
    after = {move: walk(evader.cell, move, around.size, around.walls) for move in ACTIONS}
    return max((move for move in ACTIONS if move == "stay" or after[move] != evader.cell),
               key=lambda move: manhattan(after[move], danger)), ()  # fmt: skip


def _mirror(evader: Evader, around: Surroundings) -> Step:
    """Does what the nearest agent did last, where it can."""
    did = around.did[around.nearest(evader.cell)]
    return (did if around.free(evader.cell, did) else "stay"), ()


def _heading(rng: np.random.Generator) -> tuple[str, ...]:
    return (str(rng.choice(SIDES)),)


def _two_headings(rng: np.random.Generator) -> tuple[str, ...]:
    pair = [str(rng.choice(("north", "south"))), str(rng.choice(("east", "west")))]
    return tuple(pair if rng.random() < 0.5 else pair[::-1])


RULES: Mapping[str, Rule] = {
    "patrol": Rule(_heading, _patrol),
    "clockwise": Rule(lambda rng: ("clockwise",), _orbit),
    "counter": Rule(lambda rng: ("counter",), _orbit),
    "stairs": Rule(_two_headings, _stairs),
    "pause": Rule(lambda rng: (*_heading(rng), "0"), _pause),
    "square": Rule(lambda rng: (*_heading(rng), "0"), _square),
    "flee": Rule(lambda rng: (), _flee, reacts=True),
    "mirror": Rule(lambda rng: (), _mirror, reacts=True),
}
"""Every family: back and forth along a line, round the middle either way, along diagonals, along a line with rests,
in small squares, away from the nearest agent, and what the nearest agent did last."""


def begin(rule: str, cell: Cell, size: int, walls: Collection[Cell], rng: np.random.Generator) -> Evader:
    """An evader that has been on its way for two steps, so that its last moves show what it does.

    One that reacts to agents has rested.
    """
    evader = Evader(rule, cell, RULES[rule].begin(rng))
    if RULES[rule].reacts:
        return evader
    nobody = Surroundings(size, walls, (), ())
    return evade(evade(evader, nobody), nobody)


def evade(evader: Evader, around: Surroundings) -> Evader:
    """Where an evader is one step later; one that is caught stays where it is."""
    if evader.caught:
        return evader
    move, memory = RULES[evader.rule].move(evader, around)
    return Evader(evader.rule, shift(evader.cell, move), memory, (move, evader.went[0]))


def path(evader: Evader, around: Surroundings, steps: int) -> list[Cell]:
    """Its cells now and in the coming steps, if the agents stood still from now on."""
    cells = [evader.cell]
    for _ in range(steps):
        evader = evade(evader, around)
        if around.did:
            around = Surroundings(around.size, around.walls, around.agents, ("stay",) * len(around.did))
        cells.append(evader.cell)
    return cells
