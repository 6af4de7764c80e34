"""Predicted futures as records: what another agent will do, and what will be seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Intention:
    """A guess at another agent's next actions."""

    about: str
    """The other agent's name."""
    actions: tuple[str, ...]
    """Its actions from the present step on, one per foretold step."""
    probability: float
    """Probability that the writer's own model gave to exactly these words."""
    distributions: tuple[Mapping[str, float], ...] | None = None
    """The probabilities of all words at each step, given the words written before it; None where nobody asked."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the writer expects to see after this step."""

    fields: Mapping[str, str]
    """The foretold fields of the next observation."""
    reward: str | None
    """The foretold reward as a word of the task's language; None where rewards are not foretold."""
    done: bool | None
    """Will the episode be over? None where the end is not foretold."""
