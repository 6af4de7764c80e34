"""Hindsight: what a turn would have said had it known what came next.

The same filling serves twice: to write the supervised examples of the warm start, and as the target of the
cross-entropy that keeps `intend` and `foresee` true under reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Sequence

from preconcert.core import ConfigError, Episode, SpanKind, TaskLanguage, Truth, Turn
from preconcert.envs import talking
from preconcert.prompts import END_OF_PLAY, SpanSettings, Speech, TurnContent, whole_messages


def hindsight_content(
    episode: Episode,
    agent: str,
    index: int,
    language: TaskLanguage,
    spans: SpanSettings,
    speech: Speech | None = None,
) -> TurnContent:
    """The turn as played, its predictions replaced by what really happened.

    Intentions become the others' real actions, the forecast becomes the real next observation, reward and end, and
    message slots that announce the speaker's own next action become that action. What was said and done otherwise
    stays.

    Args:
        episode: a finished episode.
        agent: whose turn.
        index: which of its turns, from 0.
        language: the task's vocabularies.
        spans: which parts are written.
        speech: the form of messages; None for every word of the task's message slots.

    Raises:
        ConfigError: the environment paid a reward that its language has no word for.
    """
    mine = episode.trajectories[agent]
    turn = mine.turns[index]
    last = index + 1 == len(mine.turns)
    after = mine.final_observation if last else mine.turns[index + 1].observation
    intentions: dict[str, tuple[str, ...]] = {}
    if spans.intend:
        for other, theirs in episode.trajectories.items():
            if other != agent:
                real = [step.action for step in theirs.turns[index : index + spans.intend_steps]]
                intentions[other] = tuple(real + [END_OF_PLAY] * (spans.intend_steps - len(real)))
    message: tuple[str, ...] = ()
    speech = speech or whole_messages(language)
    if spans.say and speech.slots:
        said = turn.message.written.split() if turn.message is not None else []
        if not speech.stops and len(said) != len(speech.slots):
            said = [slot.choices[-1] for slot in speech.slots]
        following = next_own_action(mine.turns, index)
        message = tuple(
            following if slot.truth is Truth.OWN_NEXT_ACTION and following is not None else word
            for slot, word in zip(speech.slots[: len(said)], said, strict=True)
        )
    foresee = spans.foresee
    return TurnContent(
        action=turn.action,
        intentions=intentions,
        forecast=tuple(after.fields[slot.name] for slot in language.forecast) if foresee else (),
        reward=reward_word(turn.reward, language) if foresee and language.rewards else None,
        done=("yes" if last else "no") if foresee and language.rewards else None,
        message=message,
    )


def next_own_action(turns: Sequence[Turn], index: int) -> str | None:
    """What an agent does after a turn, rounds of talk left out; None in its last turn."""
    return next((turn.action for turn in turns[index + 1 :] if not talking(turn.observation)), None)


def reward_word(reward: float, language: TaskLanguage) -> str:
    """The word that stands for a reward.

    Raises:
        ConfigError: there is none.
    """
    word = language.reward_word(reward)
    if word is None:
        raise ConfigError(f"reward {reward} has no word; the task's language knows {', '.join(language.rewards)}")
    return word


def true_slots(language: TaskLanguage) -> frozenset[tuple[SpanKind, str]]:
    """The message slots that hindsight can fill, as (kind, slot)."""
    return frozenset((SpanKind.SAY, slot.name) for slot in language.message if slot.truth is not Truth.NONE)
