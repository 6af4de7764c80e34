"""Credit for predictions: what an agent is paid for having foretold what happened, apart from what the task pays.

**Intentions** are paid by the Brier score (Brier 1950) of the distribution p that the agent gave to another's action,

    B(p) = 1 − ½ Σ_a (p(a) − 1{a = a*})²,    a* what the other really did.

B does not depend on the word that was sampled. Given to that word as a reward it would move nothing: Σ_a p(a) · B ·
∇ log p(a) = 0, whatever B is. What moves p along ∇B is the derivative of B at the word that was written,

    ∇B = Σ_a p(a) · (1{a = a*} − p(a)) · ∇ log p(a)   ⇒   A(a) = 1{a = a*} − p(a) − b,

with any b that does not depend on a: an advantage like every other, on the tokens of one word. Its maximum is p = the
truth's distribution, so nothing is gained by exaggeration; a plain 1{a = a*} would have the likeliest action as its
optimum. b is the mean under p, p(a*) − Σ p², where the turn holds the distribution, and otherwise the mean over the
games of the task instance at the same turn, as the task's own estimators have it. An action that a message announces
is paid in the same way, held against what the speaker does next; its act is not paid for keeping the word.

**Forecasts** are about what the agent's own next word leads to, and so they are partly a choice. They are paid by the
share of the foreseen fields that came true (all fields are always written, so precision, recall and F1 are that share)
and compared within the task instance, agent and turn. A forecast that makes itself come true is as good as any other
such forecast; a Brier score would push the agent towards undecided ones.

No number of the task's reaches this file and none of its numbers reaches the task's: the two are paid to different
tokens (`preconcert/training/prediction.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from preconcert.training.credit.estimator import compared
from preconcert.training.credit.ledger import TurnKey


class Kind(IntEnum):
    """What is foretold."""

    ACTION = 0
    """What another agent does now (`intend`)."""
    ANNOUNCEMENT = 1
    """What the agent itself does next, where a message announces it (`say`, slots whose truth hindsight knows)."""
    OBSERVATION = 2
    """What will be seen (`foresee`)."""


class PredictionSettings(BaseModel):
    """What predictions are paid. All weights 0 pay nothing and log how true the predictions are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: float = Field(0.3, ge=0, allow_inf_nan=False)
    """Weight of the foretold actions of others (`intend`). The adapter and the optimiser's step are shared with the
    task: with weights that make predictions the larger part of the gradient, the task is learned more slowly."""
    announcement: float = Field(0.3, ge=0, allow_inf_nan=False)
    """Weight of the announced actions of one's own (`say`, slots that announce the speaker's next action), where the
    task has any."""
    observation: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the foretold fields of the next observation (`foresee`, which must then be no policy span)."""
    end: float = Field(1.0, ge=0, allow_inf_nan=False)
    """All weights move evenly to this many times their beginning in the course of the run; 0 anneals them away."""
    scale: bool = False
    """Divide each kind of advantage by its root mean square over the iteration's tokens. Without it, predictions that
    are nearly certain move little."""

    def weights(self, done: float) -> tuple[float, float, float]:
        """By `Kind`.

        Args:
            done: how much of the run is over, from 0 to 1.
        """
        factor = (1.0 - done) + done * self.end
        return (factor * self.action, factor * self.announcement, factor * self.observation)


@dataclass(frozen=True, slots=True)
class Guess:
    """One foretold action, of another agent or of one's own."""

    key: TurnKey
    """The turn in which it was written."""
    group: str
    """The task instance."""
    kind: Kind
    """`ACTION` or `ANNOUNCEMENT`."""
    about: str
    """The other agent; where a message announces an action, the slot."""
    ahead: int
    """Steps ahead, from 0."""
    start: int
    """The word's first token, relative to the completion."""
    end: int
    """One past its last token."""
    probability: float
    """Given to the word that was written."""
    right: bool
    """Did it come true?"""
    true_probability: float | None = None
    """Given to what the other really did; None where the turn does not hold the distribution."""
    square: float | None = None
    """Σ p² over all actions; None where the turn does not hold the distribution."""
    likeliest: bool | None = None
    """Was the action that the agent held likeliest the real one? None where the turn does not hold the distribution."""

    @property
    def brier(self) -> float:
        """B(p): exact with the distribution; otherwise ½ + 1{right} − ½ p(word), whose mean over words is B(p)."""
        if self.true_probability is None or self.square is None:
            return 0.5 + float(self.right) - 0.5 * self.probability
        return 0.5 + self.true_probability - 0.5 * self.square


@dataclass(frozen=True, slots=True)
class Outlook:
    """The foretold fields of one turn's next observation."""

    key: TurnKey
    group: str
    """The task instance."""
    places: tuple[tuple[int, int], ...]
    """First token, and one past the last, of every field's word."""
    share: float
    """Fields that came true, from 0 to 1."""


def guess_advantages(guesses: Sequence[Guess]) -> NDArray[np.float64]:
    """1{right} − p(word), less its mean: under the agent's own distribution where known, otherwise in the group.

    Args:
        guesses: of one rollout.

    Returns:
        One number per guess, for all tokens of its word.
    """
    paid = np.array([float(guess.right) - guess.probability for guess in guesses], dtype=np.float64)
    found = np.zeros(len(guesses), dtype=np.float64)
    unknown: list[int] = []
    keys: list[Hashable] = []
    for place, guess in enumerate(guesses):
        if guess.true_probability is None or guess.square is None:
            unknown.append(place)
            keys.append((guess.group, guess.key.agent, guess.key.index, guess.kind, guess.about, guess.ahead))
        else:
            found[place] = paid[place] - (guess.true_probability - guess.square)
    if unknown:
        found[unknown] = compared(keys, paid[unknown].tolist(), False)
    return found


def outlook_advantages(outlooks: Sequence[Outlook]) -> NDArray[np.float64]:
    """The share of fields that came true, less its mean over the agent's same turns on the task instance.

    Args:
        outlooks: of one rollout.

    Returns:
        One number per outlook, for all tokens of its fields.
    """
    keys = [(outlook.group, outlook.key.agent, outlook.key.index) for outlook in outlooks]
    return compared(keys, [outlook.share for outlook in outlooks], False)
