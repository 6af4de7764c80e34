"""The channel between agents: text messages, metered, delivered one step later, with the controls built in.

The channel belongs to a rollout and sees all of its episodes at once, since the shuffled control exchanges messages
between episodes. Latent messages and noise are not here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from preconcert.core import Message, derive_seed, uniforms


class ChannelMode(StrEnum):
    """What happens to a message on its way."""

    ON = "on"
    """It arrives."""
    SHUFFLED = "shuffled"
    """Another episode's message from the same sender arrives instead: same form, no information."""
    OFF = "off"
    """Nothing arrives."""


class ChannelSettings(BaseModel):
    """How messages travel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: ChannelMode = ChannelMode.ON
    """`on`, or one of the controls `shuffled` and `off`."""
    drop: float = Field(0.0, ge=0.0, le=1.0)
    """Probability that a message is lost, independently for each recipient."""


@dataclass(frozen=True, slots=True)
class _Sent:
    group: str
    message: Message


class TextChannel:
    """Holds every recipient's inbox: the last message received from each sender.

    Args:
        settings: the mode and the loss rate.
        seed: for losses and for the shuffled control.
    """

    def __init__(self, settings: ChannelSettings, seed: int) -> None:
        self.settings = settings
        self._seed = seed
        self._inboxes: dict[tuple[str, str], dict[str, Message]] = defaultdict(dict)
        self._past: dict[str, list[_Sent]] = defaultdict(list)

    def inbox(self, episode: str, agent: str) -> tuple[Message, ...]:
        """What the agent last received from each other agent, oldest first."""
        mails = self._inboxes.get((episode, agent), {})
        return tuple(sorted(mails.values(), key=lambda m: (m.sent_at, m.sender)))

    def transmit(self, sent: Mapping[str, Sequence[Message]], groups: Mapping[str, str], step: int) -> None:
        """Take the messages of one step of every running episode and deliver them.

        Args:
            sent: messages by episode.
            groups: each episode's group; the shuffled control never exchanges messages within a group, whose
                members share the task instance.
            step: the environment step, which is the same in all episodes.
        """
        if self.settings.mode is ChannelMode.OFF:
            return
        if self.settings.mode is ChannelMode.SHUFFLED:
            sent = self._shuffle(sent, groups, np.random.default_rng(derive_seed(self._seed, "channel", step)))
        for episode, messages in sent.items():
            for message in messages:
                for recipient in message.recipients:
                    if not self._lost(episode, message.sender, recipient, step):
                        self._inboxes[(episode, recipient)][message.sender] = message

    def fork(self, episode: str, name: str) -> None:
        """Give another episode the inboxes of this one; from here on they are filled apart."""
        for (held, agent), mails in list(self._inboxes.items()):
            if held == episode:
                self._inboxes[(name, agent)] = dict(mails)

    def close(self, episode: str) -> None:
        """Forget the inboxes of a finished episode."""
        for key in [key for key in self._inboxes if key[0] == episode]:
            del self._inboxes[key]

    def _lost(self, episode: str, sender: str, recipient: str, step: int) -> bool:
        """Decided by the message alone, so that a loss does not depend on which other episodes are running."""
        if not self.settings.drop:
            return False
        seed = np.array([derive_seed(self._seed, "loss", episode, sender, recipient)], dtype=np.uint64)
        return bool(uniforms(seed, step)[0] < self.settings.drop)

    def _shuffle(
        self, sent: Mapping[str, Sequence[Message]], groups: Mapping[str, str], rng: np.random.Generator
    ) -> dict[str, list[Message]]:
        now: dict[str, list[_Sent]] = defaultdict(list)
        for episode, messages in sent.items():
            for message in messages:
                now[message.sender].append(_Sent(groups[episode], message))
        swapped: dict[str, list[Message]] = {}
        for episode, messages in sent.items():
            swapped[episode] = []
            for message in messages:
                pool = [s for s in now[message.sender] if s.group != groups[episode]]
                pool = pool or [s for s in self._past[message.sender] if s.group != groups[episode]]
                if pool:
                    other = pool[int(rng.integers(len(pool)))].message
                    swapped[episode].append(
                        replace(other, recipients=message.recipients, sent_at=message.sent_at)
                    )
        for sender, messages_now in now.items():
            self._past[sender] = (self._past[sender] + messages_now)[-256:]
        return swapped
