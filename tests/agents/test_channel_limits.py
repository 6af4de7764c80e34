"""What is cut off messages, and what is not sent: caps are never exceeded, and bits are what they are said to be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preconcert.agents.channel import Channel, ChannelSettings, Scene, slot_bits
from preconcert.agents.channel.meter import cut, entry_bits, fitting
from preconcert.core import ConfigError, Fate, Latent, Message, Slot

SLOTS = (Slot("w1", ("a", "b", "c", "d")), Slot("w2", ("x", "y")))
SCENES = {"e": Scene({"s": SLOTS})}


def words(payload: str, *bits: float, step: int = 0) -> Message:
    return Message("s", ("r",), payload, 7.0, len(payload.split()), step, bits)


def numbers(vectors: int, dims: int = 2, levels: int = 4) -> Message:
    values = tuple((1.0,) * dims for _ in range(vectors))
    latent = Latent(values, levels, values, (-0.5,) * vectors)
    return Message("s", ("r",), " ".join(["<v>"] * vectors), 0.0, vectors, 0, (), latent)


def through(channel: Channel, message: Message, step: int = 0) -> Message | None:
    """What the recipient has after this message."""
    channel.transmit({"e": [message]}, {"e": "g"}, step, SCENES)
    inbox = channel.inbox("e", "r")
    return inbox[0] if inbox else None


@pytest.mark.parametrize(
    ("cap", "payload", "bits"),
    [(7, "a b c", 6.0), (6, "a b c", 6.0), (5.9, "a b", 4.0), (4, "a b", 4.0), (3, "a", 2.0), (2, "a", 2.0)],
)
def test_words_are_cut_from_the_end_until_it_fits(cap: float, payload: str, bits: float) -> None:
    channel = Channel(ChannelSettings(cap_bits=cap), 0)
    found = through(channel, words("a b c", 2.0, 2.0, 2.0))
    assert found is not None
    assert (found.payload, found.raw_bits, found.bits) == (payload, bits, 7.0)
    (record,) = channel.deliveries("e")
    assert (record.fate, record.bits, record.changed) == (Fate.ARRIVED, bits, payload != "a b c")


@pytest.mark.parametrize("cap", [0.0, 1.9])
def test_a_message_of_which_nothing_fits_is_not_sent(cap: float) -> None:
    channel = Channel(ChannelSettings(cap_bits=cap), 0)
    assert through(channel, words("a b", 2.0, 2.0)) is None
    assert through(channel, words("row 3", 0.0, 2.0)) is None, "nor are words that say nothing"
    assert [(each.fate, each.bits) for each in channel.deliveries("e")] == [(Fate.CAPPED, 0.0)] * 2


def test_the_end_of_a_message_that_fills_its_cap_needs_no_mark() -> None:
    channel = Channel(ChannelSettings(cap_bits=5.0), 0)
    found = through(channel, words("a b", 2.0, 2.0, 2.0))
    assert found is not None
    assert (found.payload, found.raw_bits) == ("a b", 4.0)
    assert not channel.deliveries("e")[0].changed


def test_a_message_beyond_the_budget_is_not_sent_and_a_shorter_one_still_is() -> None:
    channel = Channel(ChannelSettings(cap_episode_bits=7.0), 0)
    lengths = (2, 3, 1, 1)
    for step, count in enumerate(lengths):
        through(channel, words(" ".join("abcd"[:count]), *[2.0] * count, step=step), step)
    fates = [each.fate for each in channel.deliveries("e")]
    assert fates == [Fate.ARRIVED, Fate.CAPPED, Fate.ARRIVED, Fate.CAPPED]
    assert [m.payload for m in channel.inbox("e", "r")] == ["a"]
    channel.close("e")
    assert through(channel, words("a b c", 2.0, 2.0, 2.0)) is not None, "another episode has a budget of its own"


@settings(max_examples=150, deadline=None)
@given(
    sent=st.lists(
        st.tuples(st.sampled_from(["s", "t"]), st.lists(st.floats(0, 9), max_size=5), st.booleans()), max_size=12
    ),
    cap=st.none() | st.floats(0, 20),
    budget=st.none() | st.floats(0, 40),
    limit=st.none() | st.integers(1, 4),
)
def test_no_cap_is_ever_exceeded(
    sent: list[tuple[str, list[float], bool]], cap: float | None, budget: float | None, limit: int | None
) -> None:
    channel = Channel(ChannelSettings(cap_bits=cap, cap_episode_bits=budget, truncate=limit), 0)
    spent = {"s": 0.0, "t": 0.0}
    for step, (sender, bits, ends) in enumerate(sent):
        payload = " ".join(f"w{i}" for i in range(len(bits) - (ends and bool(bits))))
        message = replace(words(payload, *bits, step=step), sender=sender, recipients=("r", "q"))
        channel.transmit({"e": [message]}, {"e": "g"}, step, SCENES)
        records = [each for each in channel.deliveries("e") if each.sent_at == step]
        assert len(records) == 2
        assert len({(each.fate, each.bits) for each in records}) == 1
        arrived = [m for m in channel.inbox("e", "r") if m.sent_at == step]
        assert bool(arrived) == (records[0].fate is Fate.ARRIVED)
        for each in arrived:
            assert cap is None or each.raw_bits <= cap
            assert limit is None or len(each.payload.split()) <= limit
            assert payload.split()[: len(each.payload.split())] == each.payload.split(), "cut from the end"
            assert each.raw_bits == records[0].bits
        spent[sender] += records[0].bits
        assert budget is None or spent[sender] <= budget
        if cap is budget is limit is None:
            assert arrived == [message]


@pytest.mark.parametrize("limits", [{"cap_bits": 4.0}, {"cap_episode_bits": 9.0}, {"cap_bits": 4.0, "truncate": 1}])
def test_in_shuffled_what_arrives_does_not_depend_on_ones_own_bits(limits: dict[str, float]) -> None:
    """Nothing, one word, three, more than any cap, and what costs nothing: as much arrives, and as often."""
    own = (("", ()), ("a", (2.0,)), ("a b c", (2.0,) * 3), ("a b", (50.0, 1.0)), ("a", (0.0,)))
    inboxes, fates = [], []
    for payload, bits in own:
        channel = Channel(ChannelSettings(mode="shuffled", **limits), 0)  # type: ignore[arg-type]
        got = []
        for step in range(6):
            mine = words(payload, *bits, step=step)
            others = {f"o{i}": [words(f"d{i} e f", 2.0, 2.0, 2.0, step=step)] for i in range(3)}
            groups = {"e": "g", **{name: name for name in others}}
            # Last in order, so that it is served after the others.
            channel.transmit({**others, "e": [mine]}, groups, step, dict.fromkeys(groups, SCENES["e"]))
            got.append([(m.payload, m.word_bits, m.sent_at) for m in channel.inbox("e", "r")])
            for message in channel.inbox("e", "r"):
                assert message.raw_bits <= limits.get("cap_bits", 9.0)
                assert len(message.payload.split()) <= limits.get("truncate", 3)
        fates.append([each.fate for each in channel.deliveries("e")])
        inboxes.append([[(sent_at, len(word.split())) for word, _, sent_at in each] for each in got])
        assert all(each[0][2] == step for step, each in enumerate(got)), "something new arrives in every step"
    assert all(each == inboxes[0] for each in inboxes)
    assert all(each == [Fate.ARRIVED] * 6 for each in fates)


def test_in_shuffled_what_was_not_sent_is_not_taken() -> None:
    channel = Channel(ChannelSettings(mode="shuffled", cap_bits=4.0), 0)  # type: ignore[arg-type]
    sent = {"e": [words("a", 9.0)], "f": [words("b", 2.0)]}
    channel.transmit(sent, {"e": "g", "f": "h"}, 0, dict.fromkeys(sent, SCENES["e"]))
    assert [m.payload for m in channel.inbox("e", "r")] == ["b"]
    assert channel.inbox("f", "r") == ()
    assert [channel.deliveries(name)[0].fate for name in sent] == [Fate.ARRIVED, Fate.ERASED]


def test_truncation_counts_words() -> None:
    channel = Channel(ChannelSettings(truncate=2), 0)
    found = through(channel, words("a b c", 1.0, 2.0, 3.0))
    assert found is not None
    assert (found.payload, found.raw_bits) == ("a b", 3.0)
    unknown = through(channel, words("some words here"))
    assert unknown is not None
    assert unknown.payload == "some words"


def test_latent_messages_are_cut_by_vectors() -> None:
    message = numbers(3)
    assert entry_bits(message, ()) == (4.0, 4.0, 4.0)
    for channel in (Channel(ChannelSettings(cap_bits=9.0), 0), Channel(ChannelSettings(truncate=2), 0)):
        found = through(channel, message)
        assert found is not None
        assert found.latent is not None
        assert found.latent.values == ((1.0, 1.0),) * 2
        assert len(found.latent.drawn) == len(found.latent.logprobs) == len(found.payload.split()) == 2
        assert channel.deliveries("e")[0].bits == found.latent.bits == 8.0
    assert sum(entry_bits(numbers(2, 3, 0), ()) or ()) == 2 * 3 * 32 == numbers(2, 3, 0).latent.bits  # type: ignore[union-attr]
    assert through(Channel(ChannelSettings(cap_bits=3.0), 0), message) is None


def test_bits_are_taken_from_the_slots_where_a_message_does_not_say() -> None:
    assert slot_bits(["a", "y"], SLOTS) == (2.0, 1.0)
    assert slot_bits(["a"], SLOTS) == (2.0,)
    assert slot_bits(["a", "z"], SLOTS) is None
    assert slot_bits(["a", "x", "x"], SLOTS) is None
    channel = Channel(ChannelSettings(cap_bits=2.5), 0)
    found = through(channel, words("a y"))
    assert found is not None
    assert found.payload == "a"
    assert channel.deliveries("e")[0].bits == 2.0


def test_a_cap_on_what_is_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match="a cap needs to know the bits of messages, and 's' sends 'what is this'"):
        through(Channel(ChannelSettings(cap_bits=9.0), 0), words("what is this"))
    channel = Channel(ChannelSettings(), 0)
    assert through(channel, words("what is this")) == words("what is this"), "without a cap it goes as it is"
    assert channel.deliveries("e")[0].bits == 0.0


@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.floats(0, 5), max_size=6), cap=st.floats(0, 20))
def test_as_much_as_possible_is_kept(bits: list[float], cap: float) -> None:
    count = fitting(bits, cap)
    assert sum(bits[:count]) <= cap
    assert count == len(bits) or sum(bits[: count + 1]) > cap


def test_nothing_is_cut_where_everything_fits() -> None:
    message = words("a x", 2.0, 1.0)
    assert cut(message, 2) is message
    assert cut(message, 9) is message
    assert math.isclose(cut(message, 1).raw_bits, 2.0)
