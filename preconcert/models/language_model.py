"""The one thing this package asks of a language model: sample, score, and hold adapters by name.

Parts: the requests and answers as records, and the `LanguageModel` protocol. Backends are in files of their own;
`check.py` holds the contract test that any backend can be put through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from preconcert.core import Latent
from preconcert.prompts.automaton import Automaton


class CompletionEnd(StrEnum):
    """Why a completion ended."""

    GRAMMAR = "grammar"
    """The automaton reached a final state."""
    EOS = "eos"
    """The model sampled the end-of-sequence token (unconstrained sampling)."""
    LENGTH = "length"
    """`max_tokens` was reached."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A latent message in a prompt: its vectors stand in the place of as many tokens."""

    start: int
    """The first of them."""
    latent: Latent


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue."""

    prompt_ids: tuple[int, ...]
    """The whole context; a backend finds out by itself which part of it is cached."""
    seed: int
    """Every sampled token follows from it, whatever else is in the batch."""
    adapter: str | None = None
    """The adapter's name; None for the base model."""
    automaton: Automaton | None = None
    """Constrains every token; None samples freely until the end-of-sequence token."""
    max_tokens: int = 64
    temperature: float = 1.0
    """0 takes the most likely token."""
    session: str | None = None
    """Calls with the same session extend one another's context: a hint that its cache is worth keeping."""
    watch: frozenset[int] = frozenset()
    """States of the automaton in which the whole distribution is reported, where the completion passes through them
    and they leave a choice."""
    latents: tuple[Placed, ...] = ()
    """Latent messages in the prompt, read by the adapter's codec; not together with a session."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A distribution that one token of a completion came from."""

    position: int
    """Of the token in the completion."""
    state: int
    """Of the automaton, before the token."""
    tokens: tuple[int, ...]
    """What the automaton allowed there, ascending."""
    logprobs: tuple[float, ...]
    """Natural log-probabilities of these tokens at temperature 1, whatever was sampled with."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation, as sampled."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log-probabilities of the tokens under the distribution sampled from (after the grammar's mask and the
    temperature; at temperature 0, those of temperature 1). Forced tokens have exactly 0."""
    sampled: tuple[bool, ...]
    """False for tokens that the automaton forced."""
    ended: CompletionEnd
    watched: tuple[Watched, ...] = ()
    """One entry per watched state that was passed through, in order."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A continuation to evaluate."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    adapter: str | None = None
    automaton: Automaton | None = None
    """With one, probabilities are taken among the tokens that it allows; the completion must follow it."""
    latents: tuple[Placed, ...] = ()
    """Latent messages in the prompt."""


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """Several continuations of one prompt to choose from."""

    prompt_ids: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    """At least one; none empty, no two equal."""
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class SpeakRequest:
    """A text to send a latent message about."""

    ids: tuple[int, ...]
    """Everything the sender has read and written."""
    adapter: str
    """Whose weights and codec write it."""
    seed: int
    """What is drawn follows from it, whatever else is in the batch."""
    temperature: float = 1.0
    """0 sends the mean of the codec's Gaussian; otherwise its deviation is multiplied by this."""
    latents: tuple[Placed, ...] = ()
    """Latent messages in `ids`."""


@runtime_checkable
class LatentModel(Protocol):
    """A language model whose adapters also write and read latent messages. Not every backend can."""

    def speak(self, requests: Sequence[SpeakRequest]) -> list[Latent]:
        """One latent message per request, all in one batch.

        Raises:
            ModelError: an adapter without a codec, an empty text, or a context longer than the model takes.
        """
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model with named low-rank adapters."""

    tokenizer: Any
    """The Hugging Face tokenizer."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may use."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample one completion per request, all in one batch, adapters mixed.

        Raises:
            ModelError: an unknown adapter, an empty prompt, or a context longer than the model takes.
        """
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        """Natural log-probabilities, at temperature 1, of each completion token given all before it."""
        ...

    def choose(self, requests: Sequence[ChoiceRequest]) -> list[tuple[float, ...]]:
        """Natural log-probabilities of each request's options among one another, at temperature 1.

        An option's weight is the product of its tokens' probabilities; the weights are divided by their sum.

        Raises:
            ModelError: an unknown adapter, an empty prompt, no options, an empty or a repeated one, or a context longer
                than the model takes.
        """
        ...

    def add_adapter(self, name: str, seed: int, source: str | None = None) -> None:
        """Make a new adapter: a fresh one (which changes nothing yet), or a copy of another.

        Raises:
            ModelError: the name is taken, or the source is unknown.
        """
        ...

    def load_adapter(self, name: str, path: Path) -> None:
        """Read an adapter folder in peft's format, replacing one of the same name.

        Raises:
            ModelError: the folder is missing or corrupt, or made for another architecture.
        """
        ...

    def save_adapter(self, name: str, path: Path) -> None:
        """Write an adapter folder in peft's format."""
        ...

    def close_session(self, session: str) -> None:
        """Drop what is cached for a session; unknown names are ignored."""
        ...
