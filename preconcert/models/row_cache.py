"""The key-value cache of a batch whose rows grow by different amounts: masked holes instead of padding.

Every `feed` appends one block of columns; a row that brings fewer tokens than the others leaves holes, which no query
attends to. Positions are counted per row, so a hole costs memory and never changes a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from preconcert.core import ModelError


class RowCache:
    """Cached keys and values of some rows, with the mask that says which columns are real."""

    def __init__(self, rows: int, device: torch.device, window: int | None = None) -> None:
        """Args:
        rows: how many, all empty.
        device: of the model.
        window: of sliding attention, which counts columns; None where attention is full.
        """
        self.window = window
        self.kv: DynamicCache = DynamicCache()
        self.mask = torch.zeros((rows, 0), dtype=torch.bool, device=device)
        self.lengths: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        """Real tokens held, per row."""

    @property
    def rows(self) -> int:
        """Rows held, empty ones included."""
        return len(self.lengths)

    @property
    def columns(self) -> int:
        """Columns held, holes included."""
        return self.mask.shape[1]

    def feed(
        self, backbone: nn.Module, tokens: Int[np.ndarray, "rows width"], counts: Int[np.ndarray, " rows"]
    ) -> Float[Tensor, "rows width hidden"]:
        """Append `counts[i]` tokens to row `i` and return the hidden states of the whole block.

        Args:
            backbone: the model without its head.
            tokens: right-padded.
            counts: how many tokens of each row are real; 0 leaves the row as it is.

        Raises:
            ModelError: with the holes, the rows do not fit into the window.
        """
        if self.window is not None and self.columns + tokens.shape[1] > self.window:
            self.compact()
            if self.columns + tokens.shape[1] > self.window:
                raise ModelError(
                    f"{self.columns} + {tokens.shape[1]} columns exceed the attention window {self.window}"
                )
        device = self.mask.device
        steps = np.arange(tokens.shape[1])
        present = torch.from_numpy(steps < counts[:, None]).to(device)
        last = np.maximum(self.lengths + counts - 1, 0)
        positions = np.minimum(self.lengths[:, None] + steps, last[:, None])
        self.mask = torch.cat([self.mask, present], dim=1)
        hidden = backbone(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=self.mask,
            position_ids=torch.from_numpy(positions).to(device),
            past_key_values=self.kv,
            use_cache=True,
        ).last_hidden_state
        self.lengths = self.lengths + counts
        return hidden

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Keep these rows, in this order; a row may be named more than once."""
        chosen = np.asarray(rows, dtype=np.int64)
        if len(chosen) == self.rows and bool((chosen == np.arange(self.rows)).all()):
            return
        index = torch.from_numpy(chosen).to(self.mask.device)
        if self.columns:
            self.kv.batch_select_indices(index)
        self.mask = self.mask.index_select(0, index)
        self.lengths = self.lengths[chosen]

    def taken(self, rows: Sequence[int] | NDArray[np.int64]) -> RowCache:
        """A cache of its own with these rows; this one keeps all of its rows."""
        other = RowCache(0, self.mask.device, self.window)
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(self.mask.device)
        other.mask = self.mask.index_select(0, index)
        other.lengths = self.lengths[np.asarray(rows, dtype=np.int64)]
        for number, layer in enumerate(self.kv.layers if self.columns else ()):
            other.kv.update(layer.keys.index_select(0, index), layer.values.index_select(0, index), number)
        return other

    def keep_first(self, tokens: NDArray[np.int64]) -> None:
        """Forget all but the first `tokens[i]` real tokens of row `i`."""
        if bool((tokens >= self.lengths).all()):
            return
        limit = torch.from_numpy(tokens).to(self.mask.device)
        self.mask = self.mask & (self.mask.cumsum(1) <= limit[:, None])
        self.lengths = np.minimum(self.lengths, tokens)

    def compact(self) -> None:
        """Squeeze out the holes; the rows become left-padded to the longest."""
        width = int(self.lengths.max(initial=0))
        if width == self.columns:
            return
        order = self.mask.to(torch.int8).argsort(dim=1, stable=True)[:, self.columns - width :]
        for layer in self.kv.layers:
            index = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = layer.keys.gather(2, index)
            index = order[:, None, :, None].expand(-1, layer.values.shape[1], -1, layer.values.shape[3])
            layer.values = layer.values.gather(2, index)
        self.mask = self.mask.gather(1, order)


def joined(parts: Sequence[RowCache]) -> RowCache:
    """The rows of several caches as one, in order; shorter ones get holes on the left."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.columns for part in parts)
    whole = RowCache(0, parts[0].mask.device, parts[0].window)
    whole.mask = torch.cat([nn.functional.pad(part.mask, (width - part.columns, 0)) for part in parts])
    whole.lengths = np.concatenate([part.lengths for part in parts])
    filled = next((part for part in parts if part.columns), None)
    for number, layer in enumerate(filled.kv.layers if filled is not None else ()):
        keys, values = [], []
        for part in parts:
            if part.columns:
                own, pad = part.kv.layers[number], (0, 0, width - part.columns, 0)
                keys.append(nn.functional.pad(own.keys, pad))
                values.append(nn.functional.pad(own.values, pad))
            else:
                shape = (part.rows, layer.keys.shape[1], width)
                keys.append(layer.keys.new_zeros((*shape, layer.keys.shape[3])))
                values.append(layer.values.new_zeros((*shape, layer.values.shape[3])))
        whole.kv.update(torch.cat(keys), torch.cat(values), number)
    return whole
