"""Words that change, numbers that get noisy, and controls that carry nothing of what was said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from preconcert.agents.channel import Channel, ChannelMode, ChannelSettings, Scene
from preconcert.agents.channel.distortion import constant, noisy, random_numbers, requantised
from preconcert.agents.channel.meter import cut, spelled
from preconcert.core import ConfigError, Fate, Latent, Message, Slot

SLOTS = (Slot("w1", ("a", "b", "c", "d")), Slot("w2", ("x", "y", "none"), null="none"))
SCENE = Scene({"s": SLOTS, "t": SLOTS})


def say(payload: str, step: int, sender: str = "s") -> Message:
    return Message(sender, ("r", "q"), payload, 1.0, 2, step)


def send(values: Any, step: int, levels: int = 0) -> Message:
    latent = Latent(tuple(tuple(map(float, vector)) for vector in values), levels, words=f"words of {step}")
    return Message("s", ("r", "q"), " ".join(spelled(latent)), 0.0, len(values), step, (), latent)


def play(settings: ChannelSettings, episodes: dict[str, list[Message]], seed: int = 0) -> dict[str, list[Message]]:
    """What r got in each step of each episode; every episode is a group of its own."""
    channel = Channel(settings, seed)
    found: dict[str, list[Message]] = {name: [] for name in episodes}
    for step in range(len(next(iter(episodes.values())))):
        channel.transmit(
            {e: [m[step]] for e, m in episodes.items()}, {e: e for e in episodes}, step, dict.fromkeys(episodes, SCENE)
        )
        for name in episodes:
            found[name] += [m for m in channel.inbox(name, "r") if m.sent_at == step - settings.delay]
    for name, messages in found.items():
        records = [each for each in channel.deliveries(name) if each.recipient == "r"]
        arrived = [each for each in records if each.fate is Fate.ARRIVED]
        assert len(arrived) == len(messages)
        for each, message in zip(arrived, messages, strict=True):
            written = episodes[name][each.sent_at]
            assert each.changed == ((message.payload, message.latent) != (written.payload, written.latent))
    return found


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_words_are_substituted_at_the_rate_that_was_set(rate: float) -> None:
    steps = 2000
    found = play(ChannelSettings(substitute=rate), {"e": [say("a x", step) for step in range(steps)]})["e"]
    first = Counter(m.payload.split()[0] for m in found)
    second = Counter(m.payload.split()[1] for m in found)
    for counts, slot, word in ((first, SLOTS[0], "a"), (second, SLOTS[1], "x")):
        assert set(counts) <= set(slot.choices)
        hit = 1 - counts[word] / steps
        assert hit == rate if rate in (0.0, 1.0) else abs(hit - rate) < 4 * (rate * (1 - rate) / steps) ** 0.5
        others = [counts[choice] for choice in slot.choices if choice != word]
        expected = rate * steps / len(others)
        assert all(abs(count - expected) <= 4 * max(expected, 1) ** 0.5 for count in others), "uniformly"
    both = sum(m.payload.split()[0] != "a" and m.payload.split()[1] != "x" for m in found) / steps
    assert abs(both - rate**2) < 0.05, "each word on its own"


def test_recipients_are_distorted_on_their_own() -> None:
    channel = Channel(ChannelSettings(substitute=0.5), 0)
    differ = 0
    for step in range(200):
        channel.transmit({"e": [say("a x", step)]}, {"e": "g"}, step, {"e": SCENE})
        differ += channel.inbox("e", "r")[0].payload != channel.inbox("e", "q")[0].payload
    assert 50 < differ < 190


def test_a_word_that_has_no_place_cannot_be_substituted() -> None:
    with pytest.raises(ConfigError, match="'s' sends 3 words, and only 2 slots are known"):
        play(ChannelSettings(substitute=0.1), {"e": [say("a x more", 0)]})


def test_noise_has_the_size_that_was_set() -> None:
    steps, size = 500, 0.25
    found = play(ChannelSettings(noise=size), {"e": [send([[0.5, -2.0]], step) for step in range(steps)]})["e"]
    numbers = np.array([m.latent.values[0] for m in found if m.latent is not None])
    assert np.abs(numbers.mean(0) - [0.5, -2.0]).max() < 4 * size / steps**0.5
    assert np.abs(numbers.std(0) - size).max() < 0.04
    assert all(m.payload == f"{m.latent.values[0][0]:.2f},{m.latent.values[0][1]:.2f}" for m in found if m.latent)


@pytest.mark.parametrize("levels", [2, 4, 5])
def test_quantised_numbers_stay_quantised(levels: int) -> None:
    grid = np.linspace(-1.0, 1.0, levels)
    written = [send([[float(grid[step % levels])] * 2], step, levels) for step in range(300)]
    for size in (0.05, 0.6):
        found = play(ChannelSettings(noise=size), {"e": written})["e"]
        numbers = np.array([m.latent.values for m in found if m.latent is not None])
        assert np.abs(numbers[..., None] - grid).min(-1).max() < 1e-12
        kept = np.mean([m.latent == w.latent for m, w in zip(found, written, strict=True)])
        assert kept == 1.0 if size == 0.05 else kept < 0.95
    assert np.allclose(requantised(np.array([[-7.0, 7.0, 0.1]]), levels), [[-1, 1, grid[np.abs(grid - 0.1).argmin()]]])


@pytest.mark.parametrize("levels", [0, 4, 5])
def test_numbers_and_their_spelling_change_together(levels: int) -> None:
    grid = np.linspace(-1.0, 1.0, levels or 7)
    numbers = ([[grid[0], grid[-1]], [grid[1], grid[2]]], [[grid[2]] * 2, [grid[0]] * 2])
    written = [send(each, step, levels) for step, each in enumerate(numbers)]
    assert written[0].payload != written[1].payload
    rng = np.random.default_rng(0)
    alike = []
    for message in written:
        assert message.latent is not None
        same, noise = constant(message, ()), noisy(message, 1.0, rng)
        random = random_numbers(message, [written[0].latent], np.random.default_rng(1))  # type: ignore[list-item]
        assert random is not None
        kept = message.latent.words
        for each, words in ((same, ""), (random, ""), (noise, kept), (cut(message, 1), kept)):
            assert each.latent is not None
            assert each.payload.split() == spelled(each.latent)
            assert each.latent.words == words
            assert each.payload != message.payload
        assert noisy(message, 0.0, rng) is message, "no noise, no change"
        alike.append((same.payload, same.latent, random.payload, random.latent))
    assert alike[0] == alike[1], "nothing of the sender's is in what controls put there"


@pytest.mark.parametrize("mode", [ChannelMode.CONSTANT, ChannelMode.RANDOM])
@pytest.mark.parametrize("levels", [None, 4, 5])
def test_controls_carry_nothing_of_what_was_said(mode: ChannelMode, levels: int | None) -> None:
    def talk(which: int) -> dict[str, list[Message]]:
        rng = np.random.default_rng(which)
        if levels is None:
            return {
                f"e{i}": [say(f"{rng.choice(SLOTS[0].choices)} x"[: 1 + 2 * int(rng.integers(2))], t) for t in range(9)]
                for i in range(4)
            }
        grid = np.linspace(-1, 1, levels)
        return {f"e{i}": [send(rng.choice(grid, (2, 3)), t, levels) for t in range(9)] for i in range(4)}

    one, other = (play(ChannelSettings(mode=mode, cap_bits=3.0, drop=0.2), talk(which)) for which in (1, 2))
    assert {e: [(m.payload, m.latent) for m in found] for e, found in one.items()} == {
        e: [(m.payload, m.latent) for m in found] for e, found in other.items()
    }
    heard = {(m.payload, m.latent) for found in one.values() for m in found}
    assert len(heard) == 1 if mode is ChannelMode.CONSTANT else len(heard) > 5
    if levels is None:
        assert mode is not ChannelMode.CONSTANT or heard == {("a none", None)}, "what says nothing, or the first word"
        assert all(word in slot.choices for p, _ in heard for word, slot in zip(p.split(), SLOTS, strict=True))


def test_random_words_are_uniform_and_differ_between_episodes() -> None:
    found = play(ChannelSettings(mode=ChannelMode.RANDOM), {e: [say("a x", t) for t in range(400)] for e in ("e", "f")})
    counts = Counter(m.payload for messages in found.values() for m in messages)
    assert len(counts) == 12
    assert max(abs(count - 800 / 12) for count in counts.values()) < 4 * (800 / 12) ** 0.5
    assert [m.payload for m in found["e"]] != [m.payload for m in found["f"]]


def test_random_numbers_without_levels_have_the_size_of_others() -> None:
    rng = np.random.default_rng(0)
    sizes = {"big": 5.0, "one": 1.0, "two": 1.0}
    written = {e: [send(rng.normal(0, size, (2, 4)), t) for t in range(300)] for e, size in sizes.items()}
    found = play(ChannelSettings(mode=ChannelMode.RANDOM), written)
    std = {e: np.std([m.latent.values for m in got if m.latent is not None]) for e, got in found.items()}
    assert abs(std["big"] - 1.0) < 0.1, "its own messages have no part in it"
    assert abs(std["one"] - 13**0.5) < 0.3
    alone = play(ChannelSettings(mode=ChannelMode.RANDOM), {"one": written["one"]})
    assert alone == {"one": []}, "nothing is known of their size"


@pytest.mark.parametrize("mode", [ChannelMode.CONSTANT, ChannelMode.RANDOM])
def test_controls_need_words(mode: ChannelMode) -> None:
    with pytest.raises(ConfigError, match="nothing is known of the words that 's' could send"):
        Channel(ChannelSettings(mode=mode), 0).transmit({"e": [say("a x", 0)]}, {"e": "g"}, 0, {"e": Scene()})


@pytest.mark.parametrize(
    "settings",
    [
        ChannelSettings(substitute=0.5, drop=0.3, delay=2),
        ChannelSettings(mode=ChannelMode.RANDOM, drop=0.3),
        ChannelSettings(mode=ChannelMode.CONSTANT, drop=0.5, delay=1),
    ],
)
def test_nothing_depends_on_the_company(settings: ChannelSettings) -> None:
    def got(names: Sequence[str], seed: int = 3) -> dict[str, list[str]]:
        found = play(settings, {e: [say("a x", t) for t in range(12)] for e in names}, seed)
        return {e: [f"{m.sent_at} {m.payload}" for m in messages] for e, messages in found.items()}

    together = got(["e", "f", "g"])
    assert got(["g"]) == {"g": together["g"]}
    assert got(["f", "e"]) == {e: together[e] for e in ("f", "e")}
    assert got(["e", "f", "g"], seed=4) != together
