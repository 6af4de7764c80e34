"""The way of messages from turns to inboxes, for all running episodes of a rollout at once.

A message passes, in this order: the topology (who is to hear it), `truncate`, `cap_bits` and `cap_episode_bits` (what
of it goes into the channel), the mode (itself, or what a control puts in its place), and then for each recipient on its
own `drop`, `substitute` or `noise`, and `delay`. Each message and recipient leaves a `Delivery`. In controls nothing of
a message decides whether something arrives: under `shuffled` caps say what can be taken from a message for others.

The channel belongs to a rollout and sees all of its episodes, since the shuffled control exchanges messages between
them. Apart from that and the size of random numbers, what happens to a message follows from the channel's seed, the
episode, sender, recipient and step alone, whatever else is running.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from preconcert.agents.channel import distortion
from preconcert.agents.channel.meter import cut, entry_bits, fitting
from preconcert.agents.channel.settings import ChannelMode, ChannelSettings
from preconcert.agents.channel.topology import Broadcast, Positions
from preconcert.core import ConfigError, Delivery, Fate, Latent, Message, Slot, derive_seed, uniforms

_REMEMBERED = 64
"""Messages per sender and group that the controls can fall back on: of each group its own, so that one that plays on
alone does not push out those of all others."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What the channel may know of an episode besides its messages. Needed where it `looks`."""

    slots: Mapping[str, tuple[Slot, ...]] = field(default_factory=dict)
    """By sender: the words that can stand in each place of its messages."""
    positions: Positions | None = None
    """Where the agents are, where the task says so."""


@dataclass(frozen=True, slots=True)
class _Sent:
    number: int
    """In the order of sending."""
    message: Message


@dataclass(slots=True)
class _Letter:
    """One message as it goes into the channel."""

    episode: str
    written: Message
    message: Message
    """What is left of it after truncation and caps."""
    recipients: tuple[str, ...]
    bits: float
    capped: bool = False
    """It does not go at all, neither to its recipients nor, in `shuffled`, to those of others."""


@dataclass(frozen=True, slots=True)
class _UnderWay:
    due: int
    """The step from which on the recipient has it."""
    recipient: str
    message: Message
    entry: int
    """Its place in the log."""


_NO_SCENE = Scene()


