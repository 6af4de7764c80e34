"""What agents may do at moments that are only imagined.

Parts: `LegalActions`. A view's text does not say which actions are legal, and a policy that is asked about an imagined
moment must not be offered more than it would really have: it has learned nothing about the rest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from preconcert.core import Episode

Actions = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LegalActions:
    """What was legal in finished play: by view where that decides, otherwise by step."""

    everything: Actions
    """All actions of the task; legal where nothing else is known."""
    by_step: Mapping[str, tuple[Actions, ...]]
    """By agent, what it could do before each step, as far as episodes lasted: most often, where that differed. Empty
    where every action always was legal."""
    by_view: Mapping[str, Mapping[str, Actions]]
    """By agent and text of its view, for agents whose choices are not the same in all episodes of a step."""

    @classmethod
    def of(cls, episodes: Iterable[Episode], everything: Actions) -> LegalActions:
        """From finished play.

        Args:
            episodes: the longer they last and the more they see, the better.
            everything: all actions of the task.
        """
        steps: dict[str, dict[int, Counter[Actions]]] = defaultdict(lambda: defaultdict(Counter))
        views: dict[str, dict[str, Counter[Actions]]] = defaultdict(lambda: defaultdict(Counter))
        for episode in episodes:
            for agent, mine in episode.trajectories.items():
                for turn in mine.turns:
                    seen = turn.observation
                    steps[agent][seen.step][seen.legal_actions] += 1
                    views[agent][seen.text][seen.legal_actions] += 1
        limited = {
            agent: found
            for agent, found in steps.items()
            if any(set(counts) != {everything} for counts in found.values())
        }
        by_step = {
            agent: tuple(_commonest(found[step]) if step in found else everything for step in range(max(found) + 1))
            for agent, found in limited.items()
        }
        by_view = {
            agent: {text: _commonest(counts) for text, counts in views[agent].items()}
            for agent, found in limited.items()
            if any(len(counts) > 1 for counts in found.values())
        }
        return cls(everything, by_step, by_view)

    def at(self, agent: str, step: int, text: str) -> Actions:
        """What an agent may do.

        Args:
            agent: who.
            step: of the moment; beyond all that is known, that of the last one.
            text: its view.
        """
        seen = self.by_view.get(agent, {}).get(text)
        if seen is not None:
            return seen
        steps = self.by_step.get(agent)
        return steps[min(step, len(steps) - 1)] if steps else self.everything

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        plain: dict[str, Any] = _LEGAL.dump_python(self, mode="json")
        return plain

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> LegalActions:
        """From `to_json`."""
        return _LEGAL.validate_python(held)


_LEGAL = TypeAdapter(LegalActions)


def _commonest(counts: Counter[Actions]) -> Actions:
    return counts.most_common(1)[0][0]
