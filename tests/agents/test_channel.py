"""The channel: who hears what, when, and what the controls take away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from preconcert.agents import Channel, ChannelHarm, ChannelMode, ChannelSettings
from preconcert.agents.channel import Messenger, Nearest, Pairs, Scene, check_topology, drawn
from preconcert.core import ConfigError, Delivery, Fate, Message, Slot, UnknownNameError
from preconcert.envs import make_env


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


@pytest.mark.parametrize("mates", [1, 300])
def test_a_group_that_plays_on_alone_still_hears_others(mates: int) -> None:
    channel = Channel(ChannelSettings(mode=ChannelMode.SHUFFLED), 0)
    names = {f"e{i}": "long" for i in range(mates)}
    channel.transmit({e: [say("a", 0, g)] for e, g in {**names, "s": "short"}.items()}, {**names, "s": "short"}, 0)
    for step in range(1, 600 if mates == 1 else 4):
        channel.transmit({e: [say("a", step, "long")] for e in names}, names, step)
        for episode in names:
            (message,) = channel.inbox(episode, "b")
            assert (message.payload, message.sent_at) == ("short", step)


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


def test_everything_lost_is_as_good_as_off() -> None:
    lossy, off = (Channel(ChannelSettings(**s), 0) for s in ({"drop": 1.0}, {"mode": "off"}))  # type: ignore[arg-type]
    for channel in (lossy, off):
        for step in range(3):
            channel.transmit({"e": [say("a", step, "one", "b", "c")]}, {"e": "g"}, step)
        assert channel.inbox("e", "b") == channel.inbox("e", "c") == ()
    assert {each.fate for each in lossy.deliveries("e")} == {Fate.ERASED}
    assert off.deliveries("e") == (), "nothing was sent"


def test_every_message_and_recipient_leaves_a_record() -> None:
    channel = Channel(ChannelSettings(), 0)
    word = replace(say("a", 0, "one", "b", "c"), word_bits=(2.0,))
    channel.transmit({"e": [word, say("b", 0, "two", "a")], "f": []}, {"e": "g", "f": "g"}, 0)
    channel.too_late({"e": [say("c", 1, "three", "a")]}, 1)
    assert channel.deliveries("e") == (
        Delivery("a", "b", 0, Fate.ARRIVED, 1, 2.0),
        Delivery("a", "c", 0, Fate.ARRIVED, 1, 2.0),
        Delivery("b", "a", 0, Fate.ARRIVED, 1, 0.0),
        Delivery("c", "a", 1, Fate.LATE, None, 0.0),
    )
    assert channel.inbox("e", "a")[0].payload == "two", "what comes too late is not read"
    assert channel.deliveries("f") == ()
    channel.close("e")
    assert channel.deliveries("e") == ()


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_delayed_message_arrives_exactly_then(delay: int) -> None:
    channel, steps = Channel(ChannelSettings(delay=delay), 0), 8
    for step in range(steps):
        inbox = channel.inbox("e", "b")
        assert [m.payload for m in inbox] == ([f"w{step - 1 - delay}"] if step > delay else [])
        channel.transmit({"e": [say("a", step, f"w{step}")]}, {"e": "g"}, step)
    for step, each in enumerate(channel.deliveries("e")):
        late = step + 1 + delay > steps
        assert (each.sent_at, each.fate) == (step, Fate.LATE if late else Fate.ARRIVED)
        assert each.arrived_at == (None if late else step + 1 + delay)


def test_a_fork_goes_on_from_everything_that_is_held() -> None:
    settings = ChannelSettings(delay=1, cap_episode_bits=4.0)
    channel, straight = Channel(settings, 0), Channel(settings, 0)

    def send(on: Channel, episode: str, step: int) -> None:
        on.transmit({episode: [replace(say("a", step, f"w{step}"), word_bits=(2.0,))]}, {episode: "g"}, step)

    for on in (channel, straight):
        send(on, "e", 0)
    channel.fork("e", "f")
    channel.close("e")
    for step in (1, 2, 3):
        send(channel, "f", step)
        send(straight, "e", step)
        assert channel.inbox("f", "b") == straight.inbox("e", "b")
    assert channel.deliveries("f") == straight.deliveries("e")
    fates = [each.fate for each in channel.deliveries("f")]
    assert fates == [Fate.ARRIVED, Fate.ARRIVED, Fate.CAPPED, Fate.CAPPED], "what was spent before counts"
    assert channel.inbox("e", "b") == ()


def test_a_fork_and_its_origin_are_apart() -> None:
    channel = Channel(ChannelSettings(delay=1), 0)
    channel.transmit({"e": [say("a", 0, "one")]}, {"e": "g"}, 0)
    channel.fork("e", "f")
    channel.transmit({"f": []}, {"f": "g"}, 1)
    assert heard(channel, "f", "b") == {"a": "one"}
    assert heard(channel, "e", "b") == {}
    assert channel.deliveries("e")[0].fate is Fate.LATE


def test_an_episode_can_have_a_channel_of_its_own() -> None:
    plain, dead = ChannelSettings(), ChannelHarm(drop=1.0).of(ChannelSettings())
    late = ChannelHarm(delay=1, substitute=1.0).of(plain)
    channel = Channel(plain, 0, {"dead": dead, "late": late})
    assert channel.looks, "substitution needs the words"
    names = ("fine", "dead", "late")
    scenes = {name: Scene({"a": (Slot("word", ("one", "two")),)}) for name in (*names, "copy", "copy of late")}
    channel.transmit({name: [say("a", 0, "one")] for name in names}, dict.fromkeys(names, "g"), 0, scenes)
    assert [heard(channel, name, "b") for name in names] == [{"a": "one"}, {}, {}]
    channel.fork("dead", "copy")
    channel.fork("late", "copy of late")
    everyone = (*names, "copy", "copy of late")
    channel.transmit({name: [say("a", 1, "one")] for name in everyone}, dict.fromkeys(everyone, "g"), 1, scenes)
    assert [heard(channel, name, "b").get("a") for name in everyone] == ["one", None, "two", None, "two"]
    channel.close("dead")
    channel.transmit({"dead": [say("a", 2, "one")]}, {"dead": "g"}, 2, scenes)
    assert heard(channel, "dead", "b") == {"a": "one"}, "the name is free again"
    with pytest.raises(ConfigError, match="channel of 'e': mode"):
        Channel(plain, 0, {"e": ChannelSettings(mode=ChannelMode.SHUFFLED)})


def test_a_harm_leaves_everything_else_as_it_is() -> None:
    given = ChannelSettings(cap_episode_bits=9.0, drop=0.2, noise=0.1, rounds=2)
    harm = ChannelHarm(weight=3, drop=0.5, substitute=0.4, delay=2, cap_bits=0.0)
    assert harm.of(given) == ChannelSettings(
        cap_episode_bits=9.0, drop=0.5, noise=0.1, rounds=2, substitute=0.4, delay=2, cap_bits=0.0
    )
    assert harm.of_scripts(ChannelSettings()) == ChannelSettings(drop=0.5, delay=2)
    assert ChannelHarm().of(given) == given
    for wrong in ({"drop": 1.5}, {"weight": 0}, {"mode": "off"}):
        with pytest.raises(ValidationError):
            ChannelHarm.model_validate(wrong)


@given(
    weights=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=6), count=st.integers(1, 40), seed=st.integers(0, 999)
)
def test_harms_are_drawn_by_weight(weights: list[float], count: int, seed: int) -> None:
    harms = {f"h{number}": ChannelHarm(weight=weight) for number, weight in enumerate(weights)}
    names = drawn(harms, count, seed)
    assert len(names) == count
    assert names == drawn(harms, count, seed)
    for name, harm in harms.items():
        assert abs(names.count(name) - count * harm.weight / sum(weights)) < 1.0 + 1e-6
    assert drawn({}, count, seed) == ()


def test_harms_come_in_another_order_every_time() -> None:
    harms = {"one": ChannelHarm(), "other": ChannelHarm()}
    first = [drawn(harms, 8, seed)[0] for seed in range(200)]
    assert 70 < first.count("one") < 130


NAMES = ("a", "b", "c", "d")


def reached(topology: Any, positions: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, str]:
    channel = Channel(ChannelSettings(topology=topology), 0)
    sent = [say(name, 0, "one", *(other for other in NAMES if other != name)) for name in NAMES]
    channel.transmit({"e": sent}, {"e": "g"}, 0, {"e": Scene(positions=positions)})
    found: dict[str, list[str]] = {name: [] for name in NAMES}
    for name in NAMES:
        for message in channel.inbox("e", name):
            assert name in message.recipients
            found[message.sender].append(name)
    records = sorted((each.sender, each.recipient) for each in channel.deliveries("e"))
    assert records == sorted((sender, name) for sender, names in found.items() for name in names)
    return {sender: "".join(names) for sender, names in found.items()}


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("broadcast", {"a": "bcd", "b": "acd", "c": "abd", "d": "abc"}),
        ({"type": "pairs", "pairs": {"a": ["b", "d"], "c": ["a"]}}, {"a": "bd", "b": "", "c": "a", "d": ""}),
        ({"type": "pairs", "pairs": [["a", "b"], ["c", "b"]]}, {"a": "b", "b": "ac", "c": "b", "d": ""}),
        ({"type": "messenger", "name": "c"}, {"a": "c", "b": "c", "c": "abd", "d": "c"}),
        ({"type": "nearest", "k": 1}, {"a": "b", "b": "a", "c": "b", "d": "c"}),
        ({"type": "nearest", "k": 2}, {"a": "bc", "b": "ac", "c": "ab", "d": "bc"}),
        ({"type": "nearest", "k": 9}, {"a": "bcd", "b": "acd", "c": "abd", "d": "abc"}),
    ],
)
def test_who_hears_whom(topology: Any, expected: Mapping[str, str]) -> None:
    assert reached(topology, {"a": (0, 0), "b": (0, 1), "c": (1, 2), "d": (5, 5)}) == expected


def test_of_equally_near_agents_the_first_ones_hear() -> None:
    assert reached({"type": "nearest", "k": 1}, dict.fromkeys(NAMES, (2, 2)))["d"] == "a"


def test_a_topology_must_fit_the_task() -> None:
    grid, signal = make_env("rendezvous", {}, 0), make_env("signal", {}, 0)
    check_topology(Nearest(k=1), grid, "rendezvous")
    check_topology(Nearest(k=1), make_env("rendezvous", {"talk_rounds": 2}, 0), "rendezvous")
    with pytest.raises(ConfigError, match=r"signal does not say where agents are; give it a `positions\(\)`"):
        check_topology(Nearest(k=1), signal, "signal")
    with pytest.raises(UnknownNameError, match="did you mean 'agent_0'"):
        check_topology(Messenger(name="agnt_0"), grid, "rendezvous")
    with pytest.raises(UnknownNameError, match="'agent_2'"):
        check_topology(Pairs(pairs={"agent_0": ("agent_2",)}), grid, "rendezvous")
    with pytest.raises(ConfigError, match="nobody says where 'a' is"):
        reached({"type": "nearest", "k": 1})
    with pytest.raises(ConfigError, match="'a' has 2 coordinates and 'c' 1"):
        reached({"type": "nearest", "k": 1}, {"a": (0, 0), "b": (0, 1), "c": (1,), "d": (5, 5)})


def test_plain_settings_tell_what_they_always_told() -> None:
    assert ChannelSettings().told() == {"mode": "on", "drop": 0.0}
    assert ChannelSettings(delay=2, topology=Nearest(k=2)).told() == {
        "mode": "on", "drop": 0.0, "delay": 2, "topology": {"type": "nearest", "k": 2},
    }  # fmt: skip


def test_settings_are_checked() -> None:
    wrongs: list[dict[str, Any]] = [
        {"drop": 1.5}, {"mode": "loud"}, {"dorp": 0.1}, {"delay": -1}, {"rounds": 0}, {"truncate": 0}, {"noise": -1},
        {"cap_bits": -1}, {"substitute": 2}, {"topology": "star"}, {"topology": {"k": 2}}, {"topology": "nearest"},
        {"topology": {"type": "pairs", "pairs": [["a"]]}}, {"topology": {"type": "nearest", "k": 0}},
    ]  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(ValidationError):
            ChannelSettings(**wrong)
