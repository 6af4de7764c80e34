"""Asking a policy what it would do, without anything having been done: what imagination needs of a policy.

A `Policy` that remembers its earlier turns keeps its memory by episode. An imagination goes on many times from one
moment, so here the memory is a value that is handed in and out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from preconcert.core.protocols import TurnRequest
from preconcert.core.turn import Turn


@runtime_checkable
class Rehearsing(Protocol):
    """A `Policy` that can be asked without being changed."""

    version: int

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """As `Policy.decide`."""
        ...

    def finish(self, episode: str) -> None:
        """As `Policy.finish`."""
        ...

    def recall(self, episode: str, agent: str) -> Any:
        """What is remembered of an agent in a running episode; never changed by `rehearse`."""
        ...

    def rehearse(self, requests: Sequence[TurnRequest], memories: Sequence[Any]) -> list[tuple[Turn, Any]]:
        """What `decide` would answer with these memories, and what would be remembered then.

        Args:
            requests: the moments, real or imagined; the same one may appear many times.
            memories: from `recall` or from an earlier rehearsal, one per request.
        """
        ...

    def remember(self, episode: str, agent: str, memory: Any) -> None:
        """Take a memory over as the real one: what was rehearsed has been done."""
        ...
