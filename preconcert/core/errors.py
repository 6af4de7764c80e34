"""The exception tree. One root, every class picklable, every message names the thing and the value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PreconcertError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigError(PreconcertError):
    """A recipe, an override or an argument that cannot be used."""


class UnknownNameError(ConfigError):
    """A name that is in no registry; the message carries the nearest known one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        super().__init__(kind, name, self.known)

    def __str__(self) -> str:
        return f"unknown {self.kind} {self.name!r}; {nearest(self.name, self.known)}"


class EnvError(PreconcertError):
    """An environment broke the `Env` protocol."""


class GrammarError(PreconcertError):
    """A text or a token sequence cannot be expressed in the turn grammar."""


class ModelError(PreconcertError):
    """A language model, an adapter or a tokenizer cannot be loaded or used."""


class EngineAwayError(ModelError):
    """The engine that a model writes with cannot be reached, or gave no answer in time; nothing is wrong with what it
    was asked, and the same call may succeed later."""


class CodingError(PreconcertError):
    """Bits that are no code of a message, or symbols that cannot be coded."""


class StoreError(PreconcertError):
    """Saved episodes or runs that cannot be read."""


class GateError(PreconcertError):
    """The warm start is too weak for reinforcement learning to sharpen."""


class TrainingError(PreconcertError):
    """Training reached a state it must not go on from."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the closest known name, or the whole list.

    Args:
        name: what the user wrote.
        known: what would have been accepted.
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(options) if options else 'none'}"
