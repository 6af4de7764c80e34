"""The channel: who hears what, when, and what the controls take away."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from preconcert.agents import Channel, ChannelMode, ChannelSettings
from preconcert.core import Message


def say(sender: str, step: int, payload: str, *recipients: str) -> Message:
    return Message(sender, recipients or ("b",), payload, 1.0, 1, step)


def heard(channel: Channel, episode: str, agent: str) -> dict[str, str]:
    return {message.sender: message.payload for message in channel.inbox(episode, agent)}


def test_the_inbox_keeps_the_last_message_of_each_sender() -> None:
    channel = Channel(ChannelSettings(), 0)
    assert channel.inbox("e", "b") == ()
    channel.transmit({"e": [say("a", 0, "one"), say("c", 0, "two")]}, {"e": "g"}, 0)
    channel.transmit({"e": [say("a", 1, "three")]}, {"e": "g"}, 1)
    channel.transmit({"e": []}, {"e": "g"}, 2)
    assert [m.payload for m in channel.inbox("e", "b")] == ["two", "three"], "oldest first, and they stay"
    assert channel.inbox("e", "a") == ()
    assert channel.inbox("other", "b") == ()
    channel.close("e")
    assert channel.inbox("e", "b") == ()


def test_off_delivers_nothing() -> None:
    channel = Channel(ChannelSettings(mode=ChannelMode.OFF), 0)
    channel.transmit({"e": [say("a", 0, "one")]}, {"e": "g"}, 0)
    assert channel.inbox("e", "b") == ()


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    talkers=st.lists(st.lists(st.sampled_from(["a", "c"]), unique=True), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_shuffled_messages_never_come_from_the_same_group(
    groups: list[int], talkers: list[list[str]], seed: int
) -> None:
    channel = Channel(ChannelSettings(mode=ChannelMode.SHUFFLED), seed)
    names = {f"e{i}": f"g{group}" for i, group in enumerate(groups)}
    for step, senders in enumerate(talkers):
        sent = {e: [say(s, step, f"{names[e]} {s} {step}") for s in senders] for e in names}
        channel.transmit(sent, names, step)
        for episode, group in names.items():
            for message in channel.inbox(episode, "b"):
                source, sender, _ = message.payload.split()
                assert source != group
                assert sender == message.sender
                assert message.recipients == ("b",)
            if len(set(groups)) > 1:
                assert set(senders) <= heard(channel, episode, "b").keys(), "every message is replaced by another"
    if len(set(groups)) == 1:
        assert all(channel.inbox(episode, "b") == () for episode in names)


@pytest.mark.parametrize("drop", [0.0, 0.25, 1.0])
def test_messages_are_lost_at_the_rate_that_was_set(drop: float) -> None:
    channel = Channel(ChannelSettings(drop=drop), 1)
    count = 2000
    for step in range(4):
        episodes = {f"{step}-{i}": "g" for i in range(count // 4)}
        channel.transmit({e: [say("a", step, "one", "b", "c")] for e in episodes}, episodes, step)
    got = [(f"{s}-{i}", agent) for s in range(4) for i in range(count // 4) for agent in ("b", "c")]
    lost = [not channel.inbox(*name) for name in got]
    rate = sum(lost) / len(lost)
    assert rate == drop if drop in (0.0, 1.0) else abs(rate - drop) < 4 * (drop * (1 - drop) / len(lost)) ** 0.5
    both = sum(a and b for a, b in zip(lost[::2], lost[1::2], strict=True)) / count
    assert abs(both - drop**2) < 0.04, "the recipients lose independently"


def test_a_loss_does_not_depend_on_the_company() -> None:
    def run(episodes: Mapping[str, str]) -> dict[str, bool]:
        channel = Channel(ChannelSettings(drop=0.5), 3)
        channel.transmit({e: [say("a", 0, "one")] for e in episodes}, episodes, 0)
        return {e: bool(channel.inbox(e, "b")) for e in episodes}

    everyone = {f"e{i}": f"g{i}" for i in range(40)}
    together = run(everyone)
    assert len(set(together.values())) == 2
    assert {e: run({e: g})[e] for e, g in everyone.items()} == together


def test_settings_are_checked() -> None:
    for wrong in ({"drop": 1.5}, {"mode": "loud"}, {"dorp": 0.1}):
        with pytest.raises(ValidationError):
            ChannelSettings(**wrong)  # type: ignore[arg-type]
