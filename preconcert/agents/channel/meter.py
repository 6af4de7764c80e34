"""Bits without any model: what a message costs, and what is cut off it.

A message is a row of entries, each with the number of bits it takes: one per word or vector, and one more where its end
was a choice too. It is cut at an entry; both sides know the costs of entries and the cap, so the receiver knows without
being told where a message that reached the cap ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from preconcert.core import Latent, Message, Slot


def vector_bits(latent: Latent) -> tuple[float, ...]:
    """Bits of each vector of a latent message; in all `Latent.bits`."""
    return tuple(Latent((vector,), latent.levels).bits for vector in latent.values)


def slot_bits(words: Sequence[str], slots: Sequence[Slot]) -> tuple[float, ...] | None:
    """Bits of words that each stand in a slot; None where one of them does not."""
    if len(words) > len(slots):
        return None
    if any(word not in slot.choices for word, slot in zip(words, slots, strict=False)):
        return None
    return tuple(math.log2(len(slot.choices)) for slot in slots[: len(words)])


def entry_bits(message: Message, slots: Sequence[Slot]) -> tuple[float, ...] | None:
    """Bits of each entry of a message; None where they are not known.

    Args:
        message: what it says of itself (`Message.word_bits`) comes first.
        slots: the words that could stand in its places.
    """
    if message.word_bits:
        return message.word_bits
    if message.latent is not None:
        return vector_bits(message.latent)
    return slot_bits(message.payload.split(), slots)


def fitting(bits: Sequence[float], cap: float) -> int:
    """How many entries fit into a cap, from the first."""
    total, count = 0.0, 0
    for each in bits:
        total += each
        if total > cap:
            break
        count += 1
    return count


def spelled(latent: Latent) -> list[str]:
    """A latent message for people, a word per vector: which level each number is on, or the number itself."""
    half = (latent.levels - 1) / 2
    return [
        ",".join(f"{round(number * half + half)}" if latent.levels else f"{number:.2f}" for number in vector)
        for vector in latent.values
    ]


def cut(message: Message, count: int) -> Message:
    """The first entries of a message. Its price under its sender's own model stays what the sender paid, and so do the
    words that vectors were made from."""
    words = message.payload.split()
    if count >= max(len(words), len(message.word_bits)):
        return message
    latent = message.latent
    return replace(
        message,
        payload=" ".join(words[:count]),
        word_bits=message.word_bits[:count],
        latent=None
        if latent is None
        else replace(
            latent, values=latent.values[:count], drawn=latent.drawn[:count], logprobs=latent.logprobs[:count]
        ),
    )