class Channel:
    """Holds every recipient's inbox (the last message received from each sender), what is under way, and the log.

    Args:
        settings: how messages travel. `rounds` is the environment's affair.
        seed: for everything random.
        others: by episode, the settings of those whose channel is another one, with the same mode and topology.
    """

    def __init__(
        self, settings: ChannelSettings, seed: int, others: Mapping[str, ChannelSettings] | None = None
    ) -> None:
        self.settings = settings
        self._others = dict(others or {})
        for episode, other in self._others.items():
            if (other.mode, other.topology) != (settings.mode, settings.topology):
                raise ConfigError(f"channel of {episode!r}: mode and topology are one for all episodes of a rollout")
        self._seed = seed
        self._inboxes: dict[tuple[str, str], dict[str, Message]] = defaultdict(dict)
        self._under_way: dict[str, list[_UnderWay]] = {}
        self._log: dict[str, list[Delivery]] = defaultdict(list)
        self._spent: dict[tuple[str, str], float] = defaultdict(float)
        self._past: dict[str, dict[str, deque[_Sent]]] = defaultdict(dict)
        self._sent = 0

    @property
    def looks(self) -> bool:
        """Does it look at anything but the messages themselves?"""
        return self.settings.looks or any(each.looks for each in self._others.values())

    def inbox(self, episode: str, agent: str) -> tuple[Message, ...]:
        """What the agent last received from each other agent, oldest first."""
        mails = self._inboxes.get((episode, agent), {})
        return tuple(sorted(mails.values(), key=lambda m: (m.sent_at, m.sender)))

    def deliveries(self, episode: str) -> tuple[Delivery, ...]:
        """What has become of every message of an episode, in the order of sending; under way counts as late."""
        return tuple(self._log.get(episode, ()))

    def transmit(
        self,
        sent: Mapping[str, Sequence[Message]],
        groups: Mapping[str, str],
        step: int,
        scenes: Mapping[str, Scene] | None = None,
    ) -> None:
        """Take the messages of one step of every running episode, and deliver what arrives after it.

        Args:
            sent: messages by episode; an episode without messages is in it too.
            groups: each episode's group; no control takes anything from within a group, whose members share the task
                instance.
            step: the environment step, which is the same in all episodes.
            scenes: by episode, where the channel `looks`.

        Raises:
            ConfigError: the settings need more than is known of a message.
        """
        for episode in sent:
            self._arrive(episode, step + 1)
        if self.settings.mode is ChannelMode.OFF:
            return
        letters = self._letters(sent, step, scenes)
        for letter, message in zip(letters, self._by_mode(letters, groups, step, scenes), strict=True):
            for recipient in letter.recipients:
                self._dispatch(letter, message, recipient, step, scenes)

    def too_late(
        self, sent: Mapping[str, Sequence[Message]], step: int, scenes: Mapping[str, Scene] | None = None
    ) -> None:
        """Take the messages of the last turns of episodes: they are metered, and nobody reads them.

        Args:
            sent: messages by episode.
            step: the environment step in which they were written.
            scenes: by episode, where the channel `looks`.
        """
        if self.settings.mode is ChannelMode.OFF:
            return
        for letter in self._letters(sent, step, scenes):
            for recipient in letter.recipients:
                lost = self._lost(letter.episode, letter.written.sender, recipient, step)
                held = self._held_back(letter)
                self._note(letter, recipient, Fate.CAPPED if held else Fate.ERASED if lost else Fate.LATE)

    def fork(self, episode: str, name: str) -> None:
        """Give another episode everything that is held for this one; from here on they go apart."""
        for (held, agent), mails in list(self._inboxes.items()):
            if held == episode:
                self._inboxes[(name, agent)] = dict(mails)
        for (held, agent), bits in list(self._spent.items()):
            if held == episode:
                self._spent[(name, agent)] = bits
        if episode in self._under_way:
            self._under_way[name] = list(self._under_way[episode])
        if episode in self._log:
            self._log[name] = list(self._log[episode])
        if episode in self._others:
            self._others[name] = self._others[episode]

    def close(self, episode: str) -> None:
        """Forget what is held for a finished episode."""
        for held in (self._inboxes, self._spent):
            for key in [key for key in held if key[0] == episode]:
                del held[key]  # type: ignore[attr-defined]  # either of two dictionaries
        self._under_way.pop(episode, None)
        self._log.pop(episode, None)
        self._others.pop(episode, None)

    def _of(self, episode: str) -> ChannelSettings:
        return self._others.get(episode, self.settings)

    # ---- the sender's side

    def _letters(
        self, sent: Mapping[str, Sequence[Message]], step: int, scenes: Mapping[str, Scene] | None
    ) -> list[_Letter]:
        """Every message that anybody is to hear, cut to what may be sent."""
        letters: list[_Letter] = []
        for episode, messages in sent.items():
            scene = _NO_SCENE if scenes is None else scenes[episode]
            for message in messages:
                recipients = message.recipients
                if not isinstance(self.settings.topology, Broadcast):
                    recipients = self.settings.topology.reach(message.sender, recipients, scene.positions)
                if recipients:
                    letters.append(self._letter(episode, message, recipients, scene))
        return letters

    def _letter(self, episode: str, written: Message, recipients: tuple[str, ...], scene: Scene) -> _Letter:
        settings = self._of(episode)
        bits = entry_bits(written, scene.slots.get(written.sender, ()))
        message = written if recipients == written.recipients else replace(written, recipients=recipients)
        if settings.mode in (ChannelMode.CONSTANT, ChannelMode.RANDOM):
            # What arrives there must not depend on the length of what was written.
            return _Letter(episode, written, message, recipients, sum(bits or ()))
        if bits is None and settings.capped:
            raise ConfigError(
                f"channel: a cap needs to know the bits of messages, and {written.sender!r} sends {written.payload!r}, "
                "of which nothing is known"
            )
        if settings.truncate is not None:
            message = cut(message, settings.truncate)
            bits = None if bits is None else bits[: settings.truncate]
        if bits is None:
            return _Letter(episode, written, message, recipients, 0.0)
        capped = False
        if settings.cap_bits is not None:
            count = fitting(bits, settings.cap_bits)
            capped = not sum(bits[:count]) and sum(bits) > 0  # of what costs something nothing fits
            message, bits = cut(message, count), bits[:count]
        if settings.cap_episode_bits is not None and not capped:
            spent = self._spent[(episode, written.sender)] + sum(bits)
            capped = spent > settings.cap_episode_bits
            if not capped:
                self._spent[(episode, written.sender)] = spent
        if capped:
            return _Letter(episode, written, message, recipients, 0.0, capped=True)
        return _Letter(episode, written, message, recipients, sum(bits))

    def _held_back(self, letter: _Letter) -> bool:
        """Does nothing arrive because of a cap? In `shuffled` that would tell the length of what was written."""
        return letter.capped and self.settings.mode is not ChannelMode.SHUFFLED

    # ---- the modes

    def _by_mode(
        self,
        letters: Sequence[_Letter],
        groups: Mapping[str, str],
        step: int,
        scenes: Mapping[str, Scene] | None,
    ) -> list[Message | None]:
        """What is delivered for each message; None where nothing is."""
        mode = self.settings.mode
        if mode is ChannelMode.SHUFFLED:
            return self._shuffled(letters, groups, np.random.default_rng(derive_seed(self._seed, "channel", step)))
        if mode is ChannelMode.CONSTANT:
            return [distortion.constant(letter.message, _slots(letter, scenes)) for letter in letters]
        if mode is ChannelMode.RANDOM:
            return self._random(letters, groups, step, scenes)
        return [letter.message for letter in letters]

    def _shuffled(
        self, letters: Sequence[_Letter], groups: Mapping[str, str], rng: np.random.Generator
    ) -> list[Message | None]:
        company = self._company(letters, groups)
        found: list[Message | None] = []
        for letter, pool in zip(letters, company, strict=True):
            message = letter.message
            if pool:
                other = pool[int(rng.integers(len(pool)))]
                found.append(replace(other, recipients=message.recipients, sent_at=message.sent_at))
            else:
                found.append(None)
        return found

    def _random(
        self,
        letters: Sequence[_Letter],
        groups: Mapping[str, str],
        step: int,
        scenes: Mapping[str, Scene] | None,
    ) -> list[Message | None]:
        company: Iterable[Sequence[Message]] = [()] * len(letters)
        if any(letter.message.latent is not None and not letter.message.latent.levels for letter in letters):
            company = self._company(letters, groups)
        found: list[Message | None] = []
        for letter, pool in zip(letters, company, strict=True):
            rng = np.random.default_rng(
                derive_seed(self._seed, "random", letter.episode, letter.message.sender, step)
            )
            if letter.message.latent is None:
                found.append(distortion.random_words(letter.message, _slots(letter, scenes), rng))
            else:
                others: list[Latent] = [other.latent for other in pool if other.latent is not None]
                found.append(distortion.random_numbers(letter.message, others, rng))
        return found

    def _company(self, letters: Sequence[_Letter], groups: Mapping[str, str]) -> list[list[Message]]:
        """For each message, those of the same sender in other groups that a cap lets go: of this step, or else of
        earlier ones."""
        now: dict[str, list[tuple[str, Message]]] = defaultdict(list)
        for letter in letters:
            if not letter.capped:
                now[letter.message.sender].append((groups[letter.episode], letter.message))
        pools: dict[tuple[str, str], list[Message]] = {}
        found: list[list[Message]] = []
        for letter in letters:
            sender, group = letter.message.sender, groups[letter.episode]
            if (sender, group) not in pools:
                pool = [message for other, message in now[sender] if other != group]
                pools[sender, group] = pool or self._remembered(sender, group)
            found.append(pools[sender, group])
        for sender, sent_now in now.items():
            for group, message in sent_now:
                self._past[sender].setdefault(group, deque(maxlen=_REMEMBERED)).append(_Sent(self._sent, message))
                self._sent += 1
        return found

    def _remembered(self, sender: str, group: str) -> list[Message]:
        """What is remembered of a sender from other groups, oldest first."""
        past = [sent for other, held in self._past[sender].items() if other != group for sent in held]
        return [sent.message for sent in sorted(past, key=lambda sent: sent.number)]

    # ---- the recipient's side

    def _dispatch(
        self,
        letter: _Letter,
        message: Message | None,
        recipient: str,
        step: int,
        scenes: Mapping[str, Scene] | None,
    ) -> None:
        if self._held_back(letter):
            self._note(letter, recipient, Fate.CAPPED)
            return
        if message is None or self._lost(letter.episode, letter.written.sender, recipient, step):
            self._note(letter, recipient, Fate.ERASED)
            return
        message = self._distorted(letter, message, recipient, step, scenes)
        changed = message.payload != letter.written.payload or _numbers(message) != _numbers(letter.written)
        delay = self._of(letter.episode).delay
        if not delay:
            self._inboxes[(letter.episode, recipient)][message.sender] = message
            self._note(letter, recipient, Fate.ARRIVED, step + 1, changed)
            return
        entry = self._note(letter, recipient, Fate.LATE, None, changed)
        under_way = _UnderWay(step + 1 + delay, recipient, message, entry)
        self._under_way.setdefault(letter.episode, []).append(under_way)

    def _distorted(
        self,
        letter: _Letter,
        message: Message,
        recipient: str,
        step: int,
        scenes: Mapping[str, Scene] | None,
    ) -> Message:
        settings = self._of(letter.episode)
        if settings.mode not in (ChannelMode.ON, ChannelMode.SHUFFLED):
            return message
        if message.latent is None and settings.substitute:
            rng = self._rng("substitute", letter.episode, message.sender, recipient, step)
            return distortion.substituted(message, settings.substitute, _slots(letter, scenes), rng)
        if message.latent is not None and settings.noise:
            rng = self._rng("noise", letter.episode, message.sender, recipient, step)
            return distortion.noisy(message, settings.noise, rng)
        return message

    def _arrive(self, episode: str, step: int) -> None:
        """Deliver what is due."""
        waiting = self._under_way.get(episode)
        if waiting:
            log = self._log[episode]
            for each in waiting:
                if each.due <= step:
                    self._inboxes[(episode, each.recipient)][each.message.sender] = each.message
                    log[each.entry] = replace(log[each.entry], fate=Fate.ARRIVED, arrived_at=each.due)
            self._under_way[episode] = [each for each in waiting if each.due > step]

    def _note(
        self, letter: _Letter, recipient: str, fate: Fate, arrived_at: int | None = None, changed: bool = False
    ) -> int:
        """Write a delivery down; its place in the log."""
        log = self._log[letter.episode]
        written = letter.written
        log.append(Delivery(written.sender, recipient, written.sent_at, fate, arrived_at, letter.bits, changed))
        return len(log) - 1

    def _lost(self, episode: str, sender: str, recipient: str, step: int) -> bool:
        """Decided by the message alone, so that a loss does not depend on which other episodes are running."""
        drop = self._of(episode).drop
        if not drop:
            return False
        seed = np.array([derive_seed(self._seed, "loss", episode, sender, recipient)], dtype=np.uint64)
        return bool(uniforms(seed, step)[0] < drop)

    def _rng(self, what: str, episode: str, sender: str, recipient: str, step: int) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self._seed, what, episode, sender, recipient, step))


def _numbers(message: Message) -> tuple[tuple[float, ...], ...]:
    return () if message.latent is None else message.latent.values


def _slots(letter: _Letter, scenes: Mapping[str, Scene] | None) -> tuple[Slot, ...]:
    """The words that the sender of a message could send."""
    return () if scenes is None else scenes[letter.episode].slots.get(letter.written.sender, ())
