"""One agent's decision, kept as sampled. Text is never tokenised a second time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from preconcert.core.candidate import Candidate
from preconcert.core.intention import Forecast, Intention
from preconcert.core.message import Message
from preconcert.core.observation import Observation


class SpanKind(StrEnum):
    """The parts of a turn, in the order in which they are written."""

    INTEND = "intend"
    FORESEE = "foresee"
    SAY = "say"
    ACT = "act"


@dataclass(frozen=True, slots=True)
class Span:
    """A token range of a completion with one meaning. Tags and end marks belong to no span."""

    kind: SpanKind
    start: int
    """First token, relative to the completion."""
    end: int
    """One past the last token."""
    slot: str
    """Which word it is: a slot's name, `reward`, `done`, `action`, or the other agent's name for intentions."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What reaches the world: an action, and words for the others."""

    action: str
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One agent's decision at one step, with everything needed to train on it."""

    agent: str
    step: int
    observation: Observation
    inbox: tuple[Message, ...]
    """The messages that were in the prompt."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """As sampled, the end-of-sequence token included where it was sampled."""
    logprobs: tuple[float, ...]
    """Natural logarithms, one per completion token, under the distribution sampled from; 0 for forced tokens."""
    sampled: tuple[bool, ...]
    """False for tokens that the grammar forced; those were no choice and carry no loss."""
    spans: tuple[Span, ...]
    intentions: tuple[Intention, ...]
    forecast: Forecast | None
    message: Message | None
    action: str
    malformed: bool
    """The completion did not parse; `action` is then the task's default action."""
    reward: float
    """What the environment paid this agent for this step."""
    text: str = ""
    """The completion in words, for people."""
    adapter: str | None = None
    """The adapter that wrote it, or `script:NAME` where the episode's cast names a script; None for the base model and
    for a scripted policy."""
    candidates: tuple[Candidate, ...] = ()
    """What a planner weighed before this turn was taken, best first; empty without a planner."""
