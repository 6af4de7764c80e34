"""How a batch is read: which tokens go through the model in which rows, with which adapters, into which cache.

`PlainReader` and `SessionReader` are the `feed` functions of the decoding loop, without and with sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from preconcert.models.language_model import GenerateRequest, Placed
from preconcert.models.routing import AdapterRoute, route_rows
from preconcert.models.row_cache import RowCache


@dataclass
class Body:
    """A base model without its head, and how much it has read."""

    base: PreTrainedModel
    window: int | None
    """Length of sliding attention; None where attention is full."""
    prefill_tokens: int = 0
    """Prompt tokens read, with what the grammar forced right after them."""
    reused_tokens: int = 0
    """Prompt tokens that a session's cache already held."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.base.get_input_embeddings().weight.device

    def new_cache(self, rows: int) -> RowCache:
        """An empty cache for this model."""
        return RowCache(rows, self.device, self.window)

    def feed(self, cache: RowCache, tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> Tensor:
        """Hidden states of a right-padded block of new tokens."""
        return cache.feed(self.base.base_model, tokens, counts)


FillsOf = Callable[[Sequence[str | None], Sequence[tuple[Placed, ...]]], AbstractContextManager[Any]]
"""`fills_of(adapters, latents)`: held while rows with latent messages are read from their first token on."""


class PlainReader:
    """Reads prompts without sessions: equal prompts once; finished rows are dropped when they are half of all."""

    def __init__(self, body: Body, requests: Sequence[GenerateRequest], fills_of: FillsOf) -> None:
        self.body, self.requests, self.fills_of = body, requests, fills_of
        self.cache: RowCache | None = None
        self.live: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """The request that each row of the cache belongs to."""
        self.route: AdapterRoute | None = None

    def __call__(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> Tensor:
        if self.cache is None:
            return self._prefill(rows, tokens, counts)
        if 2 * len(rows) <= len(self.live):
            self.cache.select(np.searchsorted(self.live, rows))
            self._settle(rows)
        places = np.searchsorted(self.live, rows)
        block = np.zeros((len(self.live), tokens.shape[1]), dtype=np.int64)
        lengths = np.zeros(len(self.live), dtype=np.int64)
        block[places], lengths[places] = tokens, counts
        return last_of(self.body.feed(self.cache, block, lengths), counts, places)

    def close(self) -> None:
        """Take the route's hooks away."""
        if self.route is not None:
            self.route.close()

    def _prefill(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> Tensor:
        wanted = [
            (
                self.requests[row].adapter,
                self.requests[row].prompt_ids + tuple(chain[:count]),
                self.requests[row].latents,
            )
            for row, chain, count in zip(rows, tokens.tolist(), counts, strict=True)
        ]
        unique = {key: place for place, key in enumerate(dict.fromkeys(wanted))}
        block, lengths = block_of([ids for _, ids, _ in unique])
        self.body.prefill_tokens += int(lengths.sum())
        self.cache = self.body.new_cache(len(unique))
        adapters = [adapter for adapter, _, _ in unique]
        with route_rows(self.body.base, adapters), self.fills_of(adapters, [held for _, _, held in unique]):
            hidden = last_of(self.body.feed(self.cache, block, lengths), lengths)
        self._settle(rows)
        places = np.array([unique[key] for key in wanted], dtype=np.int64)
        self.cache.select(places)
        return hidden[torch.from_numpy(places).to(hidden.device)]

    def _settle(self, rows: NDArray[np.int64]) -> None:
        self.close()
        self.live = rows
        self.route = route_rows(self.body.base, [self.requests[row].adapter for row in rows])


class SessionReader:
    """Reads on from what the sessions' rows have read before; every row stays until the end of the call."""

    def __init__(
        self, body: Body, requests: Sequence[GenerateRequest], cache: RowCache, read: list[tuple[int, ...]]
    ) -> None:
        self.body, self.requests, self.cache = body, requests, cache
        self.read = read
        """What each row has read."""
        self._started = False
        self._route = route_rows(body.base, [request.adapter for request in requests])

    def __call__(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> Tensor:
        new: list[tuple[int, ...]] = [() for _ in self.requests]
        if not self._started:
            self._started = True
            new = [request.prompt_ids[len(read) :] for request, read in zip(self.requests, self.read, strict=True)]
            self.body.reused_tokens += sum(len(read) for read in self.read)
            self.body.prefill_tokens += sum(len(text) for text in new) + int(counts.sum())
        for row, chain, count in zip(rows.tolist(), tokens.tolist(), counts, strict=True):
            new[row] = new[row] + tuple(chain[:count])
        block, lengths = block_of(new)
        self.read = [read + text for read, text in zip(self.read, new, strict=True)]
        return last_of(self.body.feed(self.cache, block, lengths), lengths[rows], rows)

    def close(self) -> None:
        """Take the route's hooks away."""
        self._route.close()


def block_of(texts: Sequence[tuple[int, ...]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token rows as one right-padded array, and their lengths."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    block = np.zeros((len(texts), int(lengths.max(initial=0))), dtype=np.int64)
    for row, text in enumerate(texts):
        block[row, : len(text)] = text
    return block, lengths


def last_of(hidden: Tensor, counts: NDArray[np.int64], rows: NDArray[np.int64] | None = None) -> Tensor:
    """The hidden state of the last real token of each row, or of the rows named."""
    index = torch.from_numpy(np.arange(len(counts)) if rows is None else rows).to(hidden.device)
    return hidden[index, torch.from_numpy(counts - 1).to(hidden.device)]
