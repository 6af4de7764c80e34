"""The embedded backend: a transformers causal language model with peft adapters, behind the `LanguageModel` protocol.

Here are batching and scoring. Loading is in `loading.py`, the decoding loop in `decoding.py`, what it feeds to the
model in `reading.py`, caches in `row_cache.py` and `sessions.py`, the adapters' files in `adapters.py`, and how a batch
mixes adapters in `routing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from preconcert.core import Latent, ModelError
from preconcert.models.adapters import Adapters, LoraSettings
from preconcert.models.choosing import check_options, choose_by_score
from preconcert.models.constrained import UNCONSTRAINED, UNSCORED, constrained_logprobs, grammar_table, head_scale
from preconcert.models.decoding import Head, Writing, write
from preconcert.models.decoding_check import check_decoding
from preconcert.models.language_model import (
    ChoiceRequest,
    Completion,
    GenerateRequest,
    ScoreRequest,
    SpeakRequest,
)
from preconcert.models.latents import LatentCodec, LatentSettings
from preconcert.models.loading import eos_ids, load_checkpoint
from preconcert.models.next_token import NextRequest, next_logprobs, rows_of
from preconcert.models.reading import Body, PlainReader, SessionReader, block_of, last_of
from preconcert.models.routing import route_rows
from preconcert.models.sessions import Sessions
from preconcert.models.speech import Speech

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_SCORED_TOKENS = 4096
"""Positions projected onto the full vocabulary at once while scoring."""


class TransformersModel:
    """A `LanguageModel` over a transformers model in this process."""

    def __init__(self, base_model: PreTrainedModel, tokenizer: Any, lora: LoraSettings, max_rows: int = 512) -> None:
        """Args:
        base_model: a causal language model with full or sliding-window attention.
        tokenizer: its tokenizer.
        lora: the shape of the adapters.
        max_rows: rows in one forward pass; larger batches are split.

        Raises:
            ModelError: the architecture keeps another kind of state than keys and values.
        """
        text = base_model.config.get_text_config()
        window = getattr(text, "sliding_window", None)
        # Older configurations have a window and no list of layers; then every layer slides.
        kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
        if not kinds <= _LAYER_TYPES:
            raise ModelError(
                f"model type {base_model.config.model_type!r} has layers of kind {sorted(kinds - _LAYER_TYPES)}; only "
                "full and sliding-window attention can be decoded here"
            )
        window = window if "sliding_attention" in kinds else None
        self.base = base_model
        self.tokenizer = tokenizer
        self.lora = lora
        self.max_rows = max_rows
        self.max_context = min(getattr(text, "max_position_embeddings", None) or 2**31, window or 2**31)
        """Longest context in tokens. Within its window, sliding attention is full attention; beyond is not offered."""
        self._adapters = Adapters(base_model, lora)
        self._body = Body(base_model, window)
        self._sessions = Sessions()
        self._rows_at_once = rows_of(base_model)
        self._speech = Speech(base_model, self._body)

    @classmethod
    def load(
        cls, name_or_path: str | Path, lora: LoraSettings | None = None, dtype: str = "float32", device: str = "auto"
    ) -> TransformersModel:
        """Read a checkpoint folder, or a model of the Hugging Face hub.

        Args:
            name_or_path: a folder or a hub name.
            lora: the shape of the adapters.
            dtype: float32, bfloat16 or float16.
            device: as in torch; `auto` is the GPU where there is one.

        Raises:
            ModelError: no such model, a file is missing or unreadable, the dtype or device is unknown, or the
                architecture is one that decoding here gets wrong.
        """
        model, tokenizer = load_checkpoint(name_or_path, dtype, device)
        check_decoding(cls(model, tokenizer, lora or LoraSettings()))
        return cls(model, tokenizer, lora or LoraSettings())

    @property
    def model(self) -> PeftModel | PreTrainedModel:
        """The peft model; the base model as long as there is no adapter."""
        return self._adapters.peft if self._adapters.peft is not None else self.base

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were made."""
        return self._adapters.names

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._body.device

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens read so far, with what the grammar forced right after; equal prompts of a batch count once."""
        return self._body.prefill_tokens

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that a session's cache already held."""
        return self._body.reused_tokens

    def add_adapter(self, name: str, seed: int, source: str | None = None) -> None:
        """Make a new adapter: a fresh one (which changes nothing yet), or a copy of another.

        Raises:
            ModelError: the name is taken or unusable, or the source is unknown.
        """
        self._adapters.add(name, seed, source)
        if source is not None and source in self.codecs:
            self._speech.add(name, self.codecs[source].settings, seed, source)

    def load_adapter(self, name: str, path: Path) -> None:
        """Read an adapter folder in peft's format, replacing one of the same name.

        Raises:
            ModelError: the folder is missing or corrupt, or made for another architecture.
        """
        codec = self._speech.read(Path(path))  # before anything is replaced
        self._adapters.load(name, path)
        self._speech.put(name, codec)

    def save_adapter(self, name: str, path: Path) -> None:
        """Write an adapter folder in peft's format; written beside and renamed."""
        self._adapters.save(name, path, lambda folder: self._speech.save(name, folder))

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ModelError: there is no such adapter.
        """
        self._adapters.delete(name)
        self._speech.remove(name)
        self.drop_sessions()

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The low-rank tensors of one adapter by their name in peft's files; what an optimizer gets. Those of its codec
        are `codecs[name].parameters()`."""
        return self._adapters.parameters(name)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample one completion per request, all in one batch, adapters mixed.

        Raises:
            ModelError: an unknown adapter, an empty prompt, or a context longer than the model takes.
        """
        for request in requests:
            new = request.max_tokens
            if request.automaton is not None:
                new = min(new, request.automaton.longest)
            self._check(request, len(request.prompt_ids) + new)
            if not 0 <= request.temperature < float("inf"):
                raise ModelError(f"temperature {request.temperature} is not a number from 0 up")
            if request.latents and request.session is not None:
                raise ModelError("latent messages are not read in sessions: use context=turn")
        named = [request.session for request in requests if request.session is not None]
        if len(set(named)) != len(named):
            raise ModelError("a session appears twice in one call")
        if named:
            # Optimizer steps and loaded adapters change weights in place; torch counts such changes.
            self._sessions.drop_if_changed(sum(parameter._version for parameter in self.base.parameters()))
        answers: dict[int, Completion] = {}
        with self._inference():
            for chunk in self._chunks(requests):
                answers.update(zip(chunk, self._generate([requests[index] for index in chunk]), strict=True))
        return [answers[index] for index in range(len(requests))]

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        """Natural log-probabilities, at temperature 1, of each completion token given all before it.

        Raises:
            ModelError: an unknown adapter, an empty prompt, or a context longer than the model takes.
            GrammarError: a completion does not follow its automaton.
        """
        for request in requests:
            self._check(request, len(request.prompt_ids) + len(request.completion_ids))
        answers: dict[int, tuple[float, ...]] = {}
        with self._inference():
            for chunk in self._chunks(requests):
                answers.update(zip(chunk, self._score([requests[index] for index in chunk]), strict=True))
        return [answers[index] for index in range(len(requests))]

    def choose(self, requests: Sequence[ChoiceRequest]) -> list[tuple[float, ...]]:
        """Natural log-probabilities of each request's options among one another, at temperature 1.

        Options of one token each are read off one pass over the prompts; longer ones are scored one by one.

        Raises:
            ModelError: an unknown adapter, an empty prompt, no options, an empty or a repeated one, or a context longer
                than the model takes.
        """
        for request in requests:
            check_options(request)
            self._check(request, len(request.prompt_ids) + max(len(option) for option in request.options))
        short = [index for index, request in enumerate(requests) if max(map(len, request.options)) == 1]
        long = [index for index, request in enumerate(requests) if max(map(len, request.options)) > 1]
        answers: dict[int, tuple[float, ...]] = {}
        with self._inference():
            for chunk in self._chunks([requests[index] for index in short]):
                places = [short[place] for place in chunk]
                answers.update(zip(places, self._choose([requests[place] for place in places]), strict=True))
        answers.update(zip(long, choose_by_score([requests[index] for index in long], self.score), strict=True))
        return [answers[index] for index in range(len(requests))]

    def speak(self, requests: Sequence[SpeakRequest]) -> list[Latent]:
        """One latent message per request, written by the adapters' codecs.

        Raises:
            ModelError: an adapter without a codec, an empty text, or a context longer than the model takes.
        """
        for request in requests:
            self._check(request, len(request.ids) + self._speech.codec(request.adapter).settings.tokens)
        answers: dict[int, Latent] = {}
        with self._inference():
            for chunk in self._chunks(requests):
                answers.update(zip(chunk, self._speech.speak([requests[index] for index in chunk]), strict=True))
        return [answers[index] for index in range(len(requests))]

    @property
    def codecs(self) -> Mapping[str, LatentCodec]:
        """How adapters write and read latent messages, by name; those without are not here."""
        return self._speech.codecs

    def add_codec(self, adapter: str, settings: LatentSettings, seed: int, source: str | None = None) -> None:
        """Give an adapter a codec for latent messages: a fresh one, or a copy of another adapter's.

        Fresh queries begin near the tag after which messages in words are written: a model that has learned to write
        those has much of what it wants to say at hand there.

        Raises:
            ModelError: there is no such adapter, it has one already, or the source has none.
        """
        self._adapters.check(adapter)
        question = self.tokenizer("<say>", add_special_tokens=False)["input_ids"]
        self._speech.add(adapter, settings, seed, source, question)

    def next_logprobs(self, requests: Sequence[NextRequest]) -> list[NDArray[np.float64]]:
        """Natural log-probabilities of each request's next token; the same bits whatever else is in the call.

        Raises:
            ModelError: an unknown adapter, an empty prompt or choice, or a context longer than the model takes.
        """
        for request in requests:
            self._check(request, len(request.prompt_ids) + 1)
        with self._inference():
            return next_logprobs(self.base, self._head(), self._rows_at_once, self.max_context, requests)

    def close_session(self, session: str) -> None:
        """Drop what is cached for a session; unknown names are ignored."""
        self._sessions.close(session)

    def drop_sessions(self) -> None:
        """Drop every session's cache. Weights updated in place are noticed without this; `p.data = ...` is not."""
        self._sessions.drop()

    def _generate(self, requests: list[GenerateRequest]) -> list[Completion]:
        writing = Writing(requests, eos_ids(self.tokenizer, getattr(self.base, "generation_config", None)))
        reader: PlainReader | SessionReader
        if requests[0].session is None:
            reader = PlainReader(self._body, requests, self._speech.fills)
        else:
            reader = SessionReader(self._body, requests, *self._sessions.take(requests, self._body.new_cache))
        try:
            write(requests, writing, reader, self._head())
        finally:
            reader.close()
        if isinstance(reader, SessionReader):
            self._sessions.hold(requests, reader.cache, reader.read)
        return [writing.completion(row) for row in range(len(requests))]

    def _score(self, requests: list[ScoreRequest]) -> list[tuple[float, ...]]:
        counts = [len(request.completion_ids) for request in requests]
        width = max(counts)
        if width == 0:
            return [() for _ in requests]
        block, lengths = block_of([request.prompt_ids + request.completion_ids for request in requests])
        adapters = [request.adapter for request in requests]
        fills = self._speech.fills(adapters, [request.latents for request in requests])
        with route_rows(self.base, adapters), fills:
            hidden = self._body.feed(self._body.new_cache(len(requests)), block, lengths)
        automatons = list({id(r.automaton): r.automaton for r in requests if r.automaton is not None}.values())
        tokens, allowed, starts = grammar_table(automatons)
        start_of = {id(automaton): start for automaton, start in zip(automatons, starts, strict=True)}
        ids, _ = block_of([request.completion_ids for request in requests])
        places = np.zeros(ids.shape, dtype=np.int64)
        index = np.full(ids.shape, UNSCORED, dtype=np.int64)
        for row, (request, count) in enumerate(zip(requests, counts, strict=True)):
            places[row, :count] = len(request.prompt_ids) - 1 + np.arange(count)
            index[row, :count] = UNCONSTRAINED
            if request.automaton is not None:
                walked = request.automaton.walk(request.completion_ids)[:-1]
                index[row, :count] = np.array(walked, dtype=np.int64) + start_of[id(request.automaton)]
        to = self.device
        hidden = hidden[torch.arange(len(requests), device=to)[:, None], torch.from_numpy(places).to(to)]
        head = self._head()
        step = max(1, _SCORED_TOKENS // width)
        parts = [
            constrained_logprobs(
                hidden[start : start + step],
                head.weight,
                head.bias,
                torch.from_numpy(ids[start : start + step]).to(to),
                torch.from_numpy(index[start : start + step]).to(to),
                torch.from_numpy(tokens).to(to),
                torch.from_numpy(allowed).to(to),
                scale=head.scale,
            )[0]
            for start in range(0, len(requests), step)
        ]
        table = torch.cat(parts).double().cpu().numpy()
        return [tuple(table[row, :count].tolist()) for row, count in enumerate(counts)]

    def _choose(self, requests: list[ChoiceRequest]) -> list[tuple[float, ...]]:
        """Among single tokens; equal prompts are read once."""
        unique = {
            key: place for place, key in enumerate(dict.fromkeys((r.adapter, r.prompt_ids) for r in requests))
        }
        block, lengths = block_of([prompt for _, prompt in unique])
        with route_rows(self.base, [adapter for adapter, _ in unique]):
            hidden = last_of(self._body.feed(self._body.new_cache(len(unique)), block, lengths), lengths)
        head = self._head()
        tokens = sorted({option[0] for request in requests for option in request.options})
        columns = torch.tensor(tokens, device=self.device)
        bias = None if head.bias is None else head.bias[columns]
        logits = head.scale.apply(functional.linear(hidden, head.weight[columns], bias).float())
        table = logits.double().cpu().numpy()
        place_of = {token: place for place, token in enumerate(tokens)}
        answers: list[tuple[float, ...]] = []
        for request in requests:
            row = table[unique[request.adapter, request.prompt_ids], [place_of[o[0]] for o in request.options]]
            answers.append(tuple((row - np.logaddexp.reduce(row)).tolist()))
        return answers

    def _chunks(
        self,
        requests: Sequence[GenerateRequest] | Sequence[ScoreRequest] | Sequence[ChoiceRequest] | Sequence[SpeakRequest],
    ) -> Iterator[list[int]]:
        """Indices of at most `max_rows` requests, those with sessions apart, the same adapter's side by side."""
        rank: dict[str | None, int] = {name: number for number, name in enumerate((None, *self.adapters))}
        order = sorted(range(len(requests)), key=lambda index: rank[requests[index].adapter])
        kept = [index for index in order if getattr(requests[index], "session", None) is not None]
        plain = [index for index in order if getattr(requests[index], "session", None) is None]
        for group in (plain, kept):
            for start in range(0, len(group), self.max_rows):
                yield group[start : start + self.max_rows]

    def _head(self) -> Head:
        head = self.base.get_output_embeddings()
        return Head(head.weight, getattr(head, "bias", None), head_scale(self.base.config))

    def _check(
        self, request: GenerateRequest | ScoreRequest | ChoiceRequest | SpeakRequest | NextRequest, tokens: int
    ) -> None:
        if not (request.ids if isinstance(request, SpeakRequest) else request.prompt_ids):
            raise ModelError("empty prompt: there is nothing to continue")
        if request.adapter is not None:
            self._adapters.check(request.adapter)
        if tokens > self.max_context:
            raise ModelError(f"a context of {tokens} tokens is longer than the model's {self.max_context}")

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients and no dropout; the training flags are put back as they were."""
        training = [module for module in self.base.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
