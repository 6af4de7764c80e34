"""Planned decisions as people read them: what was weighed, what each candidate foresaw, and what came instead.

A plan is held against the world only as far as its agent went on as it had planned; beyond that, nobody knows what
would have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preconcert.core import Candidate, Episode, GrammarError, Turn, View

MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class Part:
    """One field of an imagined view with its label, or one word where views have no fields."""

    expected: str
    came: str | None
    """What stood there in truth; None where nobody knows."""

    @property
    def right(self) -> bool | None:
        """Did it come true?"""
        return None if self.came is None else self.came == self.expected


@dataclass(frozen=True, slots=True)
class OtherAction:
    """What another agent was expected to do."""

    agent: str
    expected: str
    came: str | None


@dataclass(frozen=True, slots=True)
class ImaginedMove:
    """One imagined step."""

    does: str
    says: str | None
    others: tuple[OtherAction, ...]
    view: tuple[Part, ...]
    """What is seen after it."""
    reward: float
    paid: float | None
    """The real reward; None where nobody knows."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """One candidate."""

    does: str
    says: str | None
    score: float
    mean: float
    spread: float
    disagreement: float
    visits: int
    chosen: bool
    steps: tuple[ImaginedMove, ...]
    """One of the ways that were imagined."""


def weighed(episode: Episode, turn: Turn, view: View | None) -> tuple[Weighed, ...]:
    """The candidates of a planned turn, best first; none where nothing was planned.

    Args:
        episode: finished.
        turn: one of its turns.
        view: what the task's views consist of.
    """
    return tuple(_weighed(episode, turn, candidate, view) for candidate in turn.candidates)


def _weighed(episode: Episode, turn: Turn, candidate: Candidate, view: View | None) -> Weighed:
    own = episode.trajectories[turn.agent]
    start = next(place for place, each in enumerate(own.turns) if each.step == turn.step)
    steps: list[ImaginedMove] = []
    as_planned = True
    for ahead, (move, text, reward) in enumerate(zip(candidate.moves, candidate.path, candidate.rewards, strict=True)):
        at = start + ahead
        real = own.turns[at] if at < len(own.turns) else None
        as_planned = as_planned and real is not None and real.action == move.action
        if ahead == 0:
            said = None if real is None or real.message is None else real.message.payload
            as_planned = as_planned and said == move.message
        after = None
        if as_planned:
            after = own.final_observation if at + 1 == len(own.turns) else own.turns[at + 1].observation
        others = tuple(
            OtherAction(name, action, episode.trajectories[name].turns[at].action if as_planned else None)
            for name, action in (move.others or {}).items()
        )
        parts = _parts(text, None if after is None else after.text, view)
        paid = real.reward if as_planned and real is not None else None
        steps.append(ImaginedMove(move.action, move.message, others, parts, reward, paid))
    return Weighed(
        candidate.action,
        candidate.message,
        candidate.score,
        candidate.mean,
        candidate.spread,
        candidate.disagreement,
        candidate.visits,
        candidate.chosen,
        tuple(steps),
    )


def _parts(expected: str, came: str | None, view: View | None) -> tuple[Part, ...]:
    mine = _pieces(expected, view)
    if came is None:
        return tuple(Part(piece, None) for piece in mine)
    real = _pieces(came, view)
    if len(mine) != len(real):
        return (Part(expected, came),)
    return tuple(Part(piece, other) for piece, other in zip(mine, real, strict=True))


def _pieces(text: str, view: View | None) -> Sequence[str]:
    if view is None:
        return text.split()
    try:
        values = view.parse(text)
    except GrammarError:
        return [text]
    return [f"{item.label} {value}".strip() for item, value in zip(view.fields, values, strict=True)]
