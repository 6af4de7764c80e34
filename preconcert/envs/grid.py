"""Square grids: cells, the five moves, compass signs and walking distances. Row 0 is the northern edge."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

Cell = tuple[int, int]
"""(row, column), both from 0."""

MOVES: Mapping[str, Cell] = {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1), "stay": (0, 0)}
"""Each move's change of row and column."""
ACTIONS: tuple[str, ...] = tuple(MOVES)
SIDES: tuple[str, ...] = ("north", "east", "south", "west")
OPPOSITE: Mapping[str, str] = {"north": "south", "south": "north", "east": "west", "west": "east"}
WINDS: tuple[str, ...] = (
    "here", "north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest",
)


def shift(cell: Cell, move: str, times: int = 1) -> Cell:
    """The cell that lies `times` moves away, on the grid or not."""
    down, right = MOVES[move]
    return cell[0] + times * down, cell[1] + times * right


def inside(cell: Cell, size: int) -> bool:
    """Is the cell on a grid of `size` rows and columns?"""
    return 0 <= cell[0] < size and 0 <= cell[1] < size


def walk(cell: Cell, move: str, size: int, blocked: Collection[Cell] = ()) -> Cell:
    """Where a move ends: off-grid and blocked cells are not entered."""
    target = shift(cell, move)
    return target if inside(target, size) and target not in blocked else cell


def cells(size: int) -> list[Cell]:
    """Every cell, row by row."""
    return [(row, column) for row in range(size) for column in range(size)]


def manhattan(one: Cell, other: Cell) -> int:
    """Moves between two cells on an empty grid."""
    return abs(one[0] - other[0]) + abs(one[1] - other[1])


def chebyshev(one: Cell, other: Cell) -> int:
    """The larger of the row and the column distance."""
    return max(abs(one[0] - other[0]), abs(one[1] - other[1]))


def wind(start: Cell, end: Cell) -> str:
    """The compass sign of `end` as seen from `start`; `here` if they are the same."""
    vertical = "north" if end[0] < start[0] else "south" if end[0] > start[0] else ""
    horizontal = "west" if end[1] < start[1] else "east" if end[1] > start[1] else ""
    return vertical + horizontal or "here"


NEAR = "near_"
"""Marks a sign whose first leg, the one that `toward` walks, is a single step."""
SIGNS = (*WINDS, *(NEAR + name for name in WINDS if name != "here"))
"""Every word that `sign` gives."""


def sign(start: Cell, end: Cell) -> str:
    """The wind of `end`, marked as near if one step down the first leg changes it."""
    leg = abs(end[0] - start[0]) or abs(end[1] - start[1])
    return (NEAR if leg == 1 else "") + wind(start, end)


def toward(sign: str) -> str:
    """The move that follows a compass sign: vertical first, then horizontal, then `stay`."""
    name = sign.removeprefix(NEAR)
    if name == "here":
        return "stay"
    return name[:5] if name.startswith(("north", "south")) else name


def after_next(sign: str) -> str:
    """The move that follows the move `toward(sign)`."""
    name = sign.removeprefix(NEAR)
    if name == sign or name == "here":
        return toward(sign)
    return name[5:] if name.startswith(("north", "south")) and len(name) > 5 else "stay"


def offset(here: Cell, there: Cell, view: int) -> str:
    """Where `there` lies in two words, rows before columns, e.g. `n2 w1`; `far far` beyond `view` rows or columns."""
    if chebyshev(here, there) > view:
        return "far far"
    down, right = there[0] - here[0], there[1] - here[1]
    vertical = f"n{-down}" if down < 0 else f"s{down}" if down > 0 else "v0"
    horizontal = f"w{-right}" if right < 0 else f"e{right}" if right > 0 else "h0"
    return f"{vertical} {horizontal}"


def distances(goal: Cell, size: int, blocked: Collection[Cell]) -> dict[Cell, int]:
    """Moves from every cell that can reach `goal` without entering a blocked cell."""
    found = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for move in SIDES:
            beside = shift(cell, move)
            if inside(beside, size) and beside not in blocked and beside not in found:
                found[beside] = found[cell] + 1
                queue.append(beside)
    return found


def step_toward(start: Cell, goal: Cell, size: int, blocked: Collection[Cell]) -> str:
    """The first move of a shortest way; `stay` at the goal and where there is no way."""
    away = distances(goal, size, blocked)
    if start == goal or start not in away:
        return "stay"
    return next(move for move in ACTIONS if away.get(shift(start, move), size * size) == away[start] - 1)


def draw_board(size: int, marks: Sequence[tuple[Cell, str]]) -> list[str]:
    """One string per row; the marks of a cell side by side, empty cells as dots, columns aligned."""
    texts = {cell: "".join(mark for at, mark in marks if at == cell) or "." for cell in cells(size)}
    width = max(len(text) for text in texts.values())
    return [" ".join(texts[row, column].ljust(width) for column in range(size)).rstrip() for row in range(size)]
