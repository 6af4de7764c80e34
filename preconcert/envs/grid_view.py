"""The fields that views of grid tasks share: counted numbers, cells, and offsets of what is seen near by."""

from __future__ import annotations

from collections.abc import Sequence

from preconcert.core import ViewField

FAR = "far"
"""The offset word of what is out of view."""


def numbers(top: int) -> tuple[str, ...]:
    """The words of 0, 1, ..., `top`."""
    return tuple(str(number) for number in range(top + 1))


def number_field(name: str, top: int, determined: bool = False) -> ViewField:
    """A number from 0 to `top`, with its own name as the label."""
    return ViewField(name, numbers(top), name, number=True, determined=determined)


def cell_fields(size: int, determined: bool) -> tuple[ViewField, ViewField]:
    """The agent's own row and column."""
    return number_field("row", size - 1, determined), number_field("col", size - 1, determined)


def offset_words(view: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every word of an offset's two parts, from north to south and from west to east, `far` last."""
    near, ways = range(1, view + 1), range(view, 0, -1)
    vertical = (*(f"n{far}" for far in ways), "v0", *(f"s{far}" for far in near), FAR)
    horizontal = (*(f"w{far}" for far in ways), "h0", *(f"e{far}" for far in near), FAR)
    return vertical, horizontal


def offset_places(view: int) -> tuple[float, ...]:
    """Where the words of one part of an offset lie.

    What is in view takes the lower half of the scale in even steps, `far` the upper end: to take something seen for
    something out of view is then never a smaller error than to mistake one end of the view for the other, and no error
    is larger than 1.
    """
    return (*(step / (4 * view) for step in range(2 * view + 1)), 1.0)


def offset_fields(name: str, view: int) -> tuple[ViewField, ViewField]:
    """Where something near lies: `NAME_down` after the label NAME, then `NAME_right`."""
    (vertical, horizontal), places = offset_words(view), offset_places(view)
    down = ViewField(f"{name}_down", vertical, name, places=places)
    return down, ViewField(f"{name}_right", horizontal, places=places)


def wall_fields(sides: Sequence[str]) -> tuple[ViewField, ...]:
    """Is each side shut? `wall_SIDE`, after one label for all of them."""
    return tuple(
        ViewField(f"wall_{side}", ("free", "wall"), "walls" if index == 0 else "") for index, side in enumerate(sides)
    )
