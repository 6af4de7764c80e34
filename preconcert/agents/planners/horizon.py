"""A horizon that follows what the world model gets right: what it imagined is held against what is then seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preconcert.agents.planners.paths import Path
from preconcert.agents.planners.scoring import view_error
from preconcert.agents.planners.settings import HorizonSettings
from preconcert.core import Observation, View


@dataclass(slots=True)
class _Expected:
    """A way that was imagined, and how many of its steps have been taken."""

    path: Path
    taken: int = 0


class HorizonTracker:
    """One agent's errors in one episode, by how far ahead they were imagined.

    A way counts for as long as the actions really taken are those that were imagined.

    Args:
        settings: threshold and memory.
        longest: the horizon that is never exceeded.
        view: what the task's views consist of.
    """

    def __init__(self, settings: HorizonSettings, longest: int, view: View | None) -> None:
        self.settings = settings
        self.longest = longest
        self.view = view
        self.errors: dict[int, float] = {}
        """Running mean by steps ahead."""
        self._expected: list[_Expected] = []
        self._seen: int | None = None
        """The step of the last view."""

    @property
    def horizon(self) -> int:
        """The most steps ahead whose recent error is below the threshold, at least 1.

        Where nothing is known of a distance, the next shorter one speaks for it.
        """
        found, error = 1, 0.0
        for ahead in range(1, self.longest + 1):
            error = self.errors.get(ahead, error)
            if error < self.settings.threshold:
                found = ahead
        return found

    def see(self, observation: Observation) -> None:
        """A real view, one step after the last call of `act`. The same view again, when a decision failed and is made
        once more, changes nothing."""
        if observation.step == self._seen:
            return
        self._seen = observation.step
        found: dict[int, list[float]] = {}
        for expected in self._expected:
            expected.taken += 1
            imagined = expected.path.steps[expected.taken - 1].observation
            found.setdefault(expected.taken, []).append(view_error(imagined, observation, self.view))
        for ahead in self.errors:
            if ahead not in found:
                self.errors[ahead] *= 1 - self.settings.fade
        for ahead, errors in found.items():
            new = sum(errors) / len(errors)
            old = self.errors.get(ahead, new)
            self.errors[ahead] = old + self.settings.rate * (new - old)

    def act(self, action: str, paths: Sequence[Path]) -> None:
        """What is really done, and the ways that were imagined to follow from it."""
        self._expected = [
            expected
            for expected in self._expected
            if expected.taken < len(expected.path.moves) and expected.path.moves[expected.taken].action == action
        ]
        self._expected += [_Expected(path) for path in paths if path.steps]

    def copy(self) -> HorizonTracker:
        """For an episode that goes on in two ways."""
        other = HorizonTracker(self.settings, self.longest, self.view)
        other.errors = dict(self.errors)
        other._seen = self._seen
        other._expected = [_Expected(each.path, each.taken) for each in self._expected]
        return other
