"""Scripted episodes as the token rows that latent messages are learned from.

Parts: `Line`, `Lines`, `lines_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from preconcert.agents import AgentSettings
from preconcert.core import Episode, TrainingError
from preconcert.prompts import TurnFormat
from preconcert.training.hindsight import hindsight_content


@dataclass(frozen=True, slots=True)
class Line:
    """One turn as tokens, with messages as vectors (student) and in words (teacher)."""

    agent: str
    prompt: tuple[int, ...]
    starts: Mapping[str, int]
    """Where each sender's vectors begin in the prompt."""
    answer: tuple[int, ...]
    chosen: tuple[int, ...]
    """Places in the answer that were a choice."""
    teacher: tuple[int, ...] = ()
    """The same turn's prompt and answer in words; empty without a teacher."""
    taught: tuple[int, ...] = ()
    """By chosen place: the place of the same word in `teacher`."""
    words: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """By sender the words of the message that was heard, each as tokens of the receiver."""


Lines = Mapping[str, Sequence[Line]]
"""One episode: the turns of each agent."""


def lines_of(
    episodes: Sequence[Episode],
    students: Mapping[str, TurnFormat],
    teachers: Mapping[str, TurnFormat],
    settings: AgentSettings,
) -> list[Lines]:
    """Scripted episodes as token rows.

    Args:
        episodes: their messages are in words.
        students: by agent the format of turns with latent messages.
        teachers: by agent the format of turns with messages in words; empty without a teacher.
        settings: how agents read and write.
    """
    return [
        {
            agent: _lines(episode, agent, students[agent], teachers.get(agent), settings)
            for agent in episode.trajectories
        }
        for episode in episodes
    ]


def _lines(
    episode: Episode, agent: str, student: TurnFormat, teacher: TurnFormat | None, settings: AgentSettings
) -> list[Line]:
    others = tuple(other for other in episode.trajectories if other != agent)
    found: list[Line] = []
    done: list[str] = []
    for index, turn in enumerate(episode.trajectories[agent].turns):
        legal = turn.observation.legal_actions
        prompt, starts = student.prompt_with_places(agent, turn.observation, (), others, done)
        content = hindsight_content(episode, agent, index, student.language, student.spans, student.speech)
        written = student.write(content, others, legal)
        chosen = tuple(place for place, free in enumerate(written.chosen) if free or not settings.constrained)
        text: tuple[int, ...] = ()
        taught: tuple[int, ...] = ()
        if teacher is not None:
            before = teacher.prompt_ids(agent, turn.observation, turn.inbox, others, done)
            told = teacher.write(
                hindsight_content(episode, agent, index, teacher.language, teacher.spans), others, legal
            )
            text = before + told.ids
            if told.ids != written.ids:
                raise TrainingError(f"{agent!r}: a turn with messages in words is another than one with vectors")
            taught = tuple(len(before) + place for place in chosen)
        words = {
            message.sender: tuple(
                student.encode(word if student.compact else f" {word}") for word in message.payload.split()
            )
            for message in turn.inbox
        }
        found.append(Line(agent, prompt, starts, written.ids, chosen, text, taught, words))
        done.append(turn.action)
    return found
