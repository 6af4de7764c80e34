"""A cache with a bound in bytes: what was not asked for longest goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

V = TypeVar("V")


class SizedCache:
    """Values by key, which many threads may ask for.

    Args:
        size: bytes of all values together; one that is larger by itself is made anew every time.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0
        """Bytes of what is kept."""
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], V], weigh: Callable[[V], int | None]) -> V:
        """The value of a key.

        Args:
            key: what the value follows from.
            make: makes it.
            weigh: its bytes, about; None for a value that is not worth keeping.
        """
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                kept: V = found[0]
                return kept
        value = make()
        weight = weigh(value)
        if weight is not None and weight <= self.size:
            with self._lock:
                if key not in self._values:
                    self._values[key] = (value, weight)
                    self.held += weight
                while self.held > self.size:
                    self.held -= self._values.popitem(last=False)[1][1]
        return value
