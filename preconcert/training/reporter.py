"""How a run tells what it is doing. The command line draws bars; by default nothing is said."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives progress."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins; the one before it is over."""
        ...

    def advance(self, done: int, note: str = "") -> None:
        """`done` units of the present stage are over."""
        ...

    def say(self, text: str) -> None:
        """A line worth keeping."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int) -> None:
        """Ignored."""

    def advance(self, done: int, note: str = "") -> None:
        """Ignored."""

    def say(self, text: str) -> None:
        """Ignored."""
