"""What a channel does to a message: words replaced, numbers made noisy; and the messages of the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preconcert.agents.channel.meter import spelled
from preconcert.core import ConfigError, Latent, Message, Slot


def substituted(message: Message, probability: float, slots: Sequence[Slot], rng: np.random.Generator) -> Message:
    """Each word, with a probability, as another word of its slot, uniformly. A word without an alternative stays.

    Raises:
        ConfigError: nothing is known of what else could stand in a word's place.
    """
    words = message.payload.split()
    if len(words) > len(slots):
        raise ConfigError(
            f"channel.substitute: {message.sender!r} sends {len(words)} words, and only {len(slots)} slots are known"
        )
    found: list[str] = []
    for word, slot in zip(words, slots, strict=False):
        hit, which = rng.random() < probability, rng.random()  # two draws per word, whatever becomes of it
        others = [choice for choice in slot.choices if choice != word]
        found.append(others[int(which * len(others))] if hit and others else word)
    return replace(message, payload=" ".join(found)) if found != words else message


def noisy(message: Message, deviation: float, rng: np.random.Generator) -> Message:
    """Gaussian noise on every number; quantised ones go to the nearest of their values.

    How a message was drawn, and from which words it was made, stays with it: that is its sender's affair, for the log.
    """
    latent = message.latent
    if latent is None or not latent.values:
        return message
    sent = np.asarray(latent.values, dtype=np.float64)
    numbers = sent + rng.normal(0.0, deviation, sent.shape)
    if latent.levels:
        numbers = requantised(numbers, latent.levels)
        # A number that stays where it was arrives as it was written, to the last digit.
        numbers = np.where(numbers == requantised(sent, latent.levels), sent, numbers)
    values = _latent(numbers, latent.levels).values
    return message if values == latent.values else _with(message, replace(latent, values=values))


def requantised(numbers: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """The nearest of `levels` (at least 2) evenly spaced values from -1 to 1."""
    return _on_grid(np.round((np.clip(numbers, -1.0, 1.0) + 1.0) / 2.0 * (levels - 1)), levels)


def _on_grid(places: NDArray[Any], levels: int) -> NDArray[np.float64]:
    """The values with these numbers, from 0."""
    half = (levels - 1) / 2.0
    return (np.asarray(places, dtype=np.float64) - half) / half


def constant(message: Message, slots: Sequence[Slot]) -> Message:
    """What arrives in the control `constant`: in every slot the word that says nothing, or else the first one; of a
    latent message every number at zero, or at the quantised value next below it. It depends on nothing but the form.

    Raises:
        ConfigError: the words of messages are not known.
    """
    if message.latent is not None:
        zeros = np.zeros(np.shape(message.latent.values))
        levels = message.latent.levels
        # The nearest, were it not for even numbers of levels, which have two.
        middle = zeros if not levels else requantised(zeros - 1e-9, levels)
        return _with(message, _latent(middle, levels))
    return replace(
        message,
        payload=" ".join(slot.choices[0] if slot.null is None else slot.null for slot in _known(message, slots)),
        word_bits=(),
    )


def random_words(message: Message, slots: Sequence[Slot], rng: np.random.Generator) -> Message:
    """What arrives in the control `random`: a word of every slot, uniformly.

    Raises:
        ConfigError: the words of messages are not known.
    """
    words = [slot.choices[int(rng.integers(len(slot.choices)))] for slot in _known(message, slots)]
    return replace(message, payload=" ".join(words), word_bits=())


def random_numbers(message: Message, company: Sequence[Latent], rng: np.random.Generator) -> Message | None:
    """What arrives in the control `random` in the place of a latent message.

    Quantised numbers are drawn uniformly from their values. Any others come from a Gaussian around zero with the mean
    square of messages of the same sender in other groups, so that nothing of the episode's own is in it.

    Args:
        message: gives the form.
        company: those other messages.
        rng: draws the numbers.

    Returns:
        The message; None where there is no company to know the mean square from.
    """
    assert message.latent is not None
    shape, levels = np.shape(message.latent.values), message.latent.levels
    if levels:
        return _with(message, _latent(_on_grid(rng.integers(levels, size=shape), levels), levels))
    if not company:
        return None
    size = float(np.sqrt(np.mean([np.mean(np.square(each.values)) for each in company])))
    return _with(message, _latent(rng.normal(0.0, size, shape), 0))


def _latent(numbers: NDArray[np.float64], levels: int) -> Latent:
    """Numbers that nobody drew or put words into."""
    return Latent(tuple(tuple(float(number) for number in vector) for vector in numbers), levels)


def _with(message: Message, latent: Latent) -> Message:
    """The message with other numbers, and these spelled for people."""
    return replace(message, payload=" ".join(spelled(latent)), latent=latent)


def _known(message: Message, slots: Sequence[Slot]) -> Sequence[Slot]:
    if not slots:
        raise ConfigError(f"nothing is known of the words that {message.sender!r} could send")
    return slots
