"""What an observation's text consists of: named fields, each with a label and a closed set of values.

A task that describes its views this way lets world models write them strictly, spell numbers digit by digit, and be
judged field by field. A task that does not is treated as plain words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from preconcert.core.errors import GrammarError


@dataclass(frozen=True, slots=True)
class ViewField:
    """One value in a view."""

    name: str
    """Unique within the view, e.g. `mate_down`."""
    choices: tuple[str, ...]
    """Every value, each one word. For numbers: consecutive integers from 0."""
    label: str = ""
    """The words before the value; may be empty."""
    number: bool = False
    """The value counts something: world models write it digit by digit, in as many digits as the largest one has."""
    places: tuple[float, ...] = ()
    """Where each choice lies on a scale from 0 to 1, for squared errors. Empty: numbers lie evenly, other choices are
    without order and a wrong one is an error of 1."""
    determined: bool = False
    """Does the next value follow with certainty from the present view and the actions of all agents?"""

    def error(self, one: str, other: str) -> float:
        """Squared difference of two values on the scale from 0 to 1; 1 where they have no order and differ."""
        if one == other:
            return 0.0
        if self.places:
            return (self._place(one) - self._place(other)) ** 2
        if self.number:
            return ((int(one) - int(other)) / max(1, len(self.choices) - 1)) ** 2
        return 1.0

    @property
    def digits(self) -> int:
        """Width of a number in digits."""
        return len(self.choices[-1])

    def _place(self, value: str) -> float:
        return self.places[self.choices.index(value)]


@dataclass(frozen=True, slots=True)
class View:
    """The fields of a task's observations, in the order of the text."""

    fields: tuple[ViewField, ...]

    def parse(self, text: str) -> tuple[str, ...]:
        """The values of a view's text, one per field.

        Raises:
            GrammarError: the text is not exactly labels and values of this view.
        """
        words = text.split()
        values: list[str] = []
        at = 0
        for field, label, allowed in _plan(self.fields):
            if tuple(words[at : at + len(label)]) != label:
                found = " ".join(words[at : at + len(label)])
                raise GrammarError(f"view: {field.label!r} expected before {field.name}, found {found!r}")
            at += len(label)
            value = words[at] if at < len(words) else ""
            if value not in allowed:
                raise GrammarError(f"view: {value!r} is no value of {field.name}")
            values.append(value)
            at += 1
        if at != len(words):
            raise GrammarError(f"view: {' '.join(words[at:])!r} is left over")
        return tuple(values)

    def render(self, values: Sequence[str]) -> str:
        """The text of values; the inverse of `parse`."""
        parts: list[str] = []
        for field, value in zip(self.fields, values, strict=True):
            if field.label:
                parts.append(field.label)
            parts.append(value)
        return " ".join(parts)

    def index(self, name: str) -> int:
        """Position of a field."""
        return next(position for position, field in enumerate(self.fields) if field.name == name)


@lru_cache(maxsize=64)
def _plan(fields: tuple[ViewField, ...]) -> tuple[tuple[ViewField, tuple[str, ...], frozenset[str]], ...]:
    """Each field with the words of its label and the set of its values."""
    return tuple((field, tuple(field.label.split()), frozenset(field.choices)) for field in fields)
