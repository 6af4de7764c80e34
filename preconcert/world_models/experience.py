"""Finished play as one agent lived it, for world models that are fitted to fields and not to tokens.

Parts: `Lived` (one agent's episode as values of its views, words heard, actions and rewards), `lived_by` (from
episodes), `Setting` (what all of a task's episodes have in common, and how values become observations again).
Returns are undiscounted: values are sums of rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from preconcert.core import (
    ConfigError,
    Episode,
    Message,
    Observation,
    StopReason,
    TaskLanguage,
    TurnRequest,
    UnknownNameError,
    View,
)
from preconcert.world_models.legal import LegalActions

Values = tuple[str, ...]
"""The values of a view, one per field."""
SILENCE = ""
"""Stands for the words of an agent that has not been heard yet."""


@dataclass(frozen=True, slots=True)
class Lived:
    """One agent's episode of T steps."""

    agent: str
    others: tuple[str, ...]
    views: tuple[Values, ...]
    """T + 1 views, the last one after the last step."""
    heard: tuple[tuple[str, ...], ...]
    """Before each of the T steps the words last heard of each other agent, `SILENCE` before the first."""
    actions: tuple[str, ...]
    messages: tuple[str, ...]
    """The words sent in each step, `SILENCE` for none."""
    theirs: tuple[tuple[str, ...], ...]
    """What each other agent did in each step."""
    rewards: tuple[float, ...]
    ended: bool
    """Did the task end with the last step? False where play was cut."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.actions)

    @property
    def to_go(self) -> tuple[float, ...]:
        """The sum of the rewards after each step."""
        sums, left = [], 0.0
        for reward in reversed(self.rewards):
            sums.append(left)
            left += reward
        return tuple(reversed(sums))


def lived_by(episodes: Iterable[Episode], view: View) -> list[Lived]:
    """Every agent's side of every episode.

    Raises:
        GrammarError: an observation is not a text of the view.
    """
    found: list[Lived] = []
    for episode in episodes:
        for agent, mine in episode.trajectories.items():
            if not mine.turns:
                continue
            others = tuple(other for other in episode.trajectories if other != agent)
            theirs = zip(*(episode.trajectories[other].turns for other in others), strict=True)
            acted = [tuple(turn.action for turn in turns) for turns in theirs] if others else [()] * len(mine.turns)
            seen = [*(turn.observation for turn in mine.turns), mine.final_observation]
            found.append(
                Lived(
                    agent,
                    others,
                    tuple(view.parse(each.text) for each in seen),
                    tuple(words_of(turn.inbox, others) for turn in mine.turns),
                    tuple(turn.action for turn in mine.turns),
                    tuple(SILENCE if turn.message is None else turn.message.payload for turn in mine.turns),
                    tuple(acted),
                    tuple(turn.reward for turn in mine.turns),
                    mine.stop_reason is not StopReason.CUT,
                )
            )
    return found


def words_of(inbox: Sequence[Message], others: Sequence[str]) -> tuple[str, ...]:
    """The words last heard of each other agent."""
    held = {message.sender: message.payload for message in inbox}
    return tuple(held.get(other, SILENCE) for other in others)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all episodes of a task have in common."""

    language: TaskLanguage
    agents: tuple[str, ...]
    rewards: tuple[float, ...]
    """Every reward of one step, ascending."""
    legal: LegalActions
    """What agents could do."""

    @classmethod
    def of(cls, episodes: Sequence[Episode], language: TaskLanguage) -> Setting:
        """From finished play.

        Raises:
            ConfigError: there are no episodes, or the task does not describe its views.
        """
        if not episodes:
            raise ConfigError("a world model needs at least one episode to be fitted to")
        check_view(language)
        paid = {float(word) for word in language.rewards}
        for episode in episodes:
            for mine in episode.trajectories.values():
                paid.update(turn.reward for turn in mine.turns)
        legal = LegalActions.of(episodes, language.actions)
        return cls(language, tuple(episodes[0].trajectories), tuple(sorted(paid)), legal)

    @property
    def view(self) -> View:
        """The task's."""
        return check_view(self.language)

    def others_of(self, agent: str) -> tuple[str, ...]:
        """The other agents, in the task's order.

        Raises:
            UnknownNameError: there is no such agent.
        """
        if agent not in self.agents:
            raise UnknownNameError("agent", agent, self.agents)
        return tuple(other for other in self.agents if other != agent)

    def observation(self, agent: str, values: Sequence[str], step: int) -> Observation:
        """A view like a real one."""
        by_name = {field.name: value for field, value in zip(self.view.fields, values, strict=True)}
        fields = {slot.name: by_name[slot.name] for slot in self.language.forecast if slot.name in by_name}
        text = self.view.render(values)
        return Observation(agent, text, self.legal.at(agent, step, text), step, fields)

    def inbox(self, agent: str, words: Sequence[str], others: Sequence[str], step: int) -> tuple[Message, ...]:
        """What an agent holds before a step; who is silent has no message in it."""
        return tuple(
            Message(other, (agent,), said, 0.0, len(said.split()), step - 1)
            for other, said in zip(others, words, strict=True)
            if said != SILENCE
        )

    def reward_index(self, reward: float) -> int:
        """The nearest of the known rewards."""
        return min(range(len(self.rewards)), key=lambda index: abs(self.rewards[index] - reward))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return _SETTING.dump_python(self, mode="json")

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Setting:
        """The inverse of `to_json`."""
        return _SETTING.validate_python(held)


_SETTING = TypeAdapter(Setting)


def check_view(language: TaskLanguage) -> View:
    """A task's view.

    Raises:
        ConfigError: it describes none.
    """
    if language.view is None:
        raise ConfigError("this world model needs a task whose language describes its views; `language.view` is None")
    return language.view


@dataclass(frozen=True, slots=True)
class Moment:
    """Where an agent stands: what a model that forgets everything else needs to go on."""

    agent: str
    others: tuple[str, ...]
    step: int
    values: Values
    heard: tuple[str, ...]

    @classmethod
    def of(cls, request: TurnRequest, view: View) -> Moment:
        """The present one.

        Raises:
            GrammarError: the observation is not a text of the view.
        """
        seen = request.observation
        return cls(
            request.agent, request.others, seen.step, view.parse(seen.text), words_of(request.inbox, request.others)
        )
