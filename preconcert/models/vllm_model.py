"""The backend on vLLM: an engine of this process's own, or a running server, behind the `LanguageModel` protocol.

Parts: `VLLMModel`, which turns requests into rows for an engine and what comes back into completions. What an engine is
told beyond the prompt is in `vllm_instructions.py`; the two engines are `vllm_engine.py` (in process) and
`vllm_client.py` (over HTTP); what they are started with is in `vllm_start.py`, a server's command and process in
`vllm_server.py`, adapters in `vllm_adapters.py`, and models with small heads in `vllm_heads.py`. Importing this needs
no vLLM.

The same seed gives the same tokens as with `TransformersModel`; log-probabilities agree to the engine's arithmetic.
A grammar's leading and closing tokens cost nothing; those it forces in between cost a step each, unlike there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PretrainedConfig

from preconcert.core import Latent, ModelError
from preconcert.models.adapters import LoraSettings
from preconcert.models.choosing import check_options, choose_by_score
from preconcert.models.language_model import (
    ChoiceRequest,
    Completion,
    CompletionEnd,
    GenerateRequest,
    Placed,
    ScoreRequest,
    SpeakRequest,
    Watched,
)
from preconcert.models.latents import LatentCodec, LatentSettings
from preconcert.models.loading import eos_ids
from preconcert.models.transformers_model import TransformersModel
from preconcert.models.vllm_adapters import AdapterEngine, AdapterStore, version_of
from preconcert.models.vllm_embeddings import PromptEmbeddings
from preconcert.models.vllm_heads import fitted_checkpoint
from preconcert.models.vllm_instructions import Row, Spelling, Written
from preconcert.models.vllm_settings import VLLMSettings
from preconcert.models.vllm_start import (
    check_vllm,
    engine_arguments,
    environment_of,
    generation_of,
    longest_context,
    read_base,
)
from preconcert.prompts.automaton import Automaton, AutomatonBuilder


class RowEngine(AdapterEngine, Protocol):
    """What writes rows: in this process or over HTTP."""

    def write(self, rows: Sequence[Row]) -> list[Written]:
        """The continuations of these rows, all in one batch.

        Raises:
            ModelError: a request is refused, there is no answer in time, or the engine is gone for good.
        """
        ...

    def served(self) -> Mapping[str, Path | None]:
        """The adapters it knows, and their folders where we gave them."""
        ...

    def close(self) -> None:
        """Let it go."""
        ...


class VLLMModel:
    """A `LanguageModel` on vLLM. Several threads may use it at once; their rows are batched together.

    Args:
        engine: what writes.
        tokenizer: the Hugging Face tokenizer.
        config: of the base model.
        lora: the shape of the adapters.
        settings: how vLLM is run.
        base: folder of the base model.
        stops: token ids that end a completion without a grammar.
        writer: a model of the same base and adapters in this process that writes latent messages, for which hidden
            states are needed; without one, `speak` is refused.
        dtype: in which the engine holds the model: float32, bfloat16 or float16.
    """

    def __init__(
        self,
        engine: RowEngine,
        tokenizer: Any,
        config: PretrainedConfig,
        lora: LoraSettings,
        settings: VLLMSettings,
        base: Path,
        stops: Sequence[int],
        writer: TransformersModel | None = None,
        dtype: str = "float32",
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.lora = lora
        self.settings = settings
        self.writer = writer
        self.max_context = longest_context(config, settings)
        """Longest context in tokens."""
        self._vocabulary = int(config.get_text_config().vocab_size)
        self._stops = tuple(stops)
        suffix = "" if settings.url is None else f".{secrets.token_hex(3)}"
        self._store = AdapterStore(config, lora, engine, suffix)
        self._embeddings = PromptEmbeddings(base, config, dtype) if settings.latents else None
        for inner in engine.served():
            name, version = version_of(inner)
            if name not in self._store.names or version >= self._store.version(name):
                self._store.adopt(name, inner, version)

    @classmethod
    def load(
        cls,
        base: str | Path,
        lora: LoraSettings,
        dtype: str = "float32",
        settings: VLLMSettings | None = None,
        writer: TransformersModel | None = None,
    ) -> VLLMModel:
        """Start an engine on a checkpoint, or connect to the server at `settings.url`.

        Args:
            base: a folder or a hub name; a server must have been started on the same one.
            lora: the shape of the adapters.
            dtype: float32, bfloat16 or float16.
            settings: how vLLM is run.
            writer: writes latent messages; see the class.

        Raises:
            ModelError: no such model, vLLM is not installed or twice, or the engine or the server does not come up.
        """
        settings = settings or VLLMSettings()
        folder, config, tokenizer = read_base(base, dtype)
        engine: RowEngine
        if settings.url is None:
            engine = start_engine(folder, config, lora, dtype, settings)
        else:
            from preconcert.models.vllm_client import ServerEngine

            engine = ServerEngine(settings, config)
        try:
            stops = eos_ids(tokenizer, generation_of(folder, config))
            return cls(engine, tokenizer, config, lora, settings, folder, stops, writer, dtype)
        except BaseException:
            engine.close()
            raise

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were made."""
        return self._store.names

    @property
    def codecs(self) -> Mapping[str, LatentCodec]:
        """How adapters read latent messages, by name; empty unless `settings.latents`."""
        return {} if self._embeddings is None else self._embeddings.codecs

    def version(self, adapter: str) -> int:
        """Which version of an adapter is served."""
        return self._store.version(adapter)

    def add_adapter(self, name: str, seed: int, source: str | None = None) -> None:
        """Make a new adapter: a fresh one (which changes nothing yet), or a copy of another.

        Raises:
            ModelError: the name is taken or unusable, or the source is unknown.
        """
        self._store.add(name, seed, source)
        self._read_codec(name)

    def load_adapter(self, name: str, path: Path) -> None:
        """Read an adapter folder in peft's format, replacing one of the same name.

        Raises:
            ModelError: the folder is missing or corrupt, or made for another architecture.
        """
        self._store.put(name, Path(path), None)
        self._read_codec(name)

    def publish(self, name: str, path: Path, version: int) -> None:
        """Replace an adapter while it is served: requests that are under way keep the old one, later ones get this.

        Args:
            name: the adapter's; a new one is made if there is none.
            path: a folder in peft's format; a server must be able to read what this process writes.
            version: number of updates behind it.

        Raises:
            ModelError: the folder is missing or corrupt, or made for another architecture.
        """
        self._store.put(name, Path(path), version)
        self._read_codec(name)

    def save_adapter(self, name: str, path: Path) -> None:
        """Write an adapter folder in peft's format; written beside and renamed."""
        self._store.save(name, Path(path))

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ModelError: there is no such adapter.
        """
        self._store.delete(name)
        if self._embeddings is not None:
            self._embeddings.speech.remove(name)

    def add_codec(self, adapter: str, settings: LatentSettings, seed: int, source: str | None = None) -> None:
        """Refused: codecs come with an adapter's folder.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"adapter {adapter!r}: codecs are made and trained with transformers and come with its folder")

    def close_session(self, session: str) -> None:
        """Nothing is held by name: what prompts have in common is found again by itself."""

    def close(self) -> None:
        """Let the engine go; a server goes on."""
        self.engine.close()
        self._store.close()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample one completion per request, all in one batch, adapters mixed.

        Raises:
            ModelError: an unknown adapter, an empty prompt, a context longer than the model takes, no answer in time,
                or an engine that is gone for good.
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
        with self._store.using([request.adapter for request in requests]) as inner:
            rows = [self._row(request, inner[request.adapter]) for request in requests]
            written = self._write(rows)
        return [self._completion(request, one) for request, one in zip(requests, written, strict=True)]

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        """Natural log-probabilities, at temperature 1, of each completion token given all before it.

        The tokens are written one after the other like any completion, so that a shared prompt is read once.

        Raises:
            ModelError: an unknown adapter, an empty prompt, a context longer than the model takes, no answer in time,
                or an engine that is gone for good.
            GrammarError: a completion does not follow its automaton.
        """
        for request in requests:
            self._check(request, len(request.prompt_ids) + len(request.completion_ids))
        with self._store.using([request.adapter for request in requests]) as inner:
            places: list[list[int]] = []
            rows: list[Row | None] = []
            for request in requests:
                open_, row = self._scored_row(request, inner[request.adapter])
                places.append(open_)
                rows.append(row)
            written = self._write(rows)
        answers: list[tuple[float, ...]] = []
        for request, open_, one in zip(requests, places, written, strict=True):
            found = [0.0] * len(request.completion_ids)
            if one is not None:
                for place in open_:  # the engine's first token is the first that is open
                    found[place] = one.logprobs[place - open_[0]]
            answers.append(tuple(found))
        return answers

    def choose(self, requests: Sequence[ChoiceRequest]) -> list[tuple[float, ...]]:
        """Natural log-probabilities of each request's options among one another, at temperature 1.

        Options of one token each are read off one step; longer ones are scored one by one.

        Raises:
            ModelError: an unknown adapter, an empty prompt, no options, an empty or a repeated one, a context longer
                than the model takes, no answer in time, or an engine that is gone for good.
        """
        for request in requests:
            check_options(request)
            self._check(request, len(request.prompt_ids) + max(len(option) for option in request.options))
        short = [
            index for index, one in enumerate(requests) if max(map(len, one.options)) == 1 and len(one.options) > 1
        ]
        answers: dict[int, tuple[float, ...]] = {
            index: (0.0,) for index, request in enumerate(requests) if len(request.options) == 1
        }
        asked = [
            GenerateRequest(
                requests[index].prompt_ids,
                0,
                requests[index].adapter,
                _choice(tuple(sorted(option[0] for option in requests[index].options))),
                1,
                watch=frozenset([0]),
            )
            for index in short
        ]
        for index, completion in zip(short, self.generate(asked) if asked else (), strict=True):
            table = dict(zip(completion.watched[0].tokens, completion.watched[0].logprobs, strict=True))
            answers[index] = tuple(table[option[0]] for option in requests[index].options)
        long = [index for index in range(len(requests)) if index not in answers]
        answers.update(zip(long, choose_by_score([requests[index] for index in long], self.score), strict=True))
        return [answers[index] for index in range(len(requests))]

    def speak(self, requests: Sequence[SpeakRequest]) -> list[Latent]:
        """One latent message per request, written by the model given as `writer`.

        Raises:
            ModelError: there is none, an adapter without a codec, an empty text, or a context that is too long.
        """
        if self.writer is None:
            raise ModelError(
                "latent messages are written from hidden states, which vLLM keeps to itself: give VLLMModel a "
                "TransformersModel of the same base and adapters as its writer, or use engine=transformers"
            )
        return self.writer.speak(requests)

    def _row(self, request: GenerateRequest, inner: str | None) -> Row | None:
        """What the engine has to write of a completion; None where there is no choice to make."""
        prompt, tokens, spelling = request.prompt_ids, request.max_tokens, None
        watch: tuple[int, ...] = ()
        widest = 0
        if request.automaton is not None:
            spelling = Spelling.of(request.automaton, self._vocabulary)
            prompt = prompt + spelling.leading
            room = tokens - len(spelling.leading)
            # One more for the stop, unless there is no room: then its place is the end anyway.
            tokens = min(room, spelling.steps + (spelling.stop is not None), self.max_context - len(prompt))
            if not spelling.steps:
                return None
            choices = request.automaton.transitions
            watch = tuple(state for state in sorted(request.watch) if state < len(choices) and len(choices[state]) > 1)
            widest = max((len(choices[state]) for state in watch), default=0)
        if tokens < 1:
            return None
        stops = self._stops if spelling is None else () if spelling.stop is None else (spelling.stop,)
        embeds = self._embeds(prompt, request.adapter, request.latents)
        return Row(
            prompt, inner, tokens, spelling, request.seed, request.temperature, None, watch, widest, stops, embeds
        )

    def _scored_row(self, request: ScoreRequest, inner: str | None) -> tuple[list[int], Row | None]:
        """The places of a completion that are not forced, and what the engine has to write for them."""
        prompt, ids, spelling, skipped = request.prompt_ids, request.completion_ids, None, 0
        open_ = list(range(len(ids)))
        if request.automaton is not None:
            spelling = Spelling.of(request.automaton, self._vocabulary)
            walked = request.automaton.walk(ids)[:-1]
            open_ = [place for place, state in enumerate(walked) if len(request.automaton.transitions[state]) > 1]
            skipped = len(spelling.leading)
        if not open_:
            return open_, None
        forced = ids[skipped : open_[-1] + 1]
        prompt = prompt + ids[:skipped]
        embeds = self._embeds(prompt, request.adapter, request.latents)
        return open_, Row(prompt, inner, len(forced), spelling, forced=forced, embeds=embeds)

    def _write(self, rows: Sequence[Row | None]) -> list[Written | None]:
        asked = [row for row in rows if row is not None]
        found = iter(self.engine.write(asked) if asked else ())
        return [None if row is None else next(found) for row in rows]

    def _completion(self, request: GenerateRequest, written: Written | None) -> Completion:
        automaton, limit = request.automaton, request.max_tokens
        if automaton is None:
            assert written is not None
            ended = CompletionEnd.EOS if written.ids[-1] in self._stops else CompletionEnd.LENGTH
            return Completion(written.ids, written.logprobs, (True,) * len(written.ids), ended)
        leading, state = automaton.forced[0]
        ids, logprobs, watched = list(leading), [0.0] * len(leading), list[Watched]()
        for index, token in enumerate(written.ids if written is not None else ()):
            assert written is not None
            chain, after = automaton.forced[state]
            if automaton.is_final(after):
                break
            target = automaton.transitions[state].get(token)
            if target is None:
                raise ModelError(
                    f"vLLM wrote token {token}, which the grammar does not allow: was its server started with "
                    "preconcert's flags?"
                )
            logprob = 0.0 if chain else written.logprobs[index]
            if not chain and state in request.watch:
                report = self._watched(request, written.tables[index], len(ids), state)
                watched.append(report)
                logprob = _tempered(report, token, request.temperature)
            ids.append(token)
            logprobs.append(logprob)
            state = target
        chain, after = automaton.forced[state]
        if automaton.is_final(after):
            ids += chain
            logprobs += [0.0] * len(chain)
            state = after
        ids, logprobs = ids[:limit], logprobs[:limit]
        states = automaton.walk(ids)
        sampled = tuple(len(automaton.transitions[one]) > 1 for one in states[:-1])
        ended = CompletionEnd.GRAMMAR if automaton.is_final(states[-1]) else CompletionEnd.LENGTH
        if ended is CompletionEnd.LENGTH and len(ids) < limit:
            raise ModelError(f"vLLM stopped after {len(ids)} of {limit} tokens, in the middle of the grammar")
        return Completion(tuple(ids), tuple(logprobs), sampled, ended, tuple(watched))

    def _watched(self, request: GenerateRequest, table: Mapping[int, float], position: int, state: int) -> Watched:
        assert request.automaton is not None
        tokens = tuple(sorted(request.automaton.transitions[state]))
        missing = [token for token in tokens if token not in table]
        if missing:
            raise ModelError(f"vLLM's answer lacks the log-probabilities of {len(missing)} of {len(tokens)} tokens")
        return Watched(position, state, tokens, tuple(table[token] for token in tokens))

    def _embeds(
        self, prompt: tuple[int, ...], adapter: str | None, latents: tuple[Placed, ...]
    ) -> torch.Tensor | None:
        if not latents:
            return None
        if self._embeddings is None:
            raise ModelError("latent messages are read as prompt embeddings: set latents=true in vLLM's settings")
        return self._embeddings.of(prompt, adapter, latents)

    def _read_codec(self, name: str) -> None:
        if self._embeddings is not None:
            self._embeddings.speech.load(name, self._store.folder(name))

    def _check(self, request: GenerateRequest | ScoreRequest | ChoiceRequest, tokens: int) -> None:
        if not request.prompt_ids:
            raise ModelError("empty prompt: there is nothing to continue")
        if request.adapter is not None:
            self._store.check(request.adapter)
        if tokens > self.max_context:
            raise ModelError(f"a context of {tokens} tokens is longer than the model's {self.max_context}")


def start_engine(
    folder: Path, config: PretrainedConfig, lora: LoraSettings, dtype: str, settings: VLLMSettings
) -> RowEngine:
    """An engine of this process's own.

    Raises:
        ModelError: vLLM is not installed, or the engine does not come up.
    """
    check_vllm()
    arguments, environment = engine_arguments(fitted_checkpoint(folder, config), config, lora, dtype, settings)
    os.environ.update(environment_of(environment))
    from preconcert.models.vllm_engine import EmbeddedEngine

    return EmbeddedEngine(
        {**arguments, "skip_tokenizer_init": True, "disable_log_stats": True},
        settings.timeout_s,
        settings.retries,
    )


def _tempered(watched: Watched, token: int, temperature: float) -> float:
    """Log-probability of a token at the temperature that it was sampled with; at 0, that of temperature 1."""
    values = np.array(watched.logprobs) / (temperature or 1.0)
    return float(values[watched.tokens.index(token)] - np.logaddexp.reduce(values))


@lru_cache(maxsize=256)
def _choice(tokens: tuple[int, ...]) -> Automaton:
    builder = AutomatonBuilder()
    builder.choice([(token,) for token in tokens])
    return builder.build()
