"""What sessions have read so far: key-value caches kept from one `generate` call to the next.

Sessions of one call share a cache, row by row, and stay together as long as they are called together; then nothing is
copied. Any other company is put together from the rows that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from preconcert.models.language_model import GenerateRequest
from preconcert.models.row_cache import RowCache, joined


@dataclass
class _Held:
    """One cache and whose rows it has."""

    cache: RowCache
    sessions: list[str | None]
    """None once a session is closed or has moved on."""
    ids: list[tuple[int, ...]]
    """What each row has read."""
    adapters: list[str | None]


class Sessions:
    """The caches held for sessions."""

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._stamp = 0

    def hold(self, requests: Sequence[GenerateRequest], cache: RowCache, ids: list[tuple[int, ...]]) -> None:
        """Keep a cache whose row `i` has read `ids[i]` for the session of request `i`."""
        sessions = [request.session for request in requests]
        self._held.append(_Held(cache, sessions, ids, [request.adapter for request in requests]))

    def take(
        self, requests: Sequence[GenerateRequest], new_cache: Callable[[int], RowCache]
    ) -> tuple[RowCache, list[tuple[int, ...]]]:
        """Take these sessions' rows out, cut to what each new prompt shares with them; unknown ones are empty.

        Returns:
            The cache, and what each of its rows has read: always less than the prompt, since the hidden state of the
            last prompt token is what predicts the first new one.
        """
        blocks = [next((h for h in self._held if request.session in h.sessions), None) for request in requests]
        parts: list[RowCache] = []
        shared: list[tuple[int, ...]] = []
        start = 0
        while start < len(requests):
            # Neighbours from the same block are taken together; in lockstep that is the whole block as it is.
            block, stop = blocks[start], start + 1
            while stop < len(requests) and blocks[stop] is block:
                stop += 1
            if block is None:
                parts.append(new_cache(stop - start))
                shared.extend(() for _ in range(start, stop))
            else:
                rows = [block.sessions.index(request.session) for request in requests[start:stop]]
                whole = rows == list(range(len(block.ids)))
                parts.append(block.cache if whole else block.cache.taken(rows))
                for request, row in zip(requests[start:stop], rows, strict=True):
                    usable = block.adapters[row] == request.adapter
                    shared.append(_common(block.ids[row], request.prompt_ids[:-1]) if usable else ())
            start = stop
        for request in requests:
            if request.session is not None:
                self.close(request.session)
        cache = joined(parts)
        cache.keep_first(np.array([len(ids) for ids in shared], dtype=np.int64))
        if cache.columns > 1.5 * int(cache.lengths.max(initial=0)) + 16:
            cache.compact()
        return cache, shared

    def close(self, session: str) -> None:
        """Forget a session; its cache is freed when nobody is left in it."""
        for held in self._held:
            held.sessions = [None if name == session else name for name in held.sessions]
        self._held = [held for held in self._held if any(name is not None for name in held.sessions)]

    def drop(self) -> None:
        """Forget all."""
        self._held = []

    def drop_if_changed(self, stamp: int) -> None:
        """Forget all if the model's weights are not those of the last call.

        Args:
            stamp: a number that changes with the weights.
        """
        if stamp != self._stamp:
            self.drop()
            self._stamp = stamp


def _common(held: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The longest common beginning."""
    if wanted[: len(held)] == held:
        return held
    for place, (one, other) in enumerate(zip(held, wanted, strict=False)):
        if one != other:
            return held[:place]
    return held[: len(wanted)]
