"""What there is to imitate: scripted play, said in the words of the team's codec.

Scripted players know the task's message slots and nothing else. Where the team talks otherwise, its warm start must
show it messages in its own form, in turns as well as in inboxes:

* codecs whose messages are words of the slots, only fewer (`learned`), say them in the play itself, so that whoever
  hears them acts on what was really said (`ShortSpoken`);
* for codecs whose messages follow from a turn (`raw-state`, `intention`) players talk to each other as they know how,
  and every message is put into the codec's words afterwards, also where it was read (`respoken`). What the sender
  foresaw and intended is then what really happened.

`scripted_episodes` plays them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from preconcert.agents import ChannelHarm, ChannelSettings, TurnCodec
from preconcert.agents.channel import drawn
from preconcert.core import (
    Episode,
    Forecast,
    Intention,
    Message,
    TaskLanguage,
    Turn,
    TurnRequest,
    derive_seed,
)
from preconcert.prompts import DONE_WORDS, SpanSettings, TurnContent
from preconcert.training.hindsight import hindsight_content
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout


class ShortSpoken(ScriptedPolicy):
    """The task's own players, who say as much as a codec lets them.

    Args:
        kind: as in `ScriptedPolicy`.
        codec: shortens what they say.
    """

    def __init__(self, kind: str, codec: TurnCodec) -> None:
        super().__init__(kind)
        self.codec = codec

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn without tokens per request."""
        return [
            self._shortened(request, turn) for request, turn in zip(requests, super().decide(requests), strict=True)
        ]

    def _shortened(self, request: TurnRequest, turn: Turn) -> Turn:
        if turn.message is None:
            return turn
        words = self.codec.shortened(turn.message.payload, derive_seed(request.seed, "shortened"))
        said = replace(turn, message=replace(turn.message, payload=words, tokens=len(words.split())))
        # What a message costs is the codec's affair, an end that was chosen included. Codecs without slots say
        # something else altogether, which is not known before the episode is over.
        return replace(said, message=self.codec.encode(said)) if self.codec.speech.slots else said


def respoken(episode: Episode, codec: TurnCodec, spans: SpanSettings) -> Episode:
    """A scripted episode with every message put into a codec's words, where it was said and where it was read.

    Args:
        episode: a finished one, in which messages arrived as they were sent, or late, or not.
        codec: of the team that is to imitate it.
        spans: which parts the team's turns have.
    """
    said: dict[tuple[str, int], Message | None] = {}
    for agent, trajectory in episode.trajectories.items():
        for index, turn in enumerate(trajectory.turns):
            content = hindsight_content(episode, agent, index, codec.language, spans, codec.speech)
            said[agent, turn.step] = codec.encode(_foreknowing(turn, content, codec.language))
    return replace(
        episode,
        trajectories={
            agent: replace(
                trajectory,
                turns=tuple(
                    replace(
                        turn,
                        message=said[agent, turn.step],
                        inbox=tuple(
                            replace(new, recipients=old.recipients)
                            for old in turn.inbox
                            if (new := said[old.sender, old.sent_at]) is not None
                        ),
                    )
                    for turn in trajectory.turns
                ),
            )
            for agent, trajectory in episode.trajectories.items()
        },
    )


def _foreknowing(turn: Turn, content: TurnContent, language: TaskLanguage) -> Turn:
    """The turn as if it had written what hindsight knows."""
    forecast = None
    if content.forecast or content.reward is not None:
        names = [slot.name for slot in language.forecast]
        fields = dict(zip(names, content.forecast, strict=True))
        forecast = Forecast(fields, content.reward, None if content.done is None else content.done == DONE_WORDS[1])
    intentions = tuple(Intention(about, actions, 1.0) for about, actions in content.intentions.items())
    return replace(turn, forecast=forecast, intentions=intentions)


def scripted_episodes(
    recipe: Recipe,
    codec: TurnCodec,
    count: int,
    reporter: Reporter,
    harms: Mapping[str, ChannelHarm] | None = None,
) -> list[Episode]:
    """Training episodes of the recipe's scripted player, as a team with this codec is to imitate them.

    Args:
        recipe: its task, seed and `warm_start` count.
        codec: of the team.
        count: how many.
        reporter: receives progress.
        harms: of the channel, of which each episode draws one; only messages lost and late are shown.
    """
    reporter.stage("scripted play", count)
    drawn_harms = drawn(harms or {}, count, derive_seed(recipe.seed, "imitate", "channels"))
    channel = ChannelSettings()
    episodes: list[Episode] = []
    policy = ShortSpoken(recipe.warm_start.player, codec)
    while len(episodes) < count:
        numbers = range(len(episodes), min(count, len(episodes) + 500))
        specs = [
            EpisodeSpec(
                recipe.task,
                recipe.params,
                derive_seed(recipe.seed, "imitate", number) % 2**31,
                sample=number,
                channel=harms[drawn_harms[number]].of_scripts(channel) if harms else None,
            )
            for number in numbers
        ]
        episodes += rollout(specs, policy, channel, derive_seed(recipe.seed, "imitate"))
        reporter.advance(len(episodes))
    if codec.speech.slots or not codec.talks:
        return episodes
    return [respoken(episode, codec, recipe.agent.spans) for episode in episodes]
