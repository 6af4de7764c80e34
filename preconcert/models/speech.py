"""Latent messages of one model: its adapters' codecs, and the passes that write a message.

Parts: `Speech`. The codecs hang on the base model (`latents.CODECS`), so that a trainer that saves or optimises the
model's parameters finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preconcert.core import Latent, ModelError, derive_seed, nearest
from preconcert.models.language_model import Placed, SpeakRequest
from preconcert.models.latents import (
    CODECS,
    Fill,
    Fills,
    LatentCodec,
    LatentMethod,
    LatentSettings,
    aligned,
    alignment,
    embedding_scale,
    has_codec,
    layer_scale,
    load_codec,
    save_codec,
)
from preconcert.models.reading import Body, block_of, last_of
from preconcert.models.routing import route_rows


class Speech:
    """Writes and reads latent messages with the adapters' codecs."""

    def __init__(self, base: Any, body: Body) -> None:
        self.base = base
        self._body = body
        self._matrix: Tensor | None = None

    @property
    def codecs(self) -> Mapping[str, LatentCodec]:
        """By adapter."""
        held: nn.ModuleDict | None = getattr(self.base, CODECS, None)
        return {} if held is None else {name: codec for name, codec in held.items() if isinstance(codec, LatentCodec)}

    def codec(self, adapter: str | None) -> LatentCodec:
        """The codec of an adapter.

        Raises:
            ModelError: it has none.
        """
        held = self.codecs
        if adapter is None or adapter not in held:
            who = "the base model" if adapter is None else f"adapter {adapter!r}"
            raise ModelError(f"{who} has no codec for latent messages; {nearest(str(adapter), held)}")
        return held[adapter]

    def add(
        self,
        adapter: str,
        settings: LatentSettings,
        seed: int,
        source: str | None = None,
        question: Sequence[int] = (),
    ) -> None:
        """A fresh codec for an adapter, or a copy of another's.

        Args:
            adapter: the name.
            settings: shape of its messages.
            seed: of the initial weights.
            source: the adapter whose codec is copied.
            question: tokens near whose mean embedding fresh queries begin.

        Raises:
            ModelError: it has one already, or the source has none.
        """
        if adapter in self.codecs:
            raise ModelError(f"adapter {adapter!r} has a codec for latent messages already")
        near = None
        if len(question):
            layer = self.base.get_input_embeddings()
            near = layer.weight.detach()[list(question)].mean(0) * layer_scale(layer)
        codec = LatentCodec(settings, self._width, embedding_scale(self.base), seed, near)
        if source is not None:
            original = self.codec(source)
            codec = LatentCodec(original.settings, self._width, original.scale, seed)
            codec.load_state_dict(original.state_dict())
        self._attach(adapter, codec)

    def remove(self, adapter: str) -> None:
        """Take an adapter's codec away, if it has one."""
        if adapter in self.codecs:
            del getattr(self.base, CODECS)[adapter]

    def save(self, adapter: str, folder: Path) -> None:
        """Write an adapter's codec into its folder, if it has one."""
        if adapter in self.codecs:
            save_codec(self.codecs[adapter], folder)

    def load(self, adapter: str, folder: Path) -> None:
        """Read an adapter's codec in the place of one it may have; a folder without one takes it away.

        Raises:
            ModelError: the file is unusable.
        """
        self.put(adapter, self.read(folder))

    def read(self, folder: Path) -> LatentCodec | None:
        """The codec in an adapter's folder; None where there is none.

        Raises:
            ModelError: the file is unusable.
        """
        return load_codec(folder, self._width) if has_codec(folder) else None

    def put(self, adapter: str, codec: LatentCodec | None) -> None:
        """Give an adapter a codec, in the place of one it may have; None takes that away."""
        if codec is None:
            self.remove(adapter)
            return
        held = self.codecs.get(adapter)
        if held is not None and held.settings == codec.settings:
            held.load_state_dict(codec.state_dict())  # an optimizer may hold its parameters
            held.scale = codec.scale
        else:
            self._attach(adapter, codec)

    def fills(self, adapters: Sequence[str | None], latents: Sequence[tuple[Placed, ...]]) -> Fills:
        """To be held while rows are read from their first token on: their latent messages as embeddings.

        Raises:
            ModelError: an adapter without a codec, or a message of another shape than its own.
        """
        by_reader: dict[tuple[str | None, int], list[tuple[int, Placed]]] = {}
        for row, held in enumerate(latents):
            for placed in held:
                key = adapters[row], len(placed.latent.values)
                by_reader.setdefault(key, []).append((row, placed))
        found: list[Fill] = []
        for (adapter, count), places in by_reader.items():
            if not count:
                continue
            values = [placed.latent.values for _, placed in places]
            found.append(
                Fill.side_by_side(
                    self._vectors(adapter, values),
                    [row for row, _ in places],
                    [placed.start for _, placed in places],
                )
            )
        return Fills(self.base, found)

    def speak(self, requests: Sequence[SpeakRequest]) -> list[Latent]:
        """One message per request."""
        answers: dict[int, Latent] = {}
        groups: dict[tuple[LatentMethod, int], list[int]] = {}
        for index, request in enumerate(requests):
            settings = self.codec(request.adapter).settings
            groups.setdefault((settings.method, settings.tokens), []).append(index)
        for (method, tokens), places in groups.items():
            mine = [requests[place] for place in places]
            write = self._write_aligned if method is LatentMethod.ALIGNED else self._write
            answers.update(zip(places, write(mine, tokens), strict=True))
        return [answers[index] for index in range(len(requests))]

    @property
    def _width(self) -> int:
        return int(self.base.config.get_text_config().hidden_size)

    def _attach(self, adapter: str, codec: LatentCodec) -> None:
        if getattr(self.base, CODECS, None) is None:
            setattr(self.base, CODECS, nn.ModuleDict())
        getattr(self.base, CODECS)[adapter] = codec.to(self._body.device)

    def _vectors(self, adapter: str | None, values: Sequence[tuple[tuple[float, ...], ...]]) -> Tensor:
        codec = self.codec(adapter)
        settings = codec.settings
        width = self._width if settings.method is LatentMethod.ALIGNED else settings.dims
        for message in values:
            if len(message) > settings.tokens or any(len(vector) != width for vector in message):
                raise ModelError(
                    f"a latent message of {len(message)} vectors of {len(message[0])} numbers does not fit the codec "
                    f"of adapter {adapter!r}: {settings.tokens} of {width}"
                )
        numbers = torch.tensor(values, dtype=torch.float32, device=self._body.device)
        return codec.embedded(numbers)

    def _write(self, requests: Sequence[SpeakRequest], tokens: int) -> list[Latent]:
        adapters = [request.adapter for request in requests]
        block, lengths = block_of([request.ids + (0,) * tokens for request in requests])
        starts = [len(request.ids) for request in requests]
        heard = self.fills(adapters, [request.latents for request in requests])
        asked: list[Fill] = []
        for adapter in dict.fromkeys(adapters):
            rows = [row for row, name in enumerate(adapters) if name == adapter]
            queries = self.codec(adapter).queries.expand(len(rows), -1, -1)
            asked.append(Fill.side_by_side(queries, rows, [starts[row] for row in rows]))
        with route_rows(self.base, adapters), heard, Fills(self.base, asked):
            hidden = self._body.feed(self._body.new_cache(len(requests)), block, lengths)
        every = torch.arange(len(requests), device=hidden.device)[:, None]
        columns = torch.tensor(starts, device=hidden.device)[:, None] + torch.arange(tokens, device=hidden.device)
        hidden = hidden[every, columns]
        answers: dict[int, Latent] = {}
        for adapter in dict.fromkeys(adapters):
            codec = self.codec(adapter)
            mine = [row for row, name in enumerate(adapters) if name == adapter]
            mean = codec.mean(hidden[mine])
            noise = torch.from_numpy(np.stack([_noise(requests[row], codec.settings) for row in mine])).to(mean)
            drawn = mean + codec.deviation() * noise
            sent = codec.sent(drawn)
            # A greedy sender draws nothing; its density is that of temperature 1, as for words.
            wide = torch.tensor([requests[row].temperature or 1.0 for row in mine]).to(mean)[:, None, None]
            logps = codec.logprob(drawn, mean, wide)
            numbers = zip(mine, sent.cpu().tolist(), drawn.cpu().tolist(), logps.cpu().tolist(), strict=True)
            for row, one, other, density in numbers:
                answers[row] = Latent(_tuples(one), codec.settings.levels, _tuples(other), tuple(density))
        return [answers[row] for row in range(len(requests))]

    def _write_aligned(self, requests: Sequence[SpeakRequest], tokens: int) -> list[Latent]:
        """Each vector is read again before the next is written."""
        if self._matrix is None:
            self._matrix = alignment(self.base)
        adapters = [request.adapter for request in requests]
        block, lengths = block_of([request.ids for request in requests])
        cache = self._body.new_cache(len(requests))
        vectors: list[Tensor] = []
        with route_rows(self.base, adapters):
            with self.fills(adapters, [request.latents for request in requests]):
                hidden = last_of(self._body.feed(cache, block, lengths), lengths)
            for step in range(tokens):
                vectors.append(aligned(hidden, self._matrix, self.base))
                if step + 1 < tokens:
                    ones = np.ones(len(requests), dtype=np.int64)
                    fill = Fill.side_by_side(vectors[-1][:, None], range(len(requests)), [0] * len(requests))
                    with Fills(self.base, [fill]):
                        hidden = self._body.feed(cache, np.zeros((len(requests), 1), dtype=np.int64), ones)[:, 0]
        return [Latent(_tuples(message)) for message in torch.stack(vectors, dim=1).cpu().tolist()]


def _noise(request: SpeakRequest, settings: LatentSettings) -> np.ndarray[Any, Any]:
    """Standard normal numbers times the temperature; they depend on the request's seed alone."""
    generator = np.random.default_rng(derive_seed(request.seed, "latent"))
    return generator.standard_normal((settings.tokens, settings.dims)) * request.temperature


def _tuples(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(number) for number in row) for row in rows)
